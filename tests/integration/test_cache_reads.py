"""Objects by primary key through the cache, on real servers of every kind."""

from __future__ import annotations

import asyncio
import datetime as dt
import itertools
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, inspect, select
from sqlalchemy.orm import DeclarativeBase, Mapped, load_only, selectinload

from shardkit import AsyncCluster, Cluster, Sharded, deadline, ids
from shardkit.cache import Writer
from shardkit.cached import CachePlan, plan_of
from shardkit.caching.operations import Kind, Op, Outcome, Request
from shardkit.cli import main
from shardkit.config import CacheConfig, PoolConfig
from shardkit.errors import DeadlineExceededError, EndpointUnavailableError
from shardkit.events import CacheRead, Event, StatementRouted
from shardkit.rowcache import RowCache
from shardkit.session import ReadSession
from shardkit.testing import wait_until
from shardkit.tokens import ASK_PRIMARIES, NOTHING
from shardkit.topology import Topology, schema_name
from tests.fixtures.caches import CacheServer, NewServer
from tests.fixtures.sharded import Settled, admin, one_server
from tests.models import Mood, Post, Profile

pytestmark = pytest.mark.integration

SHARDS = (1, 2, 40, 41)
SEQUENCE = itertools.count(1)
PATIENT = 2.0
"""Deadline of the cache in tests that are not about it: the machine may be busy."""


def plan(cls: type[Any] = Profile) -> CachePlan:
    found = plan_of(inspect(cls))
    assert found is not None
    return found


def new_id(shard: int) -> int:
    return ids.compose(1, shard, next(SEQUENCE))


class Rows:
    """Rows as they are in the database, whatever the cache says."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology

    def insert(self, shard: int = 1, **values: Any) -> int:
        row = {"data": "{}", "essay": "long", **values}
        return self._insert("profiles", new_id(shard), {"name": "somebody", **row})

    def post(self, owner_id: int, **values: Any) -> int:
        row = {"owner_id": owner_id, "text": "text", **values}
        return self._insert("posts", new_id(ids.shard_of(owner_id)), row)

    def _insert(self, table: str, key: int, values: dict[str, Any]) -> int:
        row = {"id": key, "version": 1, **values}
        places = ", ".join(["%s"] * len(row))
        text = f"INSERT INTO {{}}.{table} ({', '.join(row)}) VALUES ({places})"
        self._run(key, text, [*row.values()])
        return key

    def rename(self, key: int, name: str) -> None:
        """Change a row behind everybody's back."""
        self._run(key, "UPDATE {}.profiles SET name = %s WHERE id = %s", [name, key])

    def delete(self, key: int) -> None:
        self._run(key, "DELETE FROM {}.profiles WHERE id = %s", [key])

    def version(self, key: int) -> int:
        found = self._run(key, "SELECT version FROM {}.profiles WHERE id = %s", [key])
        return int(found[0])

    def _run(self, key: int, text: str, values: Sequence[Any]) -> Any:
        shard = ids.shard_of(key)
        owner = self._topology.shard_map.owner(shard)
        with admin(self._topology.physical[owner]) as connection:
            cursor = connection.execute(text.format(schema_name(shard)).encode(), values)
            return cursor.fetchone() if cursor.description else None


@pytest.fixture
def rows(topology: Topology) -> Rows:
    return Rows(topology)


@pytest.fixture(params=["memcached", "redis"])
def server(request: pytest.FixtureRequest, cache_server: NewServer) -> CacheServer:
    return cache_server(request.param)


Open = Callable[..., Cluster]


@pytest.fixture
def open_cluster(topology: Topology) -> Iterator[Open]:
    """Open clusters with a cache on given servers; closed after the test."""
    with ExitStack() as stack:

        def start(*servers: CacheServer, **settings: Any) -> Cluster:
            kind: Any = servers[0].kind
            config = CacheConfig(backend=kind, nodes=tuple(s.server for s in servers), **settings)
            pool = PoolConfig(size=5, overflow=5, timeout=20.0)
            cluster = stack.enter_context(Cluster(topology, pool=pool, cache=config))
            cache_of(cluster).backend.seconds = PATIENT  # type: ignore[attr-defined]
            return cluster

        yield start


