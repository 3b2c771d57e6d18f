"""What a cluster tells: who ran which statement where; and the tests that `watch` fails."""

from __future__ import annotations

import asyncio
import inspect
import logging
from pathlib import Path

import pytest
from sqlalchemy import select

from shardkit import AsyncCluster, AsyncReadSession, Cluster, all_shards, ids
from shardkit.events import Caller, Committed, Event, Gathered, StatementRouted
from shardkit.testing import watch
from tests.fixtures.sharded import Settled
from tests.models import Photo, User

pytestmark = pytest.mark.integration

NEWEST = select(Photo).order_by(Photo.id.desc()).limit(5).options(all_shards())


@pytest.fixture
def users(cluster: Cluster, settled: Settled) -> list[User]:
    """Eight users with a photo each, on every replica."""
    with cluster.writer() as session:
        users = []
        for i in range(8):
            user = User(id=ids.compose(1, 8 * i, i), name=f"user {i}")
            user.photos.append(Photo(caption=f"{i}"))
            users.append(user)
            session.add(user)
            session.commit()
    settled()
    return users


def line_here(offset: int = 0) -> tuple[str, int]:
    """Return the file and line this is called from."""
    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return frame.f_code.co_filename, frame.f_back.f_lineno + offset


def place(caller: Caller | None) -> tuple[str, int] | None:
    return None if caller is None else (caller.file, caller.line)


@pytest.mark.usefixtures("users")
def test_a_scatter_names_its_caller_and_what_came_back(cluster: Cluster) -> None:
    with watch(cluster) as seen, cluster.reader() as session:
        expected = line_here(1)
        session.scalars(NEWEST).all()
    routed, gathered = seen.events
    assert isinstance(routed, StatementRouted)
    assert isinstance(gathered, Gathered)
    assert place(routed.caller) == place(gathered.caller) == expected
    assert routed.caller is not None
    assert routed.caller.function == inspect.currentframe().f_code.co_name  # type: ignore[union-attr]
    assert (routed.operation, routed.subject, routed.kind) == ("select", "Photo", "all")
    assert routed.physical == ("alpha", "beta")
    assert routed.from_replica == {"alpha", "beta"}
    assert gathered.answers == {"alpha": 4, "beta": 4}
    assert gathered.failures == {}
    assert 0 < gathered.seconds < 30


def test_lazy_loads_name_the_line_that_touches_the_attribute(
    cluster: Cluster, users: list[User]
) -> None:
    with watch(cluster) as seen, cluster.reader() as session:
        user = session.get_one(User, users[0].id)
        expected = line_here(1)
        assert len(user.photos) == 1
    got, loaded = seen.statements
    assert place(got.caller) == (expected[0], expected[1] - 2)
    assert place(loaded.caller) == expected
    assert (loaded.subject, loaded.shards) == ("Photo", (0,))


def test_a_commit_is_told_with_its_token(cluster: Cluster, users: list[User]) -> None:
    with watch(cluster) as seen, cluster.writer() as session:
        session.get_one(User, users[0].id).name = "changed"
        expected = line_here(1)
        session.commit()
    routed, committed = seen.events
    assert isinstance(routed, StatementRouted)
    assert routed.from_replica == set()
    assert isinstance(committed, Committed)
    assert committed.physical == (cluster.topology.shard_map.owner(0),)
    assert committed.token == session.token
    assert committed.session == routed.session
    assert place(committed.caller) == expected


@pytest.mark.anyio
async def test_callers_are_found_beyond_the_greenlet(cluster_file: Path, users: list[User]) -> None:
    async with AsyncCluster.from_file(cluster_file) as cluster:
        with watch(cluster) as seen:
            async with cluster.reader() as session:
                first = line_here(1)
                await session.scalars(NEWEST)
                second = line_here(1)
                await session.get_one(User, users[0].id)
            async with cluster.writer() as session:
                session.add(User(name="new"))
                third = line_here(1)
                await session.commit()
        lines = [place(event.caller) for event in seen.events if hasattr(event, "caller")]
        assert lines == [first, first, second, third]
        with pytest.raises(AssertionError, match=r"unplanned scatter(.|\n)*test_events.py"):
            seen.assert_no_scatter()


