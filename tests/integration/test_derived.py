"""Cached lists and counts on a real Memcached: never older than what was acknowledged."""

from __future__ import annotations

import itertools
import logging
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
from sqlalchemy import delete, insert, select, text, update

from shardkit import AsyncCluster, Cluster, ids
from shardkit.caching.operations import Kind, Op, Outcome, Request
from shardkit.config import CacheConfig, PoolConfig
from shardkit.derived import Cached, Derived
from shardkit.derivedplan import derived_plan
from shardkit.errors import InvalidShardKeyError
from shardkit.events import CacheRead, Event, StatementRouted
from shardkit.ops import cachetriggers
from shardkit.relay import Relay
from shardkit.testing import wait_until
from shardkit.tokens import ASK_PRIMARIES
from shardkit.topology import Topology, schema_name
from tests.fixtures.caches import CacheServer, NewServer
from tests.fixtures.sharded import admin
from tests.models import Base, Play, Track, best, n_plays, n_tracks, newest, players

pytestmark = pytest.mark.integration

PATIENT = 2.0
"""Deadline of the cache in tests that are not about it: the machine may be busy."""

SEQUENCE = itertools.count(1)
Open = Callable[[], Cluster]


def new_owner(shard: int = 3) -> int:
    return ids.compose(2, shard, next(SEQUENCE))


@pytest.fixture(params=["memcached"])
def server(request: pytest.FixtureRequest, cache_server: NewServer) -> CacheServer:
    return cache_server(request.param)


def config_of(server: CacheServer) -> CacheConfig:
    kind: Any = server.kind
    return CacheConfig(backend=kind, nodes=(server.server,))


def patient(cluster: Any) -> None:
    cluster.cache.backend.seconds = PATIENT


@pytest.fixture
def opened(topology: Topology, server: CacheServer) -> Iterator[Open]:
    """Open clusters, each as another process would."""
    with ExitStack() as stack:

        def start() -> Cluster:
            pool = PoolConfig(size=8, overflow=8, timeout=20.0)
            cluster = stack.enter_context(Cluster(topology, pool=pool, cache=config_of(server)))
            patient(cluster)
            return cluster

        yield start


@pytest.fixture
def here(opened: Open) -> Cluster:
    """Who writes."""
    return opened()


@pytest.fixture
def there(opened: Open) -> Cluster:
    """Who reads, and knows nothing of what was written here."""
    return opened()


def read(cluster: Cluster, derived: Derived[Any], key: Any) -> Any:
    with cluster.reader() as session:
        return session.cached(derived, key)


def stored(cluster: Cluster, derived: Derived[Any], key: Any) -> Any:
    """What the primary has."""
    with cluster.reader(after=ASK_PRIMARIES) as session:
        return session.cached(derived, key)


def add(cluster: Cluster, owner: int, **values: Any) -> int:
    with cluster.writer() as session:
        track = Track(owner_id=owner, **values)
        session.add(track)
        session.commit()
    return track.id


def entry(cluster: Cluster, derived: Derived[Any], *key: int) -> Any:
    """What the server has of a list."""
    assert cluster.cache is not None
    name = cluster.cache.key(derived_plan(derived), ids.shard_of(key[0]), key)
    (answer,) = cluster.cache.run([Request(Op.READ, name)])
    assert answer.outcome is not Outcome.UNKNOWN
    return answer


class Noted:
    """What sessions of a cluster have asked of databases and of the cache."""

    def __init__(self, cluster: Cluster) -> None:
        self.statements = 0
        self.reads: list[CacheRead] = []
        cluster.listen(self._note)

    def _note(self, event: Event) -> None:
        if isinstance(event, StatementRouted):
            self.statements += 1
        elif isinstance(event, CacheRead):
            self.reads.append(event)