def cache_of(cluster: Cluster) -> RowCache:
    assert cluster.cache is not None
    return cluster.cache


@contextmanager
def told(cluster: Cluster | AsyncCluster) -> Iterator[list[Event]]:
    """What happens meanwhile."""
    events: list[Event] = []
    end = cluster.listen(events.append)
    yield events
    end()


def sent(events: Sequence[Event]) -> int:
    return sum(isinstance(event, StatementRouted) for event in events)


def reads(events: Sequence[Event]) -> list[CacheRead]:
    return [event for event in events if isinstance(event, CacheRead)]


def key_of(cluster: Cluster, key: int, cls: type[Any] = Profile) -> str:
    return cache_of(cluster).key(plan(cls), ids.shard_of(key), (key,))


def test_the_first_reader_fills_and_the_next_asks_no_database(
    rows: Rows, server: CacheServer, open_cluster: Open
) -> None:
    cluster = open_cluster(server)
    moment = dt.datetime(2026, 5, 6, 7, 8, 9, 10, tzinfo=dt.UTC)
    key = rows.insert(name="Ana", mood="BAD", seen_at=moment, data=json.dumps({"a": [1, None]}))
    with told(cluster) as events, cluster.reader() as session:
        first = session.get(Profile, key)
        assert first is not None
        assert sent(events) == 1
    rows.rename(key, "behind its back")
    with told(cluster) as events, cluster.reader() as session:
        profile = session.get_one(Profile, key)
        assert sent(events) == 0
        [read] = reads(events)
        assert (read.hits, read.misses, read.subject, read.rows) == (1, 0, "Profile", 1)
        assert read.caller is not None
        assert read.caller.function == "test_the_first_reader_fills_and_the_next_asks_no_database"
        for found in (first, profile):
            assert (found.id, found.name, found.mood) == (key, "Ana", Mood.BAD)
            assert (found.seen_at, found.data) == (moment, {"a": [1, None]})
        assert session.get(Profile, key) is profile
        assert len(reads(events)) == 1, "the session holds it"
    counts = cache_of(cluster).counts
    assert (counts.hits, counts.misses, counts.fills) == (1, 1, 1)
    assert counts.hit_rate == 0.5


def test_what_is_made_of_a_cached_row_is_what_loading_it_makes(
    rows: Rows, server: CacheServer, open_cluster: Open
) -> None:
    cluster = open_cluster(server)
    key = rows.insert(essay="the essay")
    with cluster.reader() as session:
        session.get(Profile, key)
    loads: list[tuple[Any, Any]] = []
    persistent: list[Any] = []

    def note(target: Any, context: Any) -> None:
        loads.append((target, context))

    event.listen(Profile, "load", note)
    try:
        with cluster.reader() as session, cluster.reader(after=ASK_PRIMARIES) as other:
            event.listen(session, "loaded_as_persistent", lambda _, found: persistent.append(found))
            cached, loaded = session.get(Profile, key), other.get(Profile, key)
            assert cached is not None
            assert loaded is not None
            assert loads == [(cached, None), (loaded, loads[1][1])]
            assert persistent == [cached]
            mine, theirs = inspect(cached), inspect(loaded)
            assert mine.persistent
            assert mine.key == theirs.key
            assert mine.session is session
            assert mine.identity == (key,)
            assert mine.unloaded == theirs.unloaded == {"essay"}
            assert mine.load_path == theirs.load_path
            assert not mine.modified
            assert cached not in session.dirty
            assert vars(cached).keys() == vars(loaded).keys()
            assert {k: v for k, v in vars(cached).items() if k[0] != "_"} == {
                k: v for k, v in vars(loaded).items() if k[0] != "_"
            }
            assert cached.essay == "the essay", "deferred: read when it is asked for"
            session.expire(cached)
            rows.rename(key, "new")
            session.expunge(cached)
            assert inspect(cached).detached
            assert session.get(Profile, key) is not cached
    finally:
        event.remove(Profile, "load", note)


