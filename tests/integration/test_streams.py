"""Rows that come a few at a time from several servers, and what is left when they stop coming."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Integer, String, cast, func, select, text
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.orm import selectinload

from shardkit import AsyncCluster, Cluster, all_shards, ids
from shardkit.errors import (
    GatherError,
    StatementTimeoutError,
    StreamEndedError,
    TooManyRowsError,
)
from shardkit.events import Gathered
from shardkit.session import ReadSession
from shardkit.streams import Stream
from shardkit.testing import watch
from shardkit.tokens import ASK_PRIMARIES
from shardkit.topology import Topology
from tests.fixtures.sharded import Settled, admin
from tests.models import Photo, Reading, User

pytestmark = pytest.mark.integration

N_USERS, N_PHOTOS = 8, 25
EVERY = select(Photo).options(all_shards())
IDS = select(Photo.id).options(all_shards())
IN_ORDER = EVERY.order_by(Photo.rank.desc(), Photo.id)
A_FEW = {"yield_per": 10}

_FILL = """
INSERT INTO shard_{0:04}.readings (meter, value)
SELECT n, n FROM generate_series({1}, {2}) n
"""
_OPEN = """
SELECT count(*) FROM pg_stat_activity
WHERE application_name LIKE 'shardkit %' AND state <> 'idle' AND pid <> pg_backend_pid()
"""


@pytest.fixture
def users(cluster: Cluster, settled: Settled) -> list[User]:
    """Users on both servers, each with photos, on every replica."""
    users = []
    with cluster.writer() as session:
        for i in range(N_USERS):
            user = User(id=ids.compose(1, 8 * i, i), name=f"user {i}")
            user.photos.extend(Photo(caption=f"{j}", rank=j % 4 or None) for j in range(N_PHOTOS))
            users.append(user)
            session.add(user)
            session.commit()
    settled()
    return users


@pytest.fixture(params=["reader", "writer"])
def make(request: pytest.FixtureRequest, cluster: Cluster) -> Any:
    """Makes sessions of either kind."""
    return getattr(cluster, request.param)


def statuses(session: ReadSession) -> set[str]:
    drivers: list[Any] = [root.connection.driver_connection for _, root in session._roots.values()]
    return {driver.info.transaction_status.name for driver in drivers}


@pytest.mark.usefixtures("users")
def test_a_stream_gives_the_rows_that_one_answer_gives(make: Any) -> None:
    statements: list[Any] = [
        IN_ORDER,
        IN_ORDER.limit(33).offset(7),
        IN_ORDER.limit(0),
        select(Photo.rank, Photo.caption).order_by(Photo.rank.nulls_first(), Photo.id).options(all_shards()),
        select(Photo.rank).distinct().order_by(Photo.rank).options(all_shards()),
        select(Photo.rank, func.count()).group_by(Photo.rank).order_by(Photo.rank).options(all_shards()),
        select(Photo.rank).distinct().options(all_shards()).order_by(None),
    ]  # fmt: skip
    with make() as session:
        for statement in statements:
            whole = session.execute(statement).all()
            for size in (1, 3, 10, 1000):
                found = session.execute(statement, execution_options={"yield_per": size}).all()
                if statement._order_by_clauses:
                    assert found == whole
                else:
                    assert sorted(found, key=repr) == sorted(whole, key=repr)
        assert sorted(session.scalars(IDS, execution_options=A_FEW)) == sorted(session.scalars(IDS))


def test_one_logical_shard_is_streamed_too(make: Any, users: list[User]) -> None:
    mine = select(Photo).where(Photo.owner_id == users[0].id).order_by(Photo.id)
    with make() as session:
        whole = session.scalars(mine).all()
        stream = session.scalars(mine, execution_options=A_FEW)
        assert [len(part) for part in stream.partitions()] == [10, 10, 5]
        assert session.scalars(mine, execution_options=A_FEW).all() == whole
        union = mine.with_only_columns(Photo.id).order_by(None)
        found = session.scalars(union.union_all(union), execution_options=A_FEW).all()
        assert len(found) == 2 * N_PHOTOS


@pytest.mark.usefixtures("users")
def test_entities_come_in_partitions_with_their_relationships(make: Any) -> None:
    with make() as session:
        statement = IN_ORDER.options(selectinload(Photo.owner))
        parts = list(session.scalars(statement, execution_options=A_FEW).partitions())
        assert [len(part) for part in parts] == [10] * (N_USERS * N_PHOTOS // 10)
        assert {photo.owner.name for part in parts for photo in part} == {
            f"user {i}" for i in range(N_USERS)
        }
        again = session.scalars(IN_ORDER, execution_options=A_FEW).all()
        assert all(a is b for a, b in zip(again, itertools.chain(*parts), strict=True))
        with pytest.raises(InvalidRequestError, match="yield_per"):
            session.scalars(IN_ORDER, execution_options=A_FEW).unique().all()


@pytest.mark.usefixtures("users")
def test_the_session_reads_on_in_the_middle_of_a_stream(make: Any) -> None:
    with make() as session:
        one = session.scalars(IN_ORDER, execution_options=A_FEW)
        two = session.scalars(IDS.order_by(Photo.id), execution_options={"yield_per": 7})
        seen: list[Photo] = []
        for photo, number in zip(one, two, strict=True):
            seen.append(photo)
            assert session.get(Photo, number).id == number
            if len(seen) % 50 == 0:
                assert len(session.scalars(IDS.limit(20)).all()) == 20
                limited = IDS.options(all_shards(timeout=5))
                assert len(session.scalars(limited).all()) == N_USERS * N_PHOTOS
        assert len(seen) == N_USERS * N_PHOTOS


@pytest.mark.usefixtures("users")
def test_a_stream_leaves_nothing_open(cluster: Cluster, topology: Topology) -> None:
    def n_open() -> int:
        found = 0
        for shard in topology.physical.values():
            with admin(shard) as connection:
                row = connection.execute(_OPEN).fetchone()
                assert row is not None
                found += int(str(row[0]))
        return found

    def ways(session: ReadSession) -> Iterator[Any]:
        yield session.scalars(IN_ORDER, execution_options=A_FEW).all()
        stream = session.scalars(IN_ORDER, execution_options=A_FEW)
        next(stream)
        yield stream.close
        yield session.scalars(IN_ORDER, execution_options=A_FEW).first()
        with session.scalars(IN_ORDER, execution_options=A_FEW) as stream:
            next(stream)
        yield None

    with cluster.reader(after=ASK_PRIMARIES) as session:
        for close in ways(session):
            if callable(close):
                close()
            assert statuses(session) == {"IDLE"}
        abandoned = session.scalars(IN_ORDER, execution_options=A_FEW)
        next(abandoned)
        assert n_open() == 2, "a transaction on each server"
        session.close()
        assert n_open() == 0
        with pytest.raises(StreamEndedError, match="closed"):
            list(abandoned)
    forgotten = cluster.reader(after=ASK_PRIMARIES)
    rest = forgotten.scalars(IN_ORDER, execution_options=A_FEW)
    next(rest)
    forgotten._roots["alpha"][1].close()  # as garbage collection does
    forgotten._roots["beta"][1].close()
    assert n_open() == 0
    for engine in cluster.connections._engines.values():
        assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]


@pytest.mark.usefixtures("users")
def test_a_statement_that_fails_in_between_ends_the_stream(cluster: Cluster) -> None:
    wrong = IDS.where(cast(Photo.caption, String).op("~")("("))
    with cluster.reader() as session:
        stream = session.scalars(IN_ORDER, execution_options=A_FEW)
        next(stream)
        with pytest.raises(DBAPIError, match="invalid regular expression"):
            session.scalars(wrong)
        with pytest.raises(StreamEndedError, match="another statement"):
            stream.all()
        assert len(session.scalars(IN_ORDER, execution_options=A_FEW).all()) == N_USERS * N_PHOTOS
        assert statuses(session) == {"IDLE"}
    with cluster.writer() as session:
        stream = session.scalars(IN_ORDER, execution_options=A_FEW)
        next(stream)
        session.commit()
        with pytest.raises(StreamEndedError, match="transaction is over"):
            stream.all()
        with session.begin_nested() as nested:
            inner = session.scalars(IN_ORDER, execution_options=A_FEW)
            next(inner)
            nested.rollback()
        with pytest.raises(StreamEndedError, match="transaction is over"):
            inner.all()
        assert len(session.scalars(IDS).all()) == N_USERS * N_PHOTOS, "and harms nothing"


@pytest.mark.usefixtures("users")
def test_an_error_in_the_middle_of_the_rows_is_the_servers_own(make: Any) -> None:
    # Of the table: what loads through the ORM says nothing more after an error of its own.
    caption = Photo.__table__.c.caption
    late = select(1 / (cast(caption, Integer) - N_PHOTOS + 1)).options(all_shards())
    with make() as session:
        stream = session.scalars(late, execution_options=A_FEW)
        next(stream)
        with pytest.raises(DBAPIError, match="division by zero"):
            stream.all()
        with pytest.raises(StreamEndedError):
            stream.all()
        session.rollback()
        assert len(session.scalars(IDS).all()) == N_USERS * N_PHOTOS


@pytest.mark.usefixtures("users")
def test_each_fetch_of_a_stream_obeys_the_timeout(make: Any) -> None:
    slow = cast(func.pg_sleep(60), String) == ""
    with make() as session:
        late = EVERY.where((Photo.rank < 3) | slow).options(all_shards(timeout=0.2))
        with pytest.raises(GatherError) as caught:
            session.scalars(late, execution_options=A_FEW).all()
        assert {type(e) for e in caught.value.failures.values()} == {StatementTimeoutError}
        shown = session.scalar(text("SHOW statement_timeout"), bind_arguments={"logical_shard": 0})
        assert shown == "0"
        quick = EVERY.options(all_shards(timeout=5))
        assert len(session.scalars(quick, execution_options=A_FEW).all()) == N_USERS * N_PHOTOS


@pytest.mark.usefixtures("users")
def test_what_cannot_be_streamed_obeys_the_limit_on_rows(topology: Topology) -> None:
    by_owner = select(Photo.owner_id, func.count()).group_by(Photo.owner_id)
    unordered = select(Photo.id).distinct()
    with Cluster(topology, max_rows=5) as small, small.reader() as session:
        assert len(session.scalars(IN_ORDER, execution_options=A_FEW).all()) == N_USERS * N_PHOTOS
        for held in (by_owner, unordered):
            with pytest.raises(TooManyRowsError):
                session.execute(held.options(all_shards()), execution_options=A_FEW)
        ordered = unordered.order_by(Photo.id).options(all_shards())
        assert len(session.scalars(ordered, execution_options=A_FEW).all()) == N_USERS * N_PHOTOS


@pytest.mark.usefixtures("users")
def test_listeners_hear_of_a_stream_when_it_ends(cluster: Cluster) -> None:
    with watch(cluster) as seen, cluster.reader() as session:
        stream = session.scalars(IN_ORDER, execution_options=A_FEW)
        next(stream)
        assert not [e for e in seen.events if isinstance(e, Gathered)]
        stream.all()
        (told,) = [e for e in seen.events if isinstance(e, Gathered)]
        assert sum(told.answers.values()) == N_USERS * N_PHOTOS
        assert set(told.answers) == {"alpha", "beta"}


def test_many_rows_take_little_memory(
    cluster: Cluster, topology: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    """60,000 rows of two servers, of which the client holds a few hundred."""
    n = 60_000
    halves = {3: (1, n // 2), 40: (n // 2 + 1, n)}
    owners = {shard: topology.shard_map.owner(shard) for shard in halves}
    assert len(set(owners.values())) == 2
    for shard, (first, last) in halves.items():
        with admin(topology.physical[owners[shard]]) as connection:
            connection.execute(_FILL.format(shard, first, last).encode())
    held: list[int] = []
    receive = Stream._received

    def received(stream: Stream, server: Any, rows: Any, wanted: int) -> None:
        receive(stream, server, rows, wanted)
        held.append(len(server.rows))

    monkeypatch.setattr(Stream, "_received", received)
    for order in (Reading.value % 1000, None):
        with cluster.reader(after=ASK_PRIMARIES) as session:
            statement = select(Reading.meter, Reading.value).options(all_shards(max_rows=100))
            if order is not None:
                statement = statement.order_by(order)
            stream = session.execute(statement, execution_options={"yield_per": 500})
            count = total = 0
            tracemalloc.start()
            for row in stream:
                count += 1
                total += row.meter
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert (count, total) == (n, n * (n + 1) // 2)
            assert max(held) == 500
            held.clear()
            assert peak < 2_000_000, f"{peak:,} bytes"


@pytest.mark.anyio
@pytest.mark.usefixtures("users")
async def test_async_sessions_stream(cluster_file: Path) -> None:
    async with AsyncCluster.from_file(cluster_file) as cluster:
        for make in (cluster.reader, cluster.writer):
            async with make() as session:
                whole = (await session.scalars(IN_ORDER)).all()
                stream = await session.stream_scalars(IN_ORDER, execution_options=A_FEW)
                assert [photo async for photo in stream] == whole
                stream = await session.stream_scalars(IN_ORDER.options(selectinload(Photo.owner)))
                sizes = [len(part) async for part in stream.partitions(30)]
                assert sizes == [30] * 6 + [20]
                rows = await session.stream(IDS.order_by(Photo.id), execution_options=A_FEW)
                assert [row.id async for row in rows] == sorted(photo.id for photo in whole)
                with pytest.raises(InvalidRequestError, match="server-side cursor"):
                    await session.scalars(IN_ORDER, execution_options=A_FEW)
                broken = await session.stream_scalars(IN_ORDER, execution_options=A_FEW)
                await anext(broken)
                await broken.close()
                if make is cluster.reader:
                    assert statuses(session.sync_session) == {"IDLE"}
