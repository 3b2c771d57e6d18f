"""The same roles as `cacheroles`, played by real sessions: in Memcached and in Redis.

Writers change objects, and now and then send a statement; readers read many at once; the relay is
`shardkit.relay.Relay`. Writers are killed at any moment, and on purpose where the answer to COMMIT
is there and nothing has been stored.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psycopg
from sqlalchemy import update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped

from benchmarks.cacheroles import (
    ASIDE_EVERY,
    CHECKED,
    Aside,
    AsideRedis,
    in_children,
)
from shardkit import Cluster, Sharded, ids
from shardkit.caches.ring import Ring
from shardkit.cachewrites import CacheWrites
from shardkit.config import CacheConfig, load
from shardkit.errors import ShardkitError
from shardkit.relay import Relay
from shardkit.topology import Topology, schema_name

__all__ = ["Base", "SessionShared", "fill", "read", "relay", "versions", "waiting", "write"]


DEADLINE: Final = 0.25
"""Seconds a call of the cache may take: more than in production, where a machine that is as busy
as this one would have no cache; what comes late is later."""

KILLED_AFTER_COMMIT: Final = 0.05
BATCH: Final = 40
LARGEST: Final = 8000
"""Characters of a row, so that few rows fill the smallest server."""


class Base(DeclarativeBase):
    """Models of the chaos."""


class Item(Sharded, Base):
    __tablename__ = "chaos_items"
    __cache_ttl__ = 3600.0
    number: Mapped[int]
    body: Mapped[str]


@dataclass(frozen=True)
class SessionShared:
    """What the processes have in common; most of it as in `cacheroles.Shared`.

    Attributes:
        config: of the servers of PostgreSQL.
        kind: `memcached` or `redis`.
        ids: of the rows, by number.
    """

    config: Path
    kind: Any
    ids: tuple[int, ...]
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

    def cluster(self, *, cached: bool = True) -> Cluster:
        """Return a cluster of one's own."""
        _, topology = load(self.config)
        if not cached:
            return Cluster(topology)
        config = CacheConfig(backend=self.kind, nodes=self.servers, gutter=self.gutter)
        cluster = Cluster(topology, cache=config)
        assert cluster.cache is not None
        cluster.cache.backend.seconds = DEADLINE  # type: ignore[attr-defined]
        return cluster

    def aside(self) -> Aside:
        """Return plain cache-aside in the same servers."""
        return (AsideRedis if self.kind == "redis" else Aside)(self.servers)

    def count(self, process: int, name: str, n: int = 1) -> None:
        """Add to a counter."""
        self.counters[process * len(CHECKED) + CHECKED.index(name)] += n