@pytest.mark.usefixtures("topology")
def test_absence_is_cached_through_leases_for_a_short_time(
    server: CacheServer, open_cluster: Open
) -> None:
    cluster = open_cluster(server)
    key = new_id(2)
    with told(cluster) as events, cluster.reader() as session:
        assert session.get(Profile, key) is None
        assert session.get(Profile, key) is None
        assert sent(events) == 1
        assert session.get_many(Profile, [key]) == [None]
        assert sent(events) == 1
    answer = cache_of(cluster).run([Request(Op.READ, key_of(cluster, key))])[0]
    assert (answer.kind, answer.version) == (Kind.ABSENCE, 0)


@pytest.mark.parametrize(
    "options",
    [{"populate_existing": True}, {"options": [load_only(Profile.name)]},
     {"execution_options": {"populate_existing": True}}],
    ids=["populate_existing", "options", "execution_options"],
)  # fmt: skip
def test_whoever_says_how_to_load_is_not_shown_the_cache(
    rows: Rows, open_cluster: Open, cache_server: NewServer, settled: Settled, options: Any
) -> None:
    cluster = open_cluster(cache_server("memcached"))
    key = rows.insert(name="old")
    with cluster.reader() as session:
        session.get(Profile, key)
    rows.rename(key, "new")
    settled()
    with cluster.reader() as session:
        found = session.get(Profile, key, **options)
        assert found is not None
        assert found.name == "new"
    with cluster.reader() as session:
        found = session.get(Profile, key)
        assert found is not None
        assert found.name == "old"
        session.refresh(found)
        assert found.name == "new"
        rows.rename(key, "newer")
        settled()
        session.expire(found, ["name"])
        assert found.name == "newer"
        session.expire(found)
        assert found.name == "newer"


def test_writers_and_readers_of_primaries_ask_the_database(
    rows: Rows, open_cluster: Open, cache_server: NewServer
) -> None:
    cluster = open_cluster(cache_server("memcached"))
    key = rows.insert(name="old")
    with cluster.reader() as session:
        session.get(Profile, key)
    rows.rename(key, "new")
    with told(cluster) as events:
        with cluster.writer() as session:
            assert session.get_one(Profile, key).name == "new"
            assert session.get_many(Profile, [key])[0].name == "new"
            session.rollback()
            assert session.get_one(Profile, key, with_for_update=True).name == "new"
        with cluster.reader(after=ASK_PRIMARIES) as session:
            assert session.get_one(Profile, key).name == "new"
        assert not reads(events)
        with cluster.reader(after=NOTHING, max_lag=5.0) as session:
            assert session.get_one(Profile, key).name == "old"
        assert len(reads(events)) == 1


def test_a_reader_is_shown_nothing_below_what_this_process_wrote(
    rows: Rows, open_cluster: Open, cache_server: NewServer
) -> None:
    cluster = open_cluster(cache_server("memcached"))
    key = rows.insert(name="old")
    with cluster.reader() as session:
        session.get(Profile, key)
    rows.rename(key, "new")
    cache_of(cluster).raise_floor(key_of(cluster, key), rows.version(key) + 1)
    with cluster.reader() as session:
        assert session.get_one(Profile, key).name == "new"


def test_listeners_for_statements_see_every_read(
    rows: Rows, open_cluster: Open, cache_server: NewServer, settled: Settled
) -> None:
    cluster = open_cluster(cache_server("memcached"))
    key = rows.insert(name="old")
    settled()
    with cluster.reader() as session:
        session.get(Profile, key)
    with told(cluster) as events, cluster.reader() as session:
        statements: list[Any] = []
        event.listen(session, "do_orm_execute", lambda state: statements.append(state.statement))
        assert session.get(Profile, key) is not None
        assert len(statements) == 1
        assert not reads(events)


def test_many_take_one_read_of_the_misses_and_keep_their_order(
    rows: Rows, server: CacheServer, cache_server: NewServer, open_cluster: Open
) -> None:
    cluster = open_cluster(server, cache_server(server.kind))
    keys = [rows.insert(shard, name=f"{shard} {n}") for shard in SHARDS for n in range(5)]
    missing = new_id(3)
    wanted = [keys[7], missing, keys[0], keys[7], *keys]
    with told(cluster) as events, cluster.reader() as session:
        found = session.get_many(Profile, wanted)
        assert [p and p.id for p in found] == [keys[7], None, keys[0], keys[7], *keys]
        assert found[0] is found[3]
        assert sent(events) == 1, "one scatter, one statement per server"
        [read] = reads(events)
        assert (read.rows, read.misses, read.fills) == (21, 21, 21)
    for key in keys[:3]:
        rows.rename(key, "behind")
    fresh = [rows.insert(shard) for shard in SHARDS]
    with told(cluster) as events, cluster.reader() as session:
        found = session.get_many(Profile, [*fresh, *keys, missing])
        assert all(p.name != "behind" for p in found[:-1])
        assert found[-1] is None
        [read] = reads(events)
        assert (read.hits, read.misses, read.fills) == (21, 4, 4)
        assert sent(events) == 1


