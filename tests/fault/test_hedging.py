"""A replica that stumbles costs its readers milliseconds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import psycopg
import pytest
from sqlalchemy import Select, func, select
from sqlalchemy.exc import DataError

from shardkit import AsyncCluster, Cluster, all_shards, ids, races
from shardkit.async_session import AsyncReadSession
from shardkit.config import ReplicasConfig
from shardkit.local import LocalCluster
from shardkit.testing import wait_until
from shardkit.topology import Endpoint, Role, Topology
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


def slow(user: User, *, seconds: float) -> Select[Any]:
    return select(func.pg_sleep(seconds), User.name).where(User.id == user.id)


def physical_of(topology: Topology, user: User) -> str:
    return topology.shard_map.owner(ids.shard_of(user.id))


def assert_left_in_peace(local: LocalCluster, topology: Topology, user: User) -> None:
    """No replica works on a query for which nobody waits: less than 3 s after it began."""

    def at_rest() -> bool:
        for server in local.replicas(physical_of(topology, user)):
            with psycopg.connect(local.superuser_dsn(server.name), autocommit=True) as superuser:
                if superuser.execute(
                    "SELECT FROM pg_stat_activity WHERE query LIKE '%pg_sleep(%' "
                    "AND state = 'active' AND application_name = 'shardkit read'"
                ).fetchall():
                    return False
        return True

    wait_until(at_rest, 2.0, "the second query is cancelled")


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
            started = time.monotonic()
            assert session.get_one(User, user.id).name == "ana"
            assert time.monotonic() - started < 10.0, "a frozen replica would not answer at all"
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
    with hedging.reader() as session:
        found = session.execute(slow(user, seconds=3)).one()[1]
    assert found == "ana", "both are slow, and the first one wins"
    assert_left_in_peace(local_cluster, hedging.topology, user)


def test_writers_and_transactions_are_not_hedged(hedging: Cluster, user: User) -> None:
    spent: list[bool] = []
    for hedges in hedging.connections.hedges.values():
        hedges.spend = lambda: bool(spent.append(True))  # type: ignore[func-returns-value,method-assign]
    statement = slow(user, seconds=0.3)
    with hedging.writer() as session:
        assert session.execute(statement).one()[1] == "ana"
    assert spent == []
    with hedging.reader() as session:
        assert session.execute(statement).one()[1] == "ana"
    assert spent == [True], "the budget is asked once, and its refusal leaves the first alone"


def test_a_stream_keeps_to_the_server_of_its_cursor(hedging: Cluster, user: User) -> None:
    spent: list[bool] = []
    for hedges in hedging.connections.hedges.values():
        hedges.spend = lambda: not spent.append(True)  # type: ignore[func-returns-value,method-assign]
    statement = select(func.pg_sleep(0.3), Photo.caption).where(Photo.owner_id == user.id)
    with hedging.reader() as session:
        streamed = session.execute(statement.execution_options(yield_per=1))
        found = [caption for _, caption in streamed]
    assert found == ["dawn"]
    assert spent == [], "a cursor is in a transaction, of which no other server knows"


# -- the same for asyncio


class Spent:
    """Counts who asks the budget, and answers."""

    def __init__(self, cluster: AsyncCluster, *, grants: bool) -> None:
        self.times = 0
        self._grants = grants
        for hedges in cluster.connections.hedges.values():
            hedges.spend = self._spend  # type: ignore[method-assign]

    def _spend(self) -> bool:
        self.times += 1
        return self._grants


@asynccontextmanager
async def hedged(topology: Topology, user: User) -> AsyncIterator[AsyncCluster]:
    """A cluster that knows its tail, with a connection to both replicas."""
    async with AsyncCluster(topology, replicas=ReplicasConfig(hedge=True)) as cluster:
        for _ in range(100):
            async with cluster.reader() as session:
                assert (await session.get_one(User, user.id)).name == "ana"
        yield cluster


def checked_out(cluster: AsyncCluster) -> int:
    pools: list[Any] = [e.pool for e in cluster.connections._engines.values()]
    return sum(pool.checkedout() for pool in pools)


def reads_from(session: AsyncReadSession, physical: str) -> Endpoint:
    endpoint = session.sync_session.endpoint_of(physical)
    assert endpoint is not None
    assert endpoint.role is Role.REPLICA
    return endpoint


@pytest.mark.anyio
async def test_a_task_overtakes_a_frozen_replica_and_goes_on_with_the_other(
    topology: Topology, user: User, local_cluster: LocalCluster
) -> None:
    physical, frozen = physical_of(topology, user), ""
    async with hedged(topology, user) as cluster:
        try:
            async with cluster.reader() as session:
                assert (await session.get_one(User, user.id)).name == "ana"
                first = reads_from(session, physical)
                session.expunge_all()
                frozen = server_of(local_cluster, first)
                local_cluster.pause(frozen)
                async with asyncio.timeout(10.0):  # a frozen replica would not answer at all
                    assert (await session.get_one(User, user.id)).name == "ana"
                second = reads_from(session, physical)
                assert second != first
                found = await session.scalars(select(Photo).where(Photo.owner_id == user.id))
                assert [photo.caption for photo in found] == ["dawn"]
                assert reads_from(session, physical) == second
        finally:
            local_cluster.resume(frozen)
        await races.settle_tasks()
        assert checked_out(cluster) == 0


@pytest.mark.anyio
async def test_the_query_of_a_task_that_lost_is_cancelled(
    topology: Topology, user: User, local_cluster: LocalCluster
) -> None:
    async with hedged(topology, user) as cluster:
        spent = Spent(cluster, grants=True)
        async with cluster.reader() as session:
            found = (await session.execute(slow(user, seconds=3))).one()
            assert found[1] == "ana"
        assert spent.times == 1
        await asyncio.to_thread(assert_left_in_peace, local_cluster, topology, user)
        await races.settle_tasks()
        assert checked_out(cluster) == 0


@pytest.mark.anyio
async def test_a_cancelled_task_cancels_both_queries(
    topology: Topology, user: User, local_cluster: LocalCluster
) -> None:
    async with hedged(topology, user) as cluster:
        spent = Spent(cluster, grants=True)

        async def read() -> None:
            async with cluster.reader() as session:
                await session.execute(slow(user, seconds=60))

        task = asyncio.create_task(read())
        await asyncio.to_thread(wait_until, lambda: spent.times == 1, 20.0, "a second is asked")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(assert_left_in_peace, local_cluster, topology, user)
        assert checked_out(cluster) == 0


@pytest.mark.anyio
async def test_the_budget_holds_for_tasks_and_what_runs_together_is_not_hedged(
    topology: Topology, user: User
) -> None:
    async with hedged(topology, user) as cluster:
        spent = Spent(cluster, grants=False)
        async with cluster.writer() as session:
            assert (await session.execute(slow(user, seconds=0.3))).one()[1] == "ana"
        assert spent.times == 0
        async with cluster.reader() as session:
            assert (await session.execute(slow(user, seconds=0.3))).one()[1] == "ana"
        assert spent.times == 1, "the budget is asked once; its refusal leaves the first alone"
        for hedges in cluster.connections.hedges.values():
            hedges._delay = 0.0
        async with cluster.reader() as session:
            await session.execute(select(User.id).options(all_shards()))
        assert spent.times == 1, "several servers are asked together"
        async with cluster.reader() as session:
            await session.get_one(User, user.id)
        assert spent.times == 2, "the control: alone it would have been"


@pytest.mark.anyio
async def test_an_error_of_the_statement_is_the_first_ones(topology: Topology, user: User) -> None:
    async with hedged(topology, user) as cluster:
        Spent(cluster, grants=True)
        wrong = select(func.pg_sleep(0.3), 1 / func.length("")).where(User.id == user.id)
        async with cluster.reader() as session:
            with pytest.raises(DataError, match="division by zero"):
                await session.execute(wrong)
            assert (await session.get_one(User, user.id)).name == "ana"
        await races.settle_tasks()
        assert checked_out(cluster) == 0