def test_what_was_read_once_is_not_read_again(here: Cluster, there: Cluster) -> None:
    owner = new_owner()
    tracks = [add(here, owner, title=f"t{n}", album=7, rank=n) for n in range(6)]
    for user in (5, 9):
        with here.writer() as session:
            session.add(Play(track_id=tracks[0], user_id=user))
            session.commit()
    wanted: list[tuple[Derived[Any], Any, Any]] = [
        (newest, owner, tracks[:0:-1]),
        (best, (owner, 7), ["t5", "t4", "t3"]),
        (n_tracks, owner, 6),
        (n_plays, tracks[0], 2),
        (n_plays, tracks[1], 0),
        (players, tracks[0], [5, 9]),
        (players, tracks[1], []),
    ]
    assert [read(there, derived, key) for derived, key, _ in wanted] == [w for _, _, w in wanted]
    noted = Noted(there)
    assert [read(there, derived, key) for derived, key, _ in wanted] == [w for _, _, w in wanted]
    assert noted.statements == 0
    assert [event.hits for event in noted.reads] == [1] * len(wanted)
    assert noted.reads[0].subject == "CachedList(tracks.owner_id)"
    with there.reader() as session:  # ids of a list make objects, without the database too
        session.get_many(Track, session.cached(newest, owner))
        found = session.get_many(Track, session.cached(newest, owner))
    assert [track.title for track in found] == ["t5", "t4", "t3", "t2", "t1"]


def test_many_are_one_round_trip_and_one_statement_for_each_server(
    here: Cluster, there: Cluster
) -> None:
    owners = [new_owner(shard) for shard in (1, 2, 2, 40, 41, 41)]
    tracks = {owner: add(here, owner) for owner in owners[1:]}
    counts = {owner: int(owner in tracks) for owner in owners}
    lists = {owner: [tracks[owner]] if owner in tracks else [] for owner in owners}
    noted = Noted(there)
    for _ in range(2):
        with there.reader() as session:
            assert session.cached_many(n_tracks, owners) == counts
            assert session.cached_many(newest, owners) == lists
            assert session.cached_many(newest, []) == {}
    assert noted.statements == 4  # on two servers, once
    assert [event.hits for event in noted.reads] == [0, 0, 6, 6]
    with there.reader(after=ASK_PRIMARIES) as session:  # without the cache it says the same
        assert session.cached_many(n_tracks, owners) == counts
        assert session.cached_many(newest, owners[:2]) == {o: lists[o] for o in owners[:2]}
        as_tuples = {(owner,): n for owner, n in counts.items()}
        assert session.cached_many(n_tracks, as_tuples) == as_tuples


def test_several_lists_and_counts_are_one_round_trip(here: Cluster, there: Cluster) -> None:
    owners = [new_owner(shard) for shard in (1, 2, 41)]
    tracks = {owner: add(here, owner) for owner in owners[1:]}
    counts = {owner: int(owner in tracks) for owner in owners}
    lists = {owner: [tracks[owner]] if owner in tracks else [] for owner in owners}
    noted = Noted(there)
    assert there.cache is not None
    trips: list[int] = []
    run = there.cache.backend.run

    def counted(requests: Any, **options: Any) -> Any:
        trips.append(len(requests))
        return run(requests, **options)

    wanted = {n_tracks: owners, newest: owners[:2]}
    expected = {n_tracks: counts, newest: {owner: lists[owner] for owner in owners[:2]}}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(there.cache.backend, "run", counted)
        for _ in range(2):
            with there.reader() as session:
                assert session.cached_together(wanted) == expected
                assert session.cached_together({newest: [], n_tracks: []}) == {
                    newest: {},
                    n_tracks: {},
                }
    assert trips[0] == 5
    assert trips[-1] == 5, "the second time that was all"
    assert [event.hits for event in noted.reads] == [0, 0, 3, 2]
    with there.reader(after=ASK_PRIMARIES) as session:  # without the cache it says the same
        assert session.cached_together(wanted) == expected


def test_when_one_of_several_lists_cannot_be_read_nobody_waits_for_the_others(
    here: Cluster, there: Cluster
) -> None:
    owner = new_owner(2)
    track = add(here, owner)
    with there.reader() as session, pytest.MonkeyPatch.context() as patched:

        def failing(shards: Any) -> Any:
            raise RuntimeError(f"{shards} are not read")

        patched.setattr(session, "_primaries", failing)
        with pytest.raises(RuntimeError):
            session.cached_together({n_tracks: [owner], newest: [owner]})
    noted = Noted(there)
    with there.reader() as session:
        assert session.cached_together({n_tracks: [owner], newest: [owner]}) == {
            n_tracks: {owner: 1},
            newest: {owner: [track]},
        }
    assert sum(event.waits for event in noted.reads) == 0