def test_related_objects_come_from_the_cache(
    rows: Rows, server: CacheServer, open_cluster: Open, settled: Settled
) -> None:
    cluster = open_cluster(server)
    people = [rows.insert(shard, name=f"person {shard}") for shard in SHARDS]
    posts = [rows.post(people[0], reviewer_id=reviewer) for reviewer in (*people, None, 5)]
    settled()
    with cluster.reader() as session:
        session.get_many(Profile, people)
    for person in people:
        rows.rename(person, "behind")
    settled()
    query = select(Post).where(Post.owner_id == people[0]).order_by(Post.id)
    with told(cluster) as events, cluster.reader() as session:
        found = session.scalars(query).all()
        assert [post.id for post in found] == posts
        assert sent(events) == 1
        assert [post.reviewer and post.reviewer.name for post in found[:5]] == [
            *(f"person {shard}" for shard in SHARDS), None,
        ]  # fmt: skip
        assert {post.owner for post in found} == {found[0].reviewer}
        assert sent(events) == 1
        assert found[5].reviewer is None, "there is none"
        assert found[5].reviewer is None
        assert sent(events) == 2
    eager = query.options(selectinload(Post.reviewer), selectinload(Post.owner))
    with told(cluster) as events, cluster.reader() as session:
        found = session.scalars(eager).all()
        assert sent(events) == 1
        assert [post.__dict__["reviewer"] and post.__dict__["reviewer"].name for post in found] == [
            *(f"person {shard}" for shard in SHARDS),
            None,
            None,
        ]
        assert all(post.__dict__["owner"].name == "person 1" for post in found)
    deeper = query.options(selectinload(Post.owner).load_only(Profile.name))
    with told(cluster) as events, cluster.reader() as session:
        found = session.scalars(deeper).all()
        assert sent(events) == 2, "what says how to load goes to the database"
        assert found[0].owner.name == "behind"
    fresh = query.options(selectinload(Post.owner)).execution_options(populate_existing=True)
    with cluster.reader() as session:
        assert session.scalars(fresh).all()[0].owner.name == "behind"


def test_two_hundred_threads_that_want_a_cold_row_read_it_once(
    rows: Rows, server: CacheServer, open_cluster: Open
) -> None:
    cluster = open_cluster(server)
    key = rows.insert(name="Ana")
    start = threading.Barrier(200)

    def read() -> str:
        with cluster.reader() as session:
            start.wait(60)
            return str(session.get_one(Profile, key).name)

    with told(cluster) as events, ThreadPoolExecutor(200) as threads:
        names = [task.result() for task in [threads.submit(read) for _ in range(200)]]
    assert names == ["Ana"] * 200
    assert sent(events) == 1
    counts = cache_of(cluster).counts
    assert (counts.misses, counts.hits, counts.unanswered) == (1, 199, 0)


@pytest.mark.parametrize("n_processes", [3])
def test_processes_that_want_a_cold_row_read_it_once(
    rows: Rows, cache_server: NewServer, open_cluster: Open, n_processes: int
) -> None:
    """Other clusters stand for other processes: they share nothing but the servers."""
    server = cache_server("memcached")
    clusters = [open_cluster(server) for _ in range(n_processes)]
    key = rows.insert(name="Ana")
    start = threading.Barrier(30)

    def read(cluster: Cluster) -> str:
        with cluster.reader() as session:
            start.wait(60)
            return str(session.get_one(Profile, key).name)

    with ExitStack() as stack, ThreadPoolExecutor(30) as threads:
        events = [stack.enter_context(told(cluster)) for cluster in clusters]
        tasks = [threads.submit(read, clusters[n % n_processes]) for n in range(30)]
        assert [task.result() for task in tasks] == ["Ana"] * 30
    fills = sum(cache_of(cluster).counts.fills for cluster in clusters)
    assert fills == 1
    # A process that has waited long for another one's fill reads by itself, and does not store.
    assert 1 <= sum(map(sent, events)) <= n_processes