@pytest.mark.anyio
async def test_a_task_of_nothing_but_a_statement_has_no_caller(
    cluster_file: Path, users: list[User]
) -> None:
    async with AsyncCluster.from_file(cluster_file) as cluster:
        with watch(cluster) as seen:
            async with cluster.reader() as session:
                await asyncio.create_task(session.get_one(User, users[0].id))
                expected = line_here(1)
                await asyncio.wait_for(asyncio.shield(read(session, users[1])), 10)
        assert seen.statements[0].caller is None
        inner = seen.statements[1].caller
        assert inner is not None
        assert (inner.file, inner.function) == (expected[0], "read")
        with pytest.raises(AssertionError, match="an unknown caller: select User 1 times"):
            seen.assert_no_n_plus_one(0)


async def read(session: AsyncReadSession, user: User) -> None:
    await session.get_one(User, user.id)


def test_a_listener_that_raises_breaks_nothing_and_is_logged(
    cluster: Cluster, users: list[User], caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[Event] = []

    def broken(_: Event) -> None:
        raise LookupError("broken listener")

    stops = [cluster.listen(broken), cluster.listen(heard.append), cluster.listen(heard.append)]
    with caplog.at_level(logging.ERROR), cluster.reader() as session:
        assert session.get(User, users[0].id) is not None
        assert len(heard) == 2
        assert "broken listener" in caplog.text
        stops[1]()
        stops[1]()
        session.expunge_all()
        assert session.get(User, users[0].id) is not None
        assert len(heard) == 3
        stops[0]()
        stops[2]()
    assert not cluster.connections.listeners


def test_a_scatter_fails_a_test_unless_planned(cluster: Cluster, users: list[User]) -> None:
    keys = [user.id for user in users[:3]]
    with (
        pytest.raises(AssertionError, match="select User on 3 of 64 logical shards"),
        watch(cluster, scatter=False),
        cluster.reader() as session,
    ):
        session.scalars(select(User).where(User.id.in_(keys)))
    with (
        watch(cluster, scatter=False, planned=["unless_planned"]) as seen,
        cluster.reader() as session,
    ):
        session.scalars(select(User).where(User.id.in_(keys)))
    seen.assert_no_scatter(up_to=3)
    with pytest.raises(AssertionError, match="unplanned scatter"):
        seen.assert_no_scatter(up_to=2)


def test_n_plus_one_across_shards_fails_a_test(cluster: Cluster, users: list[User]) -> None:
    with watch(cluster) as seen, cluster.reader() as session:
        for user in session.scalars(select(User).options(all_shards())).all():
            assert user.photos
    with pytest.raises(AssertionError, match="select Photo 8 times on 8 logical shards"):
        seen.assert_no_n_plus_one(5)
    seen.assert_no_n_plus_one(8)

    def reads() -> None:
        with watch(cluster, n_plus_one=5), cluster.reader() as session:
            for user in users:
                session.get(User, user.id)

    with pytest.raises(AssertionError, match="select User 8 times"):
        reads()
    with watch(cluster, n_plus_one=1):
        for user in users:
            with cluster.reader() as session:  # as requests do, each for itself
                session.get_one(User, user.id)


def test_a_replica_read_after_a_write_fails_a_test(cluster: Cluster, users: list[User]) -> None:
    def reads_early() -> None:
        with watch(cluster, stale_reads=False):
            with cluster.writer() as session:
                session.get_one(User, users[0].id).name = "changed"
                session.commit()
            with cluster.reader() as reader:
                reader.get(User, users[0].id)

    with pytest.raises(AssertionError, match="select User on a replica of alpha, written by"):
        reads_early()
    with watch(cluster, stale_reads=False):
        with cluster.reader() as reader:
            reader.get(User, users[0].id)
        with cluster.writer() as session:
            session.get_one(User, users[0].id).name = "again"
            session.commit()
        with cluster.reader(after=session.token) as reader:
            assert reader.get_one(User, users[0].id).name == "again"
            assert reader.get(User, users[7].id) is not None


@pytest.mark.usefixtures("users")
def test_an_exception_is_not_covered_by_a_failed_check(cluster: Cluster) -> None:
    def breaks() -> None:
        with watch(cluster, scatter=False), cluster.reader() as session:
            session.scalars(NEWEST)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        breaks()
