"""Who takes part in `cachechaos`: writers that are killed, readers that check, the relay.

They run the production machines and the Memcached backend. Beside each of our entries stands one of
plain cache-aside, of the same row, in the same servers, written in the same transaction, under
the same kills: readers SET what they loaded, writers delete after COMMIT.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import psycopg
import redis
from pymemcache.client.base import Client
from pymemcache.exceptions import MemcacheError

from shardkit.cache import MARKER_LIFE, Lives, Patience, Reader, Repair, Source, Writer
from shardkit.caches.backend import Place
from shardkit.caches.memcached import Memcached, split_address
from shardkit.caches.ring import Ring
from shardkit.caches.serving import RELAY_OPTIONS
from shardkit.caching.rows import decode_row, encode_row
from shardkit.errors import ShardkitError

__all__ = [
    "CHECKED",
    "TABLES",
    "Aside",
    "AsideRedis",
    "Shared",
    "in_children",
    "read",
    "relay",
    "write",
]

TABLES: Final = (
    "CREATE TABLE chaos_rows (id bigint PRIMARY KEY, version bigint NOT NULL, body text NOT NULL)",
    "CREATE TABLE chaos_outbox (id bigserial PRIMARY KEY, row_id bigint, version bigint)",
    "CREATE SEQUENCE chaos_versions",
)
CHANGE: Final = (  # row locks, in the order of the ids
    "WITH locked AS (SELECT id FROM chaos_rows WHERE id = ANY(%s) ORDER BY id FOR UPDATE)"
    " UPDATE chaos_rows AS r SET version = nextval('chaos_versions'),"
    " body = repeat('x', 100 + (random() * 1500)::int) FROM locked WHERE r.id = locked.id"
    " RETURNING r.id, r.version, r.body"
)
ANNOUNCE: Final = "INSERT INTO chaos_outbox (row_id, version) SELECT * FROM unnest(%s, %s)"
LOAD: Final = "SELECT id, version, body FROM chaos_rows WHERE id = ANY(%s)"

ASIDE_ERRORS: Final = (OSError, MemcacheError, redis.RedisError)
LIVES: Final = Lives(value=3600.0)  # whatever is not repaired stays for an hour
PATIENCE: Final = Patience(markers=1, leases=2)
BATCH: Final = 100
KILLED_AFTER_COMMIT: Final = 0.02
ASIDE_EVERY: Final = 8
"""One batch of so many is read by cache-aside."""

CHECKED: Final = (
    "checked",
    "late",
    "returning",
    "older",
    "mixed",
    "loaded",
    "aside",
    "aside_late",
    "written",
)
"""Counters: reads that a cache answered; of these, those shown something older than what was
committed the bound before they began; the same, by a server that had been gone and was back for
less than the bound; than what was acknowledged before; another row's; rows read
from the database; the first two of cache-aside; writes acknowledged."""


@dataclass(frozen=True)
class Shared:
    """What the processes have in common.

    Attributes:
        dsn: of the database.
        servers: Memcached servers.
        gutter: of them.
        n_rows: ids 0 to this.
        floors: version of each row that was committed the bound ago.
        returned: of each server, when it was last reachable again; infinite while it is not.
        acknowledged: highest version of each row whose writer was told.
        counters: `CHECKED`, for each process.
        stop: set at the end.
        bound: seconds after a commit from which nothing older may be shown.
        seed: of what is drawn.
    """

    dsn: str
    servers: tuple[str, ...]
    gutter: tuple[str, ...]
    n_rows: int
    floors: Any
    returned: Any
    acknowledged: Any
    counters: Any
    stop: Any
    bound: float
    seed: int

    def cache(self, **more: Any) -> Memcached:
        """Return a backend of one's own."""
        return Memcached(self.servers, gutter=self.gutter, **more)

    def count(self, process: int, name: str, n: int = 1) -> None:
        """Add to a counter."""
        self.counters[process * len(CHECKED) + CHECKED.index(name)] += n


def key_of(row: int) -> str:
    return f"1:1:42:chaos:{row}:0123456789ab"


def drive(cache: Memcached, machines: Sequence[Any], place: Place = Place.USUAL) -> list[Any]:
    """Ask for all until none has anything left to ask."""
    now = list(machines)
    while at := [n for n, machine in enumerate(now) if machine.request is not None]:
        answers = cache.run([now[n].request for n in at], place=place)
        for n, answer in zip(at, answers, strict=True):
            now[n] = now[n].advance(answer)
        if pause := max((getattr(now[n], "pause", 0.0) for n in at), default=0.0):
            time.sleep(random.uniform(0, pause))
    return now


