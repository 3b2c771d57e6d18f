"""What a commit says and leaves when the answer to one of its steps is lost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest
from sqlalchemy import insert, text
from sqlalchemy.exc import DBAPIError, PendingRollbackError

from shardkit import AsyncCluster, Cluster, ids
from shardkit.config import PoolConfig
from shardkit.errors import EndpointUnavailableError, OutcomeUnknownError
from shardkit.events import Event, TwoPhaseStep
from shardkit.local import LocalCluster
from shardkit.testing import Fault, When, wait_until
from shardkit.twophase import Resolution, in_doubt, resolve
from shardkit.writer import WriteSession
from tests.fixtures.proxies import Proxied
from tests.fixtures.sharded import Settled, admin
from tests.models import User

pytestmark = [pytest.mark.integration, pytest.mark.fault]

COMMIT = "^(SHOW synchronous_commit; )?COMMIT(;|$)"
"""The writer's own: its answer tells the position as well."""


@pytest.fixture(autouse=True)
def settled_afterwards(cluster: Cluster) -> Iterator[None]:
    """Nothing may stay prepared: a test that leaves something fails."""
    yield
    assert in_doubt(cluster.connections, cluster.topology.physical) == ([], {})


def on(cluster: Cluster, physical: str) -> int:
    return ids.compose(1, cluster.topology.shard_map.owned_by(physical)[0], 0)


def pair(cluster: Cluster) -> tuple[User, User]:
    return User(id=on(cluster, "alpha"), name="ana"), User(id=on(cluster, "beta"), name="bela")


def names(cluster: Cluster) -> list[str | None]:
    with cluster.writer() as session:
        found = [session.get(User, on(cluster, name)) for name in ("alpha", "beta")]
        return [None if user is None else user.name for user in found]


def resolved(cluster: Cluster) -> Resolution:
    return resolve(cluster.connections, cluster.topology.physical, older_than=0.0)


def lose(cluster: Cluster, proxied: Proxied, physical: str, pattern: str, when: When) -> Cluster:
    """Return a cluster that loses a message to a server, or the answer to it, once."""
    topology, proxy = proxied(cluster, cluster.topology.physical[physical].primary)
    proxy.on(pattern, Fault.RESET, when=when)
    return Cluster(topology, pool=PoolConfig(size=2, timeout=5.0))


def save(session: WriteSession, objects: Iterable[User], *, begin: bool) -> None:
    """Commit in one way or the other."""
    if begin:
        with session.begin():
            session.add_all(objects)
    else:
        session.add_all(objects)
        session.commit()


@pytest.mark.parametrize("begin", [False, True])
def test_a_decision_whose_answer_is_lost_is_a_commit(
    cluster: Cluster, proxied: Proxied, begin: bool
) -> None:
    with (
        lose(cluster, proxied, "alpha", COMMIT, When.AFTER) as through,
        through.writer(atomic=True) as session,
    ):
        save(session, pair(cluster), begin=begin)
        assert session.pending == ()
        assert session.token
        session.get_one(User, on(cluster, "alpha")).name = "anna"
        session.commit()
    assert names(cluster) == ["anna", "bela"]


@pytest.mark.parametrize("begin", [False, True])
def test_a_decision_that_is_lost_itself_is_none(
    cluster: Cluster, proxied: Proxied, begin: bool
) -> None:
    with (
        lose(cluster, proxied, "alpha", COMMIT, When.BEFORE) as through,
        through.writer(atomic=True) as session,
    ):
        with pytest.raises(EndpointUnavailableError, match="undone") as caught:
            save(session, pair(cluster), begin=begin)
        assert caught.value.retryable
        assert names(cluster) == [None, None]
        session.add_all(pair(cluster))  # the same session, again
        session.commit()
    assert names(cluster) == ["ana", "bela"]


@pytest.mark.anyio
async def test_a_lost_answer_is_a_commit_for_asyncio(cluster: Cluster, proxied: Proxied) -> None:
    topology, proxy = proxied(cluster, cluster.topology.physical["alpha"].primary)
    proxy.on(COMMIT, Fault.RESET, when=When.AFTER)
    async with AsyncCluster(topology) as through, through.writer(atomic=True) as session:
        session.add_all(pair(cluster))
        await session.commit()
        assert session.pending == ()
    assert names(cluster) == ["ana", "bela"]


def test_a_coordinator_that_cannot_be_asked_leaves_the_outcome_unknown(
    cluster: Cluster, proxied: Proxied
) -> None:
    topology, proxy = proxied(cluster, cluster.topology.physical["alpha"].primary)

    def cut() -> None:
        proxy.refuse()
        proxy.reset()

    proxy.on(COMMIT, cut, when=When.AFTER)
    with Cluster(topology) as through, through.writer(atomic=True) as session:
        session.add_all(pair(cluster))
        with pytest.raises(OutcomeUnknownError) as caught:
            session.commit()
        assert not caught.value.retryable
    found, _ = in_doubt(cluster.connections, cluster.topology.physical)
    assert len(found) == 1, "nobody who does not know ends it"
    assert [part.outcome for part in resolved(cluster).settled] == ["commit"]
    assert names(cluster) == ["ana", "bela"]