@pytest.mark.anyio
async def test_two_hundred_tasks_that_want_a_cold_row_read_it_once(
    rows: Rows, topology: Topology, cache_server: NewServer
) -> None:
    key = rows.insert(name="Ana")
    server = cache_server("memcached")
    config = CacheConfig(backend="memcached", nodes=(server.server,))
    async with AsyncCluster(topology, cache=config) as cluster:
        assert cluster.cache is not None
        cluster.cache.backend.seconds = PATIENT  # type: ignore[attr-defined]

        async def read() -> str:
            async with cluster.reader() as session:
                return str((await session.get_one(Profile, key)).name)

        with told(cluster) as events:
            names = await asyncio.gather(*(read() for _ in range(200)))
        assert names == ["Ana"] * 200
        assert sent(events) == 1
        counts = cluster.cache.counts
        assert (counts.misses, counts.hits) == (1, 199)
        rows.rename(key, "behind")
        with told(cluster) as events:
            async with cluster.reader() as session:
                assert (await session.get_many(Profile, [key, key]))[0].name == "Ana"
            async with cluster.reader() as session:
                post = await session.get(Post, rows.post(key))
                assert post is not None
                owner = await session.run_sync(lambda _: post.owner)
                assert owner.name == "Ana"
            assert sent(events) == 1, "the post"


@pytest.mark.anyio
async def test_a_busy_event_loop_costs_no_second_read_of_the_database(
    rows: Rows, topology: Topology, server: CacheServer
) -> None:
    """Each turn of the loop takes longer than a call to the cache may, and servers do not wait."""
    kind: Any = server.kind
    config = CacheConfig(backend=kind, nodes=(server.server,))
    warm, key = rows.insert(name="Eva"), rows.insert(name="Ana")
    loop = asyncio.get_running_loop()
    is_over = False

    async def work() -> None:
        while not is_over:
            until = loop.time() + 1.5 * config.timeout
            while loop.time() < until:
                pass
            await asyncio.sleep(0)

    async with AsyncCluster(topology, cache=config) as cluster:
        cache = cluster.cache
        assert cache is not None
        cache.backend.seconds = PATIENT  # type: ignore[attr-defined]
        async with cluster.reader() as session:
            await session.get_one(Profile, warm)
        cache.backend.seconds = config.timeout  # type: ignore[attr-defined]
        before, working = cache.counts, asyncio.create_task(work())
        try:
            with told(cluster) as events:
                for _ in range(2):
                    async with cluster.reader() as session:
                        assert (await session.get_one(Profile, key)).name == "Ana"
        finally:
            is_over = True
            await working
    assert sent(events) == 1
    after = cache.counts
    assert (after.unanswered, after.fills - before.fills) == (before.unanswered, 1)


GARBAGE = {
    "noise": b"\x00\x01garbage",
    "empty header": b"\xc1",
    "text": b"hello " * 100,
    "pickle": b"\x80\x04\x95",
    "large": b"x" * 900_000,
}


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_is_a_miss_counted_and_repaired(
    rows: Rows, server: CacheServer, open_cluster: Open, data: bytes
) -> None:
    cluster = open_cluster(server)
    key = rows.insert(name="Ana")
    server.put_garbage(key_of(cluster, key), data)
    for _ in range(2):
        with cluster.reader() as session:
            assert session.get_one(Profile, key).name == "Ana"
    counts = cache_of(cluster).counts
    assert (counts.garbage, counts.misses, counts.fills) == (1, 2, 1)
    with cluster.reader() as session:
        assert session.get_one(Profile, key).name == "Ana"
    assert cache_of(cluster).counts.hits == 1


def store(cluster: Cluster, name: str, version: int, payload: bytes) -> None:
    won = cache_of(cluster).run([Request(Op.LEASE, name, ttl=4.0)])[0]
    request = Request(Op.STORE, name, won.cas, Kind.VALUE, version, payload, 60.0)
    assert cache_of(cluster).run([request])[0].outcome is Outcome.DONE