def fill(topology: Topology, shards: Sequence[int], n_rows: int) -> tuple[int, ...]:
    """Make the rows, in some logical shards; return their ids."""
    with Cluster(topology) as cluster:
        items = [
            Item(id=ids.compose(1, shards[n % len(shards)], n // len(shards)), number=n,
                 body=_body(n, LARGEST // 2))
            for n in range(n_rows)
        ]  # fmt: skip
        for at in range(0, n_rows, 500):
            with cluster.writer() as session:
                session.add_all(items[at : at + 500])
                session.commit()
        return tuple(item.id for item in items)


def _body(number: int, size: int) -> str:
    return f"{number}:" + "x" * size


def versions(database: psycopg.Connection[Any], shards: Iterable[int]) -> list[Any]:
    """Return number and version of every row, as committed now."""
    each = (f"SELECT number, version FROM {schema_name(n)}.chaos_items" for n in shards)
    return database.execute(" UNION ALL ".join(each).encode()).fetchall()


def waiting(database: psycopg.Connection[Any], shards: Iterable[int]) -> int:
    """Return how many events the relay has not handled."""
    each = (f"SELECT 1 FROM {schema_name(n)}.shardkit_outbox" for n in shards)
    text = f"SELECT count(*) FROM ({' UNION ALL '.join(each)}) AS e"
    ((n,),) = database.execute(text.encode()).fetchall()
    return int(n)


# -- the roles


def write(shared: SessionShared, process: int) -> None:
    """Write until the end, in children that are killed again and again."""
    in_children(shared, process, _writes)


def _writes(shared: SessionShared, process: int, rng: random.Random) -> None:
    finish = CacheWrites.finish

    def finish_or_die(writes: CacheWrites) -> None:
        if rng.random() < KILLED_AFTER_COMMIT:
            os.kill(os.getpid(), signal.SIGKILL)
        finish(writes)

    CacheWrites.finish = finish_or_die  # type: ignore[method-assign,assignment]  # of this process
    aside = shared.aside()
    with shared.cluster() as cluster:
        with cluster.writer() as session:
            session.get_one(Item, shared.ids[0])
        signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.3, 3.0))  # anew: it has begun now
        while not shared.stop.is_set():
            numbers = rng.sample(range(shared.n_rows), rng.choice((1, 1, 1, 3)))
            with suppress(ShardkitError, SQLAlchemyError):
                for number, version in _change(cluster, shared, numbers, rng):
                    aside.forget(number)
                    shared.acknowledged[number] = max(version, shared.acknowledged[number])
                    shared.count(process, "written")


def _change(
    cluster: Cluster, shared: SessionShared, numbers: list[int], rng: random.Random
) -> list[tuple[int, int]]:
    """Change rows in one transaction; return their versions, or nothing when it rolls back."""
    with cluster.writer() as session:
        items = session.get_many(Item, [shared.ids[n] for n in numbers])
        for item in items:
            item.body = _body(item.number, rng.randrange(100, LARGEST))
        if rng.random() < 0.2:  # a statement beside them
            other = rng.randrange(shared.n_rows)
            body = _body(other, rng.randrange(100, LARGEST))
            session.execute(update(Item).where(Item.id == shared.ids[other]).values(body=body))
        if rng.random() < 0.03:
            session.flush()
            session.rollback()
            return []
        session.commit()
        return [(item.number, item.version) for item in items]


def read(shared: SessionShared, process: int) -> None:
    """Read and check until the end."""
    rng = random.Random(shared.seed * 7 + process)
    aside, homes, n = shared.aside(), Ring(shared.servers), 0
    with shared.cluster() as cluster, shared.cluster(cached=False) as plain:
        cache = cluster.cache
        assert cache is not None
        keys = [cache.key_of("chaos_items", ids.shard_of(key), (key,)) for key in shared.ids]
        owners = [homes.owner(key) for key in keys]

        def loaded(rows: list[int]) -> Iterable[tuple[int, int, str]]:
            with plain.reader() as session:
                found = session.get_many(Item, [shared.ids[row] for row in rows])
            return [(item.number, item.version, item.body) for item in found]

        while not shared.stop.is_set():
            n += 1
            rows = rng.sample(range(shared.n_rows), BATCH)
            began, returned = time.monotonic(), list(shared.returned)
            floors = [shared.floors[row] for row in rows]
            told = [shared.acknowledged[row] for row in rows]
            if n % ASIDE_EVERY == 0:
                shown = aside.read(rows, loaded)
                late = [v < floor for v, floor in zip(shown, floors, strict=True)]
                shared.count(process, "aside", len(late))
                shared.count(process, "aside_late", sum(late))
                continue
            hits = cache.counts.hits
            with cluster.reader() as session:
                found = session.get_many(Item, [shared.ids[row] for row in rows])
            hits = cache.counts.hits - hits
            back = {at for at, when in enumerate(returned) if began < when + shared.bound}
            late_ones = returning = older = mixed = 0
            for row, item, floor, acknowledged in zip(rows, found, floors, told, strict=True):
                mixed += item.number != row or not item.body.startswith(f"{row}:")
                if item.version < floor:
                    is_back = owners[row] in back
                    late_ones, returning = late_ones + (not is_back), returning + is_back
                older += item.version < acknowledged
            for name, count in (
                ("checked", hits), ("loaded", len(rows) - hits), ("late", late_ones),
                ("returning", returning), ("older", older), ("mixed", mixed),
            ):  # fmt: skip
                shared.count(process, name, count)


def relay(shared: SessionShared, _: int) -> None:
    """Repair every change that was committed."""
    with shared.cluster() as cluster, Relay(cluster):
        shared.stop.wait()