@pytest.mark.parametrize("when", [When.BEFORE, When.AFTER])
def test_a_participant_that_is_lost_while_it_prepares_undoes_all(
    cluster: Cluster, proxied: Proxied, when: When
) -> None:
    with (
        lose(cluster, proxied, "beta", "^PREPARE TRANSACTION", when) as through,
        through.writer(atomic=True) as session,
    ):
        session.add_all(pair(cluster))
        with pytest.raises(EndpointUnavailableError):
            session.commit()
    wait_until(lambda: resolved(cluster).waiting == (), 5.0, "what was prepared late is undone")
    assert names(cluster) == [None, None]


@pytest.mark.parametrize("when", [When.BEFORE, When.AFTER])
def test_a_participant_that_is_lost_after_the_decision_is_committed(
    cluster: Cluster, proxied: Proxied, when: When
) -> None:
    with (
        lose(cluster, proxied, "beta", "^COMMIT PREPARED", when) as through,
        through.writer(atomic=True) as session,
    ):
        session.add_all(pair(cluster))
        session.commit()
    assert names(cluster) == ["ana", "bela"]


def test_who_is_too_slow_to_decide_is_told_to_try_again(cluster: Cluster) -> None:
    def resolver(event: Event) -> None:
        if isinstance(event, TwoPhaseStep) and event.step == "prepared":
            resolved(cluster)

    ended = cluster.listen(resolver)
    with cluster.writer(atomic=True) as session:
        session.add_all(pair(cluster))
        with pytest.raises(EndpointUnavailableError, match="undone") as caught:
            session.commit()
        assert caught.value.retryable
        ended()
        session.add_all(pair(cluster))
        session.commit()
    assert names(cluster) == ["ana", "bela"]


def test_a_check_that_fails_at_commit_undoes_all(cluster: Cluster) -> None:
    """PostgreSQL checks what is deferred at PREPARE, or at the coordinator's COMMIT."""
    for physical in ("alpha", "beta"):
        shard = cluster.topology.shard_map.owned_by(physical)[0]
        with admin(cluster.topology.physical[physical]) as connection:
            table = f"shard_{shard:04d}.users"
            connection.execute(
                f"ALTER TABLE {table} ADD CONSTRAINT late UNIQUE (name) "
                "DEFERRABLE INITIALLY DEFERRED".encode()
            )
            try:
                with cluster.writer(atomic=True) as session:
                    session.add_all(pair(cluster))
                    twice = ids.compose(2, shard, 0)
                    name = "ana" if physical == "alpha" else "bela"
                    session.execute(insert(User).values(id=twice, name=name))
                    with pytest.raises(DBAPIError, match="late"):
                        session.commit()
                assert names(cluster) == [None, None]
            finally:
                connection.execute(f"ALTER TABLE {table} DROP CONSTRAINT late".encode())


def test_a_commit_that_failed_is_not_tried_again_by_itself(cluster: Cluster) -> None:
    with cluster.writer(atomic=True) as session:
        transaction = session.begin()
        session.add_all(pair(cluster))
        session.flush()
        here = {"logical_shard": cluster.topology.shard_map.owned_by("beta")[0]}
        session.execute(text("LISTEN something"), bind_arguments=here)
        with pytest.raises(DBAPIError, match="LISTEN"):
            transaction.commit()
        with pytest.raises(PendingRollbackError):
            session.commit()
        session.rollback()
    assert names(cluster) == [None, None]


def test_a_plain_commit_whose_answer_is_lost_is_unknown_also_inside_begin(
    cluster: Cluster, proxied: Proxied
) -> None:
    with (
        lose(cluster, proxied, "alpha", COMMIT, When.AFTER) as through,
        through.writer() as session,
    ):
        with pytest.raises(OutcomeUnknownError):
            save(session, pair(cluster)[:1], begin=True)
        assert session.get_one(User, on(cluster, "alpha")).name == "ana"


def test_what_is_prepared_survives_a_restart(
    cluster: Cluster, local_cluster: LocalCluster, settled: Settled
) -> None:
    """Killed after the decision: the participant, with its part; then the coordinator."""

    def kill(event: Event) -> None:
        if isinstance(event, TwoPhaseStep) and event.step == "decided":
            local_cluster.kill_server(local_cluster.primary("beta").name)

    cluster.listen(kill)
    with cluster.writer(atomic=True) as session:
        session.add_all(pair(cluster))
        session.commit()
        assert session.pending == ("beta",)
    for physical in ("alpha", "beta"):
        name = local_cluster.primary(physical).name
        if physical == "alpha":
            local_cluster.kill_server(name)
        local_cluster.start_server(name)
    settled()
    assert [part.outcome for part in resolved(cluster).settled] == ["commit"]
    assert names(cluster) == ["ana", "bela"]