def test_rows_of_another_shape_version_or_identity_are_garbage(
    rows: Rows, server: CacheServer, open_cluster: Open
) -> None:
    cluster = open_cluster(server)
    values = [1, "Eve", None, None, {}, 3]
    keys = [rows.insert(name="Ana") for _ in range(4)]
    good = plan().encode([keys[3], *values[1:]])
    other = plan().encode(values)
    assert good is not None
    assert other is not None
    stored = [(other, 3), (good[:-3], 3), (b"\xc0", 3), (good, 4)]
    for key, (payload, version) in zip(keys, stored, strict=True):
        store(cluster, key_of(cluster, key), version, payload)
    with cluster.reader() as session:
        assert [p.name for p in session.get_many(Profile, keys)] == ["Ana"] * 4
    counts = cache_of(cluster).counts
    assert (counts.garbage, counts.misses, counts.fills) == (4, 4, 0)
    with cluster.reader() as session:
        assert [p.name for p in session.get_many(Profile, keys)] == ["Ana"] * 4
    assert cache_of(cluster).counts.fills == 4


def test_programs_of_a_deploy_miss_what_the_others_stored(
    rows: Rows, server: CacheServer, open_cluster: Open
) -> None:
    class LaterBase(DeclarativeBase):
        pass

    class Later(Sharded, LaterBase):
        """The same table with a column fewer, and one of another type."""

        __tablename__ = "profiles"
        __cache_ttl__ = 300.0
        name: Mapped[str]
        mood: Mapped[str | None]

    cluster = open_cluster(server)
    key = rows.insert(name="old", mood="GOOD")
    for cls, mood in ((Profile, Mood.GOOD), (Later, "GOOD"), (Profile, Mood.GOOD), (Later, "GOOD")):
        with cluster.reader() as session:
            found: Any = session.get_one(cls, key)
            assert (found.name, found.mood) == ("old", mood)
    counts = cache_of(cluster).counts
    assert (counts.hits, counts.garbage) == (0, 2)  # one entry for both: neither misses a change


@contextmanager
def held_up(topology: Topology, shard: int) -> Iterator[None]:
    """Have every read of profiles on a logical shard wait."""
    owner = topology.physical[topology.shard_map.owner(shard)]
    with admin(owner) as connection, connection.transaction():
        connection.execute(
            f"LOCK TABLE {schema_name(shard)}.profiles IN ACCESS EXCLUSIVE MODE".encode()
        )
        yield


def is_held_up(topology: Topology, shard: int) -> bool:
    """Tell whether a statement waits for a lock."""
    with admin(topology.physical[topology.shard_map.owner(shard)]) as connection:
        found = connection.execute("SELECT FROM pg_locks WHERE NOT granted")
        return found.fetchone() is not None


def is_leased(cluster: Cluster, name: str) -> bool:
    answer = cache_of(cluster).run([Request(Op.READ, name)])[0]
    return answer.outcome is Outcome.FOUND and answer.kind is Kind.LEASE


def test_a_deadline_gives_the_lease_back(
    rows: Rows, topology: Topology, open_cluster: Open, cache_server: NewServer
) -> None:
    cluster = open_cluster(cache_server("memcached"))
    key = rows.insert(name="Ana")
    late = pytest.raises(DeadlineExceededError)
    with held_up(topology, 1), cluster.reader() as session, late, deadline(0.3):
        session.get(Profile, key)
    assert not is_leased(cluster, key_of(cluster, key))


@pytest.mark.anyio
async def test_a_task_that_is_cancelled_gives_the_lease_back(
    rows: Rows, topology: Topology, open_cluster: Open, cache_server: NewServer
) -> None:
    server = cache_server("memcached")
    sync = open_cluster(server)
    key = rows.insert(name="Ana")
    name = key_of(sync, key)
    config = CacheConfig(backend="memcached", nodes=(server.server,))
    async with AsyncCluster(topology, cache=config) as cluster:
        assert cluster.cache is not None
        cluster.cache.backend.seconds = PATIENT  # type: ignore[attr-defined]

        async def read() -> Profile | None:
            async with cluster.reader() as session:
                return await session.get(Profile, key)

        with held_up(topology, 1):
            task = asyncio.create_task(read())
            await asyncio.to_thread(
                wait_until, lambda: is_held_up(topology, 1), 20.0, "it reads the row"
            )
            assert is_leased(sync, name)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert not is_leased(sync, name)
        found = await read()
        assert found is not None


