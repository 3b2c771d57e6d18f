"""A replica that stumbles costs its readers milliseconds."""

from __future__ import annotations

import time
from collections.abc import Iterator

import psycopg
import pytest
from sqlalchemy import func, select

from shardkit import Cluster, ids
from shardkit.config import ReplicasConfig
from shardkit.local import LocalCluster
from shardkit.testing import wait_until
from shardkit.topology import Endpoint, Role, Topology
from tests.fixtures.pauses import within
from tests.fixtures.sharded import Settled
from tests.models import Photo, User

pytestmark = [pytest.mark.integration, pytest.mark.fault]


@pytest.fixture
def hedging(topology: Topology) -> Iterator[Cluster]:
    with Cluster(topology, replicas=ReplicasConfig(hedge=True)) as cluster:
        yield cluster


@pytest.fixture
def user(hedging: Cluster, settled: Settled) -> User:
    with hedging.writer() as session:
        user = User(name="ana", photos=[Photo(caption="dawn")])
        session.add(user)
        session.commit()
    settled()
    for _ in range(100):  # so that the tail is known, and both replicas have a connection
        with hedging.reader() as session:
            assert session.get_one(User, user.id).name == "ana"
    return user


def server_of(local: LocalCluster, endpoint: Endpoint) -> str:
    return next(s.name for s in local.servers if s.port == endpoint.url.port)


def test_a_frozen_replica_is_overtaken_and_the_session_goes_on_with_the_other(
    hedging: Cluster, user: User, local_cluster: LocalCluster
) -> None:
    physical = hedging.topology.shard_map.owner(ids.shard_of(user.id))
    frozen = ""
    try:
        with hedging.reader() as session:
            assert session.get_one(User, user.id).name == "ana"
            first = session.endpoint_of(physical)
            assert first is not None
            assert first.role is Role.REPLICA
            session.expunge_all()
            frozen = server_of(local_cluster, first)
            local_cluster.pause(frozen)
            with within(0.5):
                assert session.get_one(User, user.id).name == "ana"
            second = session.endpoint_of(physical)
            assert second is not None
            assert second != first
            assert second.role is Role.REPLICA
            found = session.scalars(select(Photo).where(Photo.owner_id == user.id))
            assert [photo.caption for photo in found] == ["dawn"]
            assert session.endpoint_of(physical) == second
    finally:
        local_cluster.resume(frozen)


def test_the_query_of_the_loser_is_cancelled(
    hedging: Cluster, user: User, local_cluster: LocalCluster
) -> None:
    physical = hedging.topology.shard_map.owner(ids.shard_of(user.id))
    slow = select(func.pg_sleep(1), User.name).where(User.id == user.id)
    started = time.monotonic()
    with within(1.9), hedging.reader() as session:
        assert session.execute(slow).one()[1] == "ana", "both are slow, and the first one wins"
    assert time.monotonic() - started >= 1.0

    def at_rest() -> bool:
        for server in local_cluster.replicas(physical):
            dsn = local_cluster.superuser_dsn(server.name)
            with psycopg.connect(dsn, autocommit=True) as superuser:
                if superuser.execute(
                    "SELECT FROM pg_stat_activity WHERE query LIKE '%pg_sleep(%' "
                    "AND state = 'active' AND application_name = 'shardkit read'"
                ).fetchall():
                    return False
        return True

    wait_until(at_rest, 1.0, "the second query is cancelled")


def test_writers_and_transactions_are_not_hedged(hedging: Cluster, user: User) -> None:
    spent: list[bool] = []
    for hedges in hedging.connections.hedges.values():
        hedges.spend = lambda: bool(spent.append(True))  # type: ignore[func-returns-value,method-assign]
    slow = select(func.pg_sleep(0.3), User.name).where(User.id == user.id)
    with hedging.writer() as session:
        assert session.execute(slow).one()[1] == "ana"
    assert spent == []
    with hedging.reader() as session:
        assert session.execute(slow).one()[1] == "ana"
    assert spent == [True], "the budget is asked once, and its refusal leaves the first alone"


def test_a_stream_keeps_to_the_server_of_its_cursor(hedging: Cluster, user: User) -> None:
    spent: list[bool] = []
    for hedges in hedging.connections.hedges.values():
        hedges.spend = lambda: not spent.append(True)  # type: ignore[func-returns-value,method-assign]
    slow = select(func.pg_sleep(0.3), Photo.caption).where(Photo.owner_id == user.id)
    with hedging.reader() as session:
        streamed = session.execute(slow.execution_options(yield_per=1))
        found = [caption for _, caption in streamed]
    assert found == ["dawn"]
    assert spent == [], "a cursor is in a transaction, of which no other server knows"