def _insert(session: Any, owner: int, _: int) -> None:
    session.add(Track(owner_id=owner, album=1, rank=50, title="new"))


def _rank(session: Any, _: int, track: int) -> None:
    session.get(Track, track).rank = 99


def _move(session: Any, _: int, track: int) -> None:
    session.get(Track, track).album = 2


def _delete(session: Any, _: int, track: int) -> None:
    session.delete(session.get(Track, track))


def _by_statement(make: Callable[[int, int], Any]) -> Any:
    def run(session: Any, owner: int, track: int) -> None:
        session.execute(make(owner, track))

    return run


def _by_text(sql: str) -> Any:
    def run(session: Any, owner: int, track: int) -> None:
        shard = ids.shard_of(owner)
        session.execute(
            text(sql.format(schema_name(shard))),
            {"owner": owner, "track": track},
            bind_arguments={"logical_shard": shard},
        )

    return run


def _in_savepoint(session: Any, owner: int, track: int) -> None:
    _move(session, owner, track)
    session.flush()
    with session.begin_nested() as savepoint:
        session.add(Track(owner_id=owner, album=1))
        session.flush()
        savepoint.rollback()


CHANGES = {
    "insert": _insert,
    "update": _rank,
    "move": _move,
    "delete": _delete,
    "savepoint": _in_savepoint,
    "insert statement": _by_statement(
        lambda owner, _: insert(Track).values(owner_id=owner, album=1, title="")
    ),
    "update statement": _by_statement(
        lambda owner, _: update(Track).where(Track.owner_id == owner).values(album=2, rank=1)
    ),
    "delete statement": _by_statement(
        lambda owner, _: delete(Track).where(Track.owner_id == owner, Track.album == 1)
    ),
    "text": _by_text("UPDATE {}.tracks SET album = 2 WHERE id = :track"),
    "text, to another owner": _by_text(
        "UPDATE {}.tracks SET owner_id = owner_id + 1 WHERE id = :track"
    ),
}


def everything(owner: int, track: int) -> list[tuple[Derived[Any], Any]]:
    lists: list[tuple[Derived[Any], Any]] = [(best, (o, a)) for o in (owner, owner + 1)
                                             for a in (1, 2)]  # fmt: skip
    counts = [(d, o) for d in (newest, n_tracks) for o in (owner, owner + 1)]
    return [*lists, *counts, (n_plays, track), (players, track)]


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_is_seen_when_it_is_acknowledged(
    here: Cluster, there: Cluster, change: Any
) -> None:
    owner = new_owner()
    next(SEQUENCE)  # the owner after it is nobody else
    tracks = [add(here, owner, album=1, rank=n, title=f"t{n}") for n in range(2)]
    with here.writer() as session:
        session.add(Play(track_id=tracks[0], user_id=1))
        session.commit()
    asked = everything(owner, tracks[0])
    before = [read(there, *each) for each in asked]
    with here.writer() as session:
        change(session, owner, tracks[0])
        session.commit()
    after = [read(there, *each) for each in asked]
    assert after == [stored(there, *each) for each in asked]
    assert after != before
    assert [read(here, *each) for each in asked] == after  # and who wrote sees it, too


def test_what_a_list_does_not_depend_on_leaves_it_alone(here: Cluster, there: Cluster) -> None:
    owner = new_owner()
    track = add(here, owner)
    read(there, newest, owner)
    before = entry(there, newest, owner)
    assert before.kind is Kind.VALUE
    with here.writer() as session:
        session.get_one(Track, track).title = "renamed"
        session.commit()
    with here.writer() as session:
        session.execute(update(Track).where(Track.owner_id == owner).values(title="again"))
        session.commit()
    Relay(here).drain()
    assert entry(there, newest, owner) == before  # nobody has touched it


def test_a_rollback_leaves_nothing(here: Cluster, there: Cluster) -> None:
    owner = new_owner()
    assert read(there, newest, owner) == []
    with here.writer() as session:
        session.add(Track(owner_id=owner))
        session.flush()
        assert len(session.cached(newest, owner)) == 1  # a writer sees what it has written
        session.rollback()
    assert read(there, newest, owner) == []
    assert entry(there, newest, owner).kind is Kind.VALUE