def test_a_row_that_is_too_large_is_read_and_not_stored(
    rows: Rows, server: CacheServer, open_cluster: Open
) -> None:
    cluster = open_cluster(server)
    key = rows.insert(name="x" * 1_100_000)
    for _ in range(2):
        with cluster.reader() as session:
            assert len(session.get_one(Profile, key).name) == 1_100_000
    counts = cache_of(cluster).counts
    assert (counts.misses, counts.fills, counts.hits) == (2, 0, 0)


def test_a_marker_sends_readers_to_the_primary_and_a_carried_value_is_shown(
    rows: Rows, server: CacheServer, open_cluster: Open
) -> None:
    cluster = open_cluster(server)
    cache = cache_of(cluster)
    key = rows.insert(name="old")
    name = key_of(cluster, key)
    version = rows.version(key)
    with cluster.reader() as session:
        session.get(Profile, key)
    rows.rename(key, "new")
    for replaces, shown in ((rows.version(key), None), (None, "new")):
        writer = Writer.begin(name, version + 10, None, replaces=replaces)
        while not writer.is_ready:
            request = writer.request
            assert request is not None
            writer = writer.advance(cache.run([request])[0])
        with cluster.reader() as session:
            found = session.get_one(Profile, key).name
            # The value that was cached carries the version of the row unless a trigger raised it.
            assert found == (shown or ("old" if rows.version(key) == version else "new"))
    assert cache.counts.waits > 0


@pytest.mark.parametrize("kind", ["memcached", "redis"])
def test_a_dead_cache_fails_no_request(
    rows: Rows, cache_server: NewServer, open_cluster: Open, settled: Settled, kind: str
) -> None:
    server = cache_server(kind)
    cluster = open_cluster(server)
    people = [rows.insert(shard, name=f"{shard}") for shard in SHARDS]
    post = rows.post(people[0])
    settled()
    with cluster.reader() as session:
        session.get_many(Profile, people)
    server.kill()
    for _ in range(12):
        with cluster.reader() as session:
            assert session.get_one(Profile, people[0]).name == "1"
            assert [p.name for p in session.get_many(Profile, people)] == [*map(str, SHARDS)]
            assert session.get_one(Post, post).owner.name == "1"
    backend: Any = cache_of(cluster).backend
    assert not backend.nodes.homes[0].breaker.is_closed, "it is left alone"
    assert cache_of(cluster).counts.unanswered > 0


def test_a_cache_that_hangs_holds_nobody_up(
    rows: Rows, cache_server: NewServer, topology: Topology, settled: Settled
) -> None:
    server = cache_server("memcached")
    config = CacheConfig(backend="memcached", nodes=(server.server,), timeout=0.02)
    key = rows.insert(name="Ana")
    settled()
    with Cluster(topology, cache=config) as cluster:
        with cluster.reader() as session:
            session.get(Profile, key)
        server.freeze()
        try:
            with told(cluster) as events:
                for _ in range(20):
                    with cluster.reader() as session:
                        assert session.get_one(Profile, key).name == "Ana"
            seconds = [read.seconds for read in reads(events)]
            assert len(seconds) == 20
            assert sorted(seconds)[10] < 0.02, "most are not even sent: the breaker is open"
        finally:
            server.thaw()


def test_a_primary_that_is_gone_leaves_the_replicas(
    rows: Rows,
    cache_server: NewServer,
    settled: Settled,
    monkeypatch: pytest.MonkeyPatch,
    open_cluster: Open,
) -> None:
    cluster = open_cluster(cache_server("memcached"))
    key = rows.insert(name="Ana")
    settled()

    def gone(_session: ReadSession) -> ReadSession:
        raise EndpointUnavailableError

    monkeypatch.setattr(ReadSession, "_new_on_primaries", gone)
    with cluster.reader() as session:
        assert session.get_one(Profile, key).name == "Ana"
        assert session.get_many(Profile, [key])[0].name == "Ana"
    answer = cache_of(cluster).run([Request(Op.READ, key_of(cluster, key))])[0]
    assert answer.outcome is Outcome.NOTHING, "the lease is given back"


