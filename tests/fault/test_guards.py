"""Sessions leave a failing server alone, shed what it cannot take, and try again from a budget."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from shardkit import Cluster, WriteSession, background, deadline, ids
from shardkit.config import PoolConfig
from shardkit.errors import (
    BreakerOpenError,
    EndpointUnavailableError,
    OutcomeUnknownError,
    OverloadedError,
    UnavailableError,
)
from shardkit.events import BreakerChanged
from shardkit.limits import FLOOR
from shardkit.local import LocalCluster
from shardkit.testing import wait_until, watch
from shardkit.topology import Topology
from tests.fixtures.pauses import within
from tests.fixtures.sharded import Settled
from tests.models import Photo, User

pytestmark = [pytest.mark.integration, pytest.mark.fault]


@pytest.fixture
def user(cluster: Cluster, settled: Settled) -> User:
    with cluster.writer() as session:
        user = User(name="ana")
        session.add(user)
        session.commit()
    settled()
    return user


@pytest.fixture
def healed(local_cluster: LocalCluster, settled: Settled) -> Iterator[LocalCluster]:
    yield local_cluster
    for server in local_cluster.servers:
        local_cluster.resume(server.name)
        if server.status == "stopped":
            local_cluster.start_server(server.name)
    settled()


def owner(cluster: Cluster, user: User) -> str:
    return cluster.topology.shard_map.owner(ids.shard_of(user.id))


def test_a_black_hole_is_left_alone_after_a_few_calls_and_used_again_when_it_is_back(
    cluster: Cluster, user: User, healed: LocalCluster
) -> None:
    physical = owner(cluster, user)
    name = healed.primary(physical).name

    def read() -> str:
        with deadline(0.15), cluster.writer() as session:
            return session.get_one(User, user.id).name

    read()
    healed.pause(name)
    with watch(cluster) as seen:
        for _ in range(5):
            with pytest.raises(UnavailableError):
                read()
        with within(0.5):  # nobody waits for it any more
            for _ in range(50):
                with pytest.raises(BreakerOpenError):
                    read()
        with pytest.raises(BreakerOpenError) as caught:
            read()
        assert caught.value.retryable
        assert caught.value.retry_after is not None
        changes = [e for e in seen.events if isinstance(e, BreakerChanged)]
        assert [(e.physical, e.role, e.new) for e in changes] == [(physical, "primary", "open")]
    other = next(n for n in cluster.topology.physical if n != physical)
    there = cluster.topology.shard_map.owned_by(other)[0]
    with cluster.writer() as session:
        assert session.get(User, ids.compose(1, there, 0)) is None, "the others answer"
    with cluster.reader() as reader:
        assert reader.get_one(User, user.id).name == "ana", "and so do its replicas"
    healed.resume(name)

    def is_back() -> bool:
        try:
            return read() == "ana"
        except UnavailableError:
            return False

    wait_until(is_back, 20.0, "a probe finds it well again")


def test_total_failure_draws_hardly_more_attempts_than_calls(
    cluster: Cluster, user: User, healed: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    healed.kill_server(healed.primary(owner(cluster, user)).name)
    attempts = 0
    writer = cluster.writer

    def counted() -> WriteSession:
        nonlocal attempts
        attempts += 1
        return writer()

    monkeypatch.setattr(cluster, "writer", counted)
    # The first ten seconds are for a failover, and bounded by time: docs/failover.md.
    monkeypatch.setattr(cluster.connections, "_failover_wait", 0.0)
    calls = 300
    for _ in range(calls):
        with pytest.raises(EndpointUnavailableError):
            cluster.run(lambda session: session.get(User, user.id))
    assert calls < attempts <= calls * 1.12


def test_a_commit_that_a_frozen_primary_swallowed_is_settled_by_running_again(
    cluster: Cluster, user: User, healed: LocalCluster
) -> None:
    name = healed.primary(owner(cluster, user)).name

    def post(session: WriteSession) -> str:
        photo = Photo(owner_id=user.id, caption="dawn")
        session.add(photo)
        session.flush()
        return str(photo.id)

    def post_and_freeze(session: WriteSession) -> str:
        found = post(session)
        commit = session._commit_unit

        def frozen() -> None:
            healed.pause(name)
            commit()

        session._commit_unit = frozen  # type: ignore[method-assign]
        return found

    with deadline(0.5), pytest.raises(OutcomeUnknownError):
        cluster.run(post_and_freeze, operation="post-1", near=user.id)
    healed.resume(name)
    results = {cluster.run(post, operation="post-1", near=user.id) for _ in range(3)}
    assert len(results) == 1
    with cluster.writer() as session:
        assert [str(photo.id) for photo in session.get_one(User, user.id).photos] == list(results)


def test_a_server_with_enough_to_do_sheds_the_background_first(topology: Topology) -> None:
    pool = PoolConfig(size=5, overflow=0, timeout=5.0)
    with Cluster(topology, pool=pool, adaptive=True) as cluster:
        held = [cluster.writer() for _ in range(5)]
        absent = ids.compose(1, 0, 0)
        try:
            for session in held[:4]:
                session.get(User, absent)
            with background(), cluster.writer() as late, pytest.raises(OverloadedError) as caught:
                late.get(User, absent)
            assert caught.value.retryable
            held[4].get(User, absent)
            with cluster.writer() as late, pytest.raises(OverloadedError):
                late.get(User, absent)
        finally:
            for session in held:
                session.close()
        guard = cluster.connections.guards[topology.physical["alpha"].primary]
        assert guard.limit is not None
        assert guard.limit.in_flight == 0, "every session gave its place back"
        assert guard.limit.limit >= FLOOR
        with background(), cluster.writer() as session:
            assert session.get(User, absent) is None