def test_what_psql_changes_is_repaired_by_the_relay(
    topology: Topology, here: Cluster, there: Cluster
) -> None:
    owner = new_owner()
    track = add(here, owner)
    assert read(there, newest, owner) == [track]
    schema = schema_name(ids.shard_of(owner))
    physical = topology.physical[topology.shard_map.owner(ids.shard_of(owner))]
    with admin(physical) as connection:
        connection.execute(f"DELETE FROM {schema}.tracks WHERE id = {track}".encode())
    Relay(here).drain()
    assert read(there, newest, owner) == []
    assert read(there, n_tracks, owner) == 0


def test_a_cascade_counts(here: Cluster, there: Cluster) -> None:
    owner = new_owner()
    track = add(here, owner)
    with here.writer() as session:
        session.add(Play(track_id=track, user_id=1))
        session.commit()
    assert (read(there, n_plays, track), read(there, players, track)) == (1, [1])
    with here.writer() as session:
        session.delete(session.get(Track, track))
        session.commit()
    assert (read(there, n_plays, track), read(there, players, track)) == (0, [])


def test_an_atomic_commit_over_two_servers(here: Cluster, there: Cluster) -> None:
    owners = [new_owner(1), new_owner(40)]
    assert here.topology.shard_map.owner(1) != here.topology.shard_map.owner(40)
    for owner in owners:
        assert read(there, newest, owner) == []
    with here.writer(atomic=True) as session:
        tracks = [Track(owner_id=owner) for owner in owners]
        session.add_all(tracks)
        session.commit()
    found = [read(there, newest, owner) for owner in owners]
    assert found == [[track.id] for track in tracks]


@pytest.mark.anyio
async def test_async_sessions(topology: Topology, server: CacheServer) -> None:
    owner = new_owner()
    async with AsyncCluster(topology, cache=config_of(server)) as cluster:
        patient(cluster)
        async with cluster.writer() as session:
            track = Track(owner_id=owner)
            session.add(track)
            await session.commit()
        for _ in range(2):
            async with cluster.reader() as session:
                assert await session.cached(newest, owner) == [track.id]
                assert await session.cached_many(n_tracks, [owner]) == {owner: 1}
        assert cluster.cache is not None
        assert cluster.cache.counts.hits == 2


def test_one_of_many_readers_asks_the_database(here: Cluster, there: Cluster) -> None:
    owner = new_owner()
    track = add(here, owner)
    noted = Noted(there)
    together = threading.Barrier(12)

    def ask(_: int) -> Any:
        together.wait(20)
        return read(there, newest, owner)

    with ThreadPoolExecutor(12) as threads:
        assert list(threads.map(ask, range(12))) == [[track]] * 12
    assert noted.statements == 1


def test_a_cache_that_dies_makes_nothing_old_and_fails_nothing(
    server: CacheServer, here: Cluster, there: Cluster
) -> None:
    owner = new_owner()
    first = add(here, owner)
    assert read(there, newest, owner) == [first]
    server.freeze()  # it keeps what it has
    here.cache.backend.seconds = 0.05  # type: ignore[union-attr]
    second = add(here, owner)
    assert stored(there, newest, owner) == [second, first]
    server.thaw()
    assert read(here, newest, owner) == [second, first]  # one's own writes, whatever it shows
    Relay(here).drain()
    wait_until(lambda: read(there, newest, owner) == [second, first], 30, "it is repaired")
    server.kill()
    assert read(there, n_tracks, owner) == 2
    add(here, owner)
    assert stored(there, n_tracks, owner) == 3