def test_a_session_on_a_primary_needs_no_second_connection_for_misses(
    rows: Rows, cache_server: NewServer, topology: Topology
) -> None:
    server = cache_server("memcached")
    config = CacheConfig(backend="memcached", nodes=(server.server,))
    pool = PoolConfig(size=1, overflow=0, timeout=0.5)
    owner = rows.insert(name="owner")
    post = rows.post(owner, reviewer_id=rows.insert(2, name="reviewer"))
    with Cluster(one_server(topology), pool=pool, cache=config) as cluster:
        query = select(Post).where(Post.owner_id == owner)
        with cluster.reader() as session:
            found = session.scalars(query).one()
            assert found.id == post
            assert (found.owner.name, found.reviewer and found.reviewer.name) == (
                "owner",
                "reviewer",
            )
        keys = [rows.insert(shard) for shard in SHARDS]
        with cluster.reader() as session:
            for streamed in session.scalars(query.execution_options(yield_per=1)):
                assert streamed.id == post
            assert None not in session.get_many(Profile, keys)
        assert cache_of(cluster).counts.fills == 2 + len(SHARDS)


def test_clusters_and_generations_share_servers_without_sharing_rows(
    rows: Rows, server: CacheServer, open_cluster: Open
) -> None:
    key = rows.insert(name="old")
    first = open_cluster(server)
    with first.reader() as session:
        session.get(Profile, key)
    rows.rename(key, "new")
    second = open_cluster(server, generation=2)
    with second.reader() as session:
        assert session.get_one(Profile, key).name == "new"
    with first.reader() as session:
        assert session.get_one(Profile, key).name == "old"


def test_a_key_has_one_name_however_it_is_given(
    rows: Rows, open_cluster: Open, cache_server: NewServer
) -> None:
    cluster = open_cluster(cache_server("memcached"))
    key = rows.insert(name="Ana")
    with told(cluster) as events:
        for given in (key, (key,), [key], {"id": key}):
            with cluster.reader() as session:
                assert session.get_one(Profile, given).name == "Ana"
        assert sent(events) == 1
        assert len(reads(events)) == 4


def test_the_memory_backend_is_one_for_all_clusters_of_the_process(
    rows: Rows, topology: Topology
) -> None:
    config = CacheConfig(backend="memory")
    key = rows.insert(name="old")
    with Cluster(topology, cache=config) as one, Cluster(topology, cache=config) as two:
        with one.reader() as session:
            session.get(Profile, key)
        rows.rename(key, "new")
        with two.reader() as session:
            assert session.get_one(Profile, key).name == "old"


def test_status_shows_every_cache_and_what_it_had(
    rows: Rows,
    server: CacheServer,
    cache_server: NewServer,
    cluster_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    open_cluster: Open,
) -> None:
    gone = cache_server(server.kind)
    cluster = open_cluster(server)
    key = rows.insert()
    for _ in range(3):
        with cluster.reader() as session:
            session.get(Profile, key)
    gone.kill()
    text = f'[cache]\nbackend = "{server.kind}"\nnodes = ["{server.server}"]\n'
    file = tmp_path / "shardkit.toml"
    text = f'{cluster_file.read_text("utf-8")}\n{text}gutter = ["{gone.server}"]\n'
    file.write_text(text, "utf-8")
    file.chmod(0o600)
    with pytest.raises(SystemExit) as caught:
        main(["status", "--json", "--config", str(file)])
    assert caught.value.code == 0, "nobody needs a cache"
    document = json.loads(capsys.readouterr().out)
    first, second = document["cache"]
    assert (first["server"], first["backend"]) == (server.address, server.kind)
    assert first["is_reachable"]
    assert first["entries"] >= 1
    assert first["reads"] >= 3
    assert (second["server"], second["is_gutter"]) == (gone.address, True)
    assert not second["is_reachable"]
    assert second["error"]
    assert document["healthy"]
    with pytest.raises(SystemExit):
        main(["status", "--config", str(file)])
    assert server.address in capsys.readouterr().out