# -- writers


def write(shared: Shared, process: int) -> None:
    """Write until the end, in children that are killed again and again."""
    in_children(shared, process, _writes)


def in_children(shared: Any, process: int, work: Callable[[Any, int, random.Random], None]) -> None:
    """Do some work in one child after the other; each is killed where it stands."""
    number = 0
    while not shared.stop.is_set():
        number += 1
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends a process where it stands
            seed = shared.seed * 1_000_003 + process * 10_007 + number
            rng = random.Random(seed)
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.3, 3.0))
            with suppress(psycopg.Error, ShardkitError):
                work(shared, process, rng)
            os._exit(0)
        os.waitpid(child, 0)


def _writes(shared: Shared, process: int, rng: random.Random) -> None:
    cache, aside = shared.cache(), Aside(shared.servers)
    with psycopg.connect(shared.dsn) as database:
        while not shared.stop.is_set():
            ids = rng.sample(range(shared.n_rows), rng.choice((1, 1, 1, 3)))
            changed = database.execute(CHANGE, [ids]).fetchall()
            database.execute(ANNOUNCE, [[r[0] for r in changed], [r[1] for r in changed]])
            machines = [
                Writer.begin(key_of(row), version, encode_row((row, version, body)), lives=LIVES)
                for row, version, body in changed
            ]
            began = time.monotonic()
            machines = drive(cache, machines)
            rolls_back = rng.random() < 0.03 or time.monotonic() - began > MARKER_LIFE / 4
            if rolls_back:
                database.rollback()
                drive(cache, [machine.rolled_back() for machine in machines])
                continue
            database.commit()
            if rng.random() < KILLED_AFTER_COMMIT:
                os.kill(os.getpid(), signal.SIGKILL)
            drive(cache, [machine.committed() for machine in machines])
            for row, version, _ in changed:
                aside.forget(row)
                shared.acknowledged[row] = max(version, shared.acknowledged[row])
            shared.count(process, "written", len(changed))


# -- readers


def read(shared: Shared, process: int) -> None:
    """Read and check until the end."""
    rng = random.Random(shared.seed * 7 + process)
    cache, aside, homes = shared.cache(), Aside(shared.servers), Ring(shared.servers)
    n = 0
    with psycopg.connect(shared.dsn, autocommit=True) as database:

        def load(rows: list[int]) -> Iterable[tuple[int, int, str]]:
            return database.execute(LOAD, [rows])

        while not shared.stop.is_set():
            n += 1
            ids = rng.sample(range(shared.n_rows), BATCH)
            began, returned = time.monotonic(), list(shared.returned)
            floors = [shared.floors[row] for row in ids]
            told = [shared.acknowledged[row] for row in ids]
            if n % ASIDE_EVERY == 0:
                late = [v < floor for v, floor in zip(aside.read(ids, load), floors, strict=True)]
                shared.count(process, "aside", len(late))
                shared.count(process, "aside_late", sum(late))
                continue
            machines = [Reader(key_of(row), lives=LIVES, patience=PATIENCE) for row in ids]
            machines = _loaded(cache, drive(cache, machines), ids, database)
            shared.count(process, "loaded", sum(m.source is Source.DATABASE for m in machines))
            servers = {n for n, at in enumerate(returned) if began < at + shared.bound}
            checked = late_ones = returning = older = mixed = 0
            for row, machine, floor, acknowledged in zip(ids, machines, floors, told, strict=True):
                if machine.source is not Source.CACHE:
                    continue
                values = decode_row(machine.payload, 3)
                checked += 1
                mixed += values is None or values[:2] != [row, machine.version]
                if machine.version < floor:
                    is_back = homes.owner(machine.key) in servers
                    late_ones, returning = late_ones + (not is_back), returning + is_back
                older += machine.version < acknowledged
            for name, count in (
                ("checked", checked), ("late", late_ones), ("returning", returning),
                ("older", older), ("mixed", mixed),
            ):  # fmt: skip
                shared.count(process, name, count)


def _loaded(
    cache: Memcached, machines: list[Any], ids: Sequence[int], database: psycopg.Connection[Any]
) -> list[Any]:
    """Have machines load what they have to, in one statement that starts after their leases."""
    if not (at := [n for n, machine in enumerate(machines) if machine.must_load]):
        return machines
    rows = {row[0]: row for row in database.execute(LOAD, [[ids[n] for n in at]])}
    for n in at:
        row = rows[ids[n]]
        machines[n] = machines[n].loaded(row[1], encode_row(row))
    return drive(cache, machines)


