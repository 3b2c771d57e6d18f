"""What a statement may cost: rows, logical shards and seconds; and what a limit leaves behind."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import String, cast, func, select, text

from shardkit import AsyncCluster, Cluster, all_shards, ids
from shardkit.errors import (
    GatherError,
    StatementTimeoutError,
    TooManyRowsError,
    TooManyShardsError,
    UnsupportedStatementError,
)
from shardkit.session import ReadSession
from shardkit.topology import Topology
from tests.fixtures.sharded import Settled
from tests.models import Photo, User

pytestmark = pytest.mark.integration

SLOW = select(User.id).where(cast(func.pg_sleep(60), String) == "")
SHARD = {"logical_shard": 0}


@pytest.fixture
def users(cluster: Cluster, settled: Settled) -> list[User]:
    """Four users on alpha and four on beta, each with three photos, on every replica."""
    with cluster.writer() as session:
        users = []
        for i in range(8):
            user = User(id=ids.compose(1, 8 * i, i), name=f"user {i}")
            user.photos.extend(Photo(caption=f"{j}") for j in range(3))
            users.append(user)
            session.add(user)
            session.commit()
    settled()
    return users


@pytest.mark.parametrize(
    "limits",
    [
        {"timeout": 0},
        {"timeout": 0.0},
        {"timeout": -1},
        {"timeout": math.nan},
        {"timeout": math.inf},
        {"timeout": 1e9},
        {"max_rows": 0},
        {"max_rows": -5},
        {"max_rows": 1.5},
        {"max_shards": 0},
    ],
)
def test_a_limit_out_of_range_is_refused_at_the_call(limits: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(limits))}="):
        all_shards(**limits)


def test_a_clusters_own_limit_is_checked(topology: Topology) -> None:
    with pytest.raises(ValueError, match="max_rows=0"):
        Cluster(topology, max_rows=0)
    with pytest.raises(ValueError, match="max_rows=-1"):
        AsyncCluster(topology, max_rows=-1)


@pytest.mark.usefixtures("users")
def test_rows_are_counted_before_they_are_merged(cluster: Cluster) -> None:
    everything = select(Photo.id)
    with cluster.reader() as session:
        assert len(session.scalars(everything.options(all_shards(max_rows=24))).all()) == 24
        for refused in (everything, everything.order_by(Photo.id), everything.limit(24)):
            with pytest.raises(TooManyRowsError, match=r"more than 23 rows .*max_rows") as caught:
                session.scalars(refused.options(all_shards(max_rows=23)))
            assert not caught.value.retryable
        newest = everything.order_by(Photo.id.desc()).limit(2)
        assert len(session.scalars(newest.options(all_shards(max_rows=4))).all()) == 2
        by_owner = select(Photo.owner_id, func.count()).group_by(Photo.owner_id)
        assert len(session.execute(by_owner.options(all_shards(max_rows=8))).all()) == 8
        with pytest.raises(TooManyRowsError):
            session.execute(by_owner.options(all_shards(max_rows=7)))
        distinct = select(Photo.caption).distinct()
        assert len(session.scalars(distinct.options(all_shards(max_rows=6))).all()) == 3


@pytest.mark.usefixtures("users")
def test_a_server_sends_one_row_more_than_the_limit_at_most(cluster: Cluster) -> None:
    with cluster.reader() as session:
        for statement in (select(Photo.id), select(Photo.id).limit(500)):
            route = session.route(statement.options(all_shards(max_rows=7)))
            assert {sql.rpartition(" LIMIT ")[2] for _, sql in route.statements} == {"8"}
        route = session.route(select(Photo.id).limit(5).options(all_shards(max_rows=7)))
        assert {sql.rpartition(" LIMIT ")[2] for _, sql in route.statements} == {"5"}


@pytest.mark.usefixtures("users")
def test_the_cluster_has_a_limit_of_its_own(topology: Topology, cluster: Cluster) -> None:
    assert cluster.connections.max_rows == 300_000
    everything = select(Photo.id).options(all_shards())
    with Cluster(topology, max_rows=10) as small, small.reader() as session:
        with pytest.raises(TooManyRowsError, match="more than 10 rows"):
            session.scalars(everything)
        streamed = session.execute(everything, execution_options={"yield_per": 2})
        assert len(streamed.all()) == 24, "few of which are held"
        raised = select(Photo.id).options(all_shards(max_rows=100))
        assert len(session.scalars(raised).all()) == 24


def test_one_logical_shard_obeys_too(cluster: Cluster, users: list[User]) -> None:
    mine = select(Photo).where(Photo.owner_id == users[0].id)
    makers: list[Any] = [cluster.reader, cluster.writer]
    for make in makers:
        with make() as session:
            assert len(session.scalars(mine.options(all_shards(max_rows=3))).all()) == 3
            with pytest.raises(TooManyRowsError):
                session.scalars(mine.options(all_shards(max_rows=2)))
            slow = SLOW.where(User.id == users[0].id).options(all_shards(timeout=0.05))
            with pytest.raises(StatementTimeoutError) as caught:
                session.scalars(slow)
            assert caught.value.retryable
            assert caught.value.logical_shard == 0
            assert len(session.scalars(mine.options(all_shards(timeout=5))).all()) == 3
            assert timeout_of(session) == "0"


def test_a_fan_out_beyond_the_cap_asks_nobody(cluster: Cluster, users: list[User]) -> None:
    keys = [user.id for user in users[:3]]
    some = select(User).where(User.id.in_(keys))
    with cluster.reader() as session:
        for refused in (some, select(User)):
            with pytest.raises(TooManyShardsError, match=r"2 allowed .*max_shards"):
                session.scalars(refused.options(all_shards(max_shards=2)))
            with pytest.raises(TooManyShardsError):
                session.route(refused.options(all_shards(max_shards=2)))
        assert session._roots == {}
        assert len(session.scalars(some.options(all_shards(max_shards=3))).all()) == 3


def timeout_of(session: ReadSession) -> object:
    return session.scalar(text("SHOW statement_timeout"), bind_arguments=SHARD)


@pytest.mark.usefixtures("users")
def test_a_timeout_is_typed_and_does_not_outlive_its_statement(cluster: Cluster) -> None:
    with cluster.reader() as session:
        with pytest.raises(GatherError) as caught:
            session.scalars(SLOW.options(all_shards(timeout=0.05)))
        assert caught.value.retryable
        assert {type(e) for e in caught.value.failures.values()} == {StatementTimeoutError}
        assert set(caught.value.failures) == {"alpha", "beta"}
        assert caught.value.answers == {}
        assert "alpha/replica@" in str(caught.value.failures["alpha"])
        assert timeout_of(session) == "0"
        found = session.scalars(select(User.id).options(all_shards(timeout=5)))
        assert len(found.all()) == 8
        for _, connection in session._roots.values():
            driver: Any = connection.connection.driver_connection
            assert driver.info.transaction_status.name == "IDLE"
        assert timeout_of(session) == "0"
    with cluster.reader() as session:
        assert timeout_of(session) == "0"


def test_a_writer_keeps_its_transaction_and_its_own_timeout(
    cluster: Cluster, users: list[User]
) -> None:
    with cluster.writer() as session:
        user = session.get_one(User, users[0].id)
        user.name = "changed"
        session.flush()
        session.execute(text("SET LOCAL statement_timeout = '7s'"), bind_arguments=SHARD)
        with pytest.raises(GatherError):
            session.scalars(SLOW.options(all_shards(timeout=0.05)))
        assert timeout_of(session) == "7s"
        names = session.scalars(select(User.name).options(all_shards(timeout=5))).all()
        assert "changed" in names
        assert timeout_of(session) == "7s"
        session.commit()
    with cluster.writer() as session:
        assert session.get_one(User, users[0].id).name == "changed"
        assert timeout_of(session) == "0"


@pytest.mark.usefixtures("users")
def test_a_wrong_statement_within_a_timeout_leaves_the_connection_clean(cluster: Cluster) -> None:
    wrong = (
        select(User.id).where(cast(User.name, String).op("~")("(")).options(all_shards(timeout=5))
    )
    with cluster.reader() as session:
        with pytest.raises(Exception, match="invalid regular expression"):
            session.scalars(wrong)
        assert len(session.scalars(select(User.id).options(all_shards())).all()) == 8
        assert timeout_of(session) == "0"


@pytest.mark.anyio
@pytest.mark.usefixtures("users")
async def test_limits_hold_under_asyncio(cluster_file: Path) -> None:
    async with AsyncCluster.from_file(cluster_file) as cluster, cluster.reader() as session:
        with pytest.raises(GatherError) as caught:
            await session.scalars(SLOW.options(all_shards(timeout=0.05)))
        assert {type(e) for e in caught.value.failures.values()} == {StatementTimeoutError}
        with pytest.raises(TooManyRowsError):
            await session.scalars(select(Photo.id).options(all_shards(max_rows=5)))
        found = await session.scalars(select(User.id).options(all_shards(timeout=5, partial=True)))
        assert len(found.all()) == 8
        assert session.failures == {}
        shown = await session.scalar(text("SHOW statement_timeout"), bind_arguments=SHARD)
        assert shown == "0"


def test_partial_results_leave_out_the_server_that_is_late(
    cluster: Cluster, users: list[User]
) -> None:
    late = select(User.id).where(
        (User.name.in_([f"user {i}" for i in range(4)])) | (cast(func.pg_sleep(60), String) == "")
    )
    with cluster.reader() as session:
        found = session.scalars(late.options(all_shards(partial=True, timeout=0.3))).all()
        assert sorted(found) == [user.id for user in users[:4]]
        assert {name: type(e) for name, e in session.failures.items()} == {
            "beta": StatementTimeoutError
        }
        with pytest.raises(GatherError, match="physical shard beta") as caught:
            session.scalars(late.options(all_shards(timeout=0.3)))
        assert caught.value.answers == {"alpha": 4}
        assert len(session.scalars(select(User.id).options(all_shards(partial=True))).all()) == 8
        assert session.failures == {}
    with (
        cluster.writer() as session,
        pytest.raises(UnsupportedStatementError, match=r"partial .*cluster\.reader"),
    ):
        session.scalars(select(User.id).options(all_shards(partial=True)))