def test_without_triggers_nothing_is_cached(
    topology: Topology, here: Cluster, there: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    owner = new_owner()
    shard = ids.shard_of(owner)
    schema, number = schema_name(shard), newest.watch.number
    physical = topology.physical[topology.shard_map.owner(shard)]
    cached = Cached.of(Base.metadata)
    with admin(physical) as connection:
        for moment in ("inserted", "updated", "deleted"):
            name = f"shardkit_derived_{number}_{moment}"
            connection.execute(f"DROP TRIGGER {name} ON {schema}.tracks".encode())
        try:
            with caplog.at_level(logging.WARNING):
                assert read(there, newest, owner) == []
            track = add(here, owner)
            assert read(there, newest, owner) == [track]
            assert entry(there, newest, owner).outcome is Outcome.NOTHING
        finally:
            cachetriggers.complete(
                connection, [shard], cached.tables, cached.watches, lock_timeout=5.0, attempts=5
            )
    assert "migrate apply" in caplog.text
    assert read(there, newest, owner) == [track]
    assert entry(there, newest, owner).kind is Kind.VALUE
    later = add(here, owner)
    assert read(there, newest, owner) == [later, track]


def test_strange_keys_are_left_to_the_database(here: Cluster) -> None:
    owner = new_owner()
    add(here, owner)
    with here.reader() as session:
        assert session.cached(best, (owner, None)) == [""]  # has no entry, but rows
        assert session.cached(best, (owner, 2**62)) == []
        with pytest.raises(InvalidShardKeyError, match="2 values, not 1"):
            session.cached(best, owner)
        with pytest.raises(InvalidShardKeyError):
            session.cached(n_tracks, True)


class Writer:
    """Changes tracks at random, and looks at once whether others are shown it.

    Shared lists are changed by several of these at a time.
    """

    def __init__(self, here: Cluster, there: Cluster, owners: list[int], seed: int) -> None:
        self._here, self._there = here, there
        self._owners = owners
        self._chance = random.Random(seed)
        self._mine: dict[int, tuple[int, int]] = {}

    def round(self) -> None:
        kind = self._chance.choice(["insert", "insert", "delete", "move", "bulk", "rollback"])
        if kind in {"insert", "rollback"} or not self._mine:
            self._add(is_kept=kind != "rollback")
            return
        track, (owner, album) = self._chance.choice(list(self._mine.items()))
        with self._here.writer() as session:
            if kind == "delete":
                session.delete(session.get(Track, track))
            elif kind == "move":
                session.get_one(Track, track).album = 3 - album
            else:
                statement = update(Track).where(Track.owner_id == owner, Track.id == track)
                session.execute(statement.values(album=3 - album))
            session.commit()
        if kind == "delete":
            del self._mine[track]
            assert track not in read(self._there, newest, owner)
        else:
            self._mine[track] = (owner, 3 - album)
            assert f"{track}" not in read(self._there, best, (owner, album))

    def _add(self, *, is_kept: bool) -> None:
        owner, album = self._chance.choice(self._owners), self._chance.choice([1, 2])
        track = Track(owner_id=owner, album=album, rank=self._chance.randrange(9))
        with self._here.writer() as session:
            session.add(track)
            session.flush()
            key = track.id
            track.title = f"{key}"
            if not is_kept:
                session.rollback()
                return
            session.commit()
        self._mine[key] = (owner, album)
        shown = read(self._there, newest, owner)
        assert key in shown or (len(shown) == 5 and min(shown) > key)


def test_lists_are_what_the_database_has(opened: Open) -> None:
    """Several sessions at a time change the same lists, others read them all the time."""
    clusters = [opened() for _ in range(3)]
    owners = [new_owner(3), new_owner(40)]
    writers = [Writer(clusters[n], clusters[(n + 1) % 3], owners, n) for n in range(3)]
    asked: list[tuple[Derived[Any], Any]] = [(d, o) for d in (newest, n_tracks) for o in owners]
    asked += [(best, (o, a)) for o in owners for a in (1, 2)]
    over = threading.Event()

    def look(cluster: Cluster) -> int:
        n = 0
        while not over.is_set():
            for each in asked:
                read(cluster, *each)
                n += 1
        return n

    with ThreadPoolExecutor(4) as threads:
        looking = threads.submit(look, clusters[0])
        try:
            for _ in range(20):
                for done in [threads.submit(writer.round) for writer in writers]:
                    done.result(60)
                for derived, key in asked:  # nobody writes: lists are exactly what is stored
                    wanted = stored(clusters[1], derived, key)
                    assert [read(c, derived, key) for c in clusters] == [wanted] * 3
        finally:
            over.set()
        assert looking.result(60) > 0
    counts = clusters[0].cache.counts  # type: ignore[union-attr]
    assert counts.hits > 0
    assert counts.fills > 0
    with clusters[0].reader(after=ASK_PRIMARIES) as session:
        assert session.scalars(select(Track.id).where(Track.owner_id == owners[0])).all()