Loader = Callable[[list[int]], Iterable[tuple[int, int, str]]]
"""Returns number, version and body of rows, by number."""


class Aside:
    """Plain cache-aside, as nearly everybody has it; in Memcached."""

    def __init__(self, servers: Sequence[str]) -> None:
        self._ring = Ring(servers)
        self._clients = [self.client(name) for name in servers]

    def forget(self, row: int) -> None:
        """Remove a row that was written."""
        with suppress(*ASIDE_ERRORS):
            self.delete(self._clients[self._ring.owner(f"aside:{row}")], f"aside:{row}")

    def read(self, rows: Sequence[int], load: Loader) -> list[int]:
        """Return the versions that are shown."""
        found: dict[int, int] = {}
        by_client: dict[int, list[str]] = {}
        for row in rows:
            by_client.setdefault(self._ring.owner(f"aside:{row}"), []).append(f"aside:{row}")
        for client, keys in by_client.items():
            with suppress(*ASIDE_ERRORS):
                answer = self.get(self._clients[client], keys)
                found |= {int(k.split(":")[1]): int(v.split(b" ")[0]) for k, v in answer.items()}
        if missing := [row for row in rows if row not in found]:
            loaded: dict[int, dict[str, str]] = {}
            for row, version, body in load(missing):
                value = {f"aside:{row}": f"{version} {body}"}
                loaded.setdefault(self._ring.owner(f"aside:{row}"), {}).update(value)
                found[row] = version
            for client, values in loaded.items():
                with suppress(*ASIDE_ERRORS):
                    self.set(self._clients[client], values)
        return [found[row] for row in rows]

    def client(self, name: str) -> Any:
        """Return a connection to a server."""
        options = {"timeout": 0.2, "connect_timeout": 0.2, "no_delay": True}
        return Client(split_address(name), **options)

    def get(self, client: Any, keys: list[str]) -> dict[str, bytes]:
        """Return what is there."""
        found: dict[str, bytes] = client.get_many(keys)
        return found

    def set(self, client: Any, values: dict[str, str]) -> None:
        """Store for an hour."""
        client.set_many(values, 3600, noreply=False)

    def delete(self, client: Any, key: str) -> None:
        """Remove an entry."""
        client.delete(key, noreply=False)


class AsideRedis(Aside):
    """The same in Redis."""

    def client(self, name: str) -> Any:
        """Return a connection to a server."""
        return redis.Redis.from_url(name, socket_timeout=0.2, socket_connect_timeout=0.2)

    def get(self, client: Any, keys: list[str]) -> dict[str, bytes]:
        """Return what is there."""
        both = zip(keys, client.mget(keys), strict=True)
        return {key: value for key, value in both if value is not None}

    def set(self, client: Any, values: dict[str, str]) -> None:
        """Store for an hour."""
        with client.pipeline(transaction=False) as pipeline:
            for key, value in values.items():
                pipeline.set(key, value, ex=3600)
            pipeline.execute()

    def delete(self, client: Any, key: str) -> None:
        """Remove an entry."""
        client.delete(key)


# -- the relay


def relay(shared: Shared, _: int) -> None:
    """Repair every change that was committed, on its server and in the gutter."""
    cache = shared.cache(**RELAY_OPTIONS)
    with psycopg.connect(shared.dsn, autocommit=True) as database:
        while not shared.stop.is_set():
            rows = database.execute(
                "SELECT id, row_id, version FROM chaos_outbox ORDER BY id LIMIT 2000"
            ).fetchall()
            versions: dict[int, int] = {}
            for _id, row, version in rows:
                versions[row] = max(version, versions.get(row, 0))
            repairs = [Repair(key_of(row), version) for row, version in versions.items()]
            home = drive(cache, repairs, Place.HOME)
            gutter = drive(cache, repairs, Place.GUTTER) if shared.gutter else home
            pairs = zip(versions, home, gutter, strict=True)
            clean = {row for row, at_home, there in pairs if at_home.is_clean and there.is_clean}
            done = [event for event, row, _version in rows if row in clean]
            if done:
                database.execute("DELETE FROM chaos_outbox WHERE id = ANY(%s)", [done])
            shared.stop.wait(0.05 if len(done) == len(rows) else 0.1)
