"""Write, then read at once: a million times, and no read is stale.

Each pair commits a new version of a row and reads it with the token of the commit, in a new
session, as a web service does. One replica replays 5 ms later than the other. In one pair of ten
a naive split goes first: it reads the row with plain psycopg from the two replicas in turn. In
another one a reader goes on twice from the token of its last read, over both replicas, and must
never go back. Both arms are samples, so that the pairs get the time. Then a replica is promoted
that lacks writes: see `benchmarks.promoted`.

`python -m benchmarks stale` makes a million pairs; `--quick` makes 20,000. Progress goes to stderr.
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy import update
from sqlalchemy.orm import DeclarativeBase, Mapped

from benchmarks import promoted
from benchmarks.measure import report, servers
from shardkit import Cluster, Sharded, ids, tokens
from shardkit.clock import SYSTEM
from shardkit.config import load
from shardkit.local import LocalCluster
from shardkit.testing import create_tables
from shardkit.topology import PhysicalShard, Role, schema_name

PEERS = ("a naive split: primary and replica by psycopg, one pair of ten",)
TARGETS = {
    "stale": "≤ 0",
    "monotonic_regressions": "≤ 0",
    "replica_share": "≥ 0.9",
    "pairs_per_second": "≥ 500",
    "naive_stale_share": "",
    "naive_regression_share": "",
    **promoted.TARGETS,
}
PAIRS = 1_000_000
DELAY_MS = 5
PROCESSES = 4
"""More than processors: a pair spends some of its time waiting for a replica to replay."""
SAMPLED = 10
"""Pairs of which one has the naive split and another one the reader that goes on."""
CHUNK = 250
EVERY = 10.0
"""Seconds between two lines of progress."""


class Base(DeclarativeBase):
    """Models of this benchmark."""


class Counter(Sharded, Base):
    __tablename__ = "counters"
    value: Mapped[int]


@dataclass
class Counts:
    """What was seen.

    Attributes:
        pairs: writes, each followed by one read with its token.
        stale: reads with the token that missed the write.
        from_replica: reads with the token that a replica answered.
        monotonic: reads that went on from the token of the one before.
        regressions: how many of those were older than the one before.
        naive: first reads of the naive split.
        naive_stale: how many of those missed the write.
        naive_regressions: how often its second read, of the other replica, was older than that.
    """

    pairs: int = 0
    stale: int = 0
    from_replica: int = 0
    monotonic: int = 0
    regressions: int = 0
    naive: int = 0
    naive_stale: int = 0
    naive_regressions: int = 0

    def add(self, other: Counts) -> None:
        """Add what another process saw."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


def main(*, as_json: bool, quick: bool = False) -> None:
    pairs = 20_000 if quick else PAIRS
    with servers(logical_shards=8, physical=1, replicas=2) as local:
        _, topology = load(local.config_path)
        create_tables(topology, Base.metadata)
        delay(local)
        started = SYSTEM.monotonic()
        total = run(local.config_path, pairs)
        seconds = SYSTEM.monotonic() - started
        print("promoting a replica that lacks writes", file=sys.stderr, flush=True)
        after = promoted.figures(local, topology, Counter)
    figures = {
        "pairs": total.pairs,
        "stale": total.stale,
        "monotonic_regressions": total.regressions,
        "monotonic_reads": total.monotonic,
        "replica_share": total.from_replica / total.pairs,
        "pairs_per_second": total.pairs / seconds,
        "naive_stale_share": total.naive_stale / total.naive,
        "naive_regression_share": total.naive_regressions / total.naive,
        **after,
    }
    report("stale", figures, peers=PEERS, medians={"pair": seconds * PROCESSES / total.pairs},
           targets=TARGETS, as_json=as_json)  # fmt: skip


def delay(local: LocalCluster) -> None:
    """Have one replica replay later than the other."""
    replica = local.replicas("alpha")[0]
    with psycopg.connect(local.superuser_dsn(replica.name), autocommit=True) as connection:
        connection.execute(f"ALTER SYSTEM SET recovery_min_apply_delay = '{DELAY_MS}ms'".encode())
        connection.execute("SELECT pg_reload_conf()")


def run(config: Path, pairs: int, processes: int = PROCESSES) -> Counts:
    """Return what processes saw that wrote and read so many pairs together, or a few more."""
    context = multiprocessing.get_context("spawn")
    total = Counts()
    chunk = min(CHUNK, -(-pairs // processes))
    started = told = SYSTEM.monotonic()
    with context.Pool(processes, initializer=_begin, initargs=(config,)) as pool:
        for counts in pool.imap_unordered(_go_on, [chunk] * -(-pairs // chunk)):
            total.add(counts)
            now = SYSTEM.monotonic()
            if now - told >= EVERY:
                told = now
                _tell(total, pairs, now - started)
        pool.close()
        pool.join()
    _tell(total, pairs, SYSTEM.monotonic() - started)
    return total


def _tell(total: Counts, pairs: int, seconds: float) -> None:
    print(
        f"{total.pairs:,} of {pairs:,} pairs, {total.pairs / seconds:,.0f} a second: "
        f"{total.stale} stale, {total.regressions} of {total.monotonic:,} reads went back, "
        f"{total.from_replica / total.pairs:.2%} from replicas; naive split: "
        f"{total.naive_stale:,} of {total.naive:,} stale, {total.naive_regressions:,} went back",
        file=sys.stderr,
        flush=True,
    )


_worker: list[Worker] = []
"""The worker of this process of the pool."""


def _begin(config: Path) -> None:
    _worker.append(Worker(config))
    gc.freeze()  # what the modules made is never garbage, and need not be looked at


def _go_on(pairs: int) -> Counts:
    return _worker[0].work(pairs)


class Worker:
    """Writes and reads a row of its own, in a process of its own.

    Args:
        config: `shardkit.toml` of a cluster with one physical shard.
    """

    def __init__(self, config: Path) -> None:
        _, topology = load(config)
        (shard,) = topology.physical.values()
        self._cluster = Cluster(topology)
        self._physical = shard.name
        self._naive = _replicas(shard)
        counter = Counter(value=0)
        with self._cluster.writer() as session:
            session.add(counter)
            session.commit()
        self._key, self._value = counter.id, 0
        self._seen, self._last = tokens.NOTHING, 0
        schema = schema_name(ids.shard_of(self._key))
        self._select = f"SELECT value FROM {schema}.counters WHERE id = %s".encode()

    def work(self, pairs: int) -> Counts:
        """Write and read so many times, and count what was stale."""
        counts = Counts(pairs=pairs)
        for _ in range(pairs):
            self._value += 1
            with self._cluster.writer() as session:
                session.execute(
                    update(Counter).where(Counter.id == self._key).values(value=self._value)
                )
                session.commit()
            if self._value % SAMPLED == 0:
                self._read_naively(counts)
            with self._cluster.reader(after=session.token) as reader:
                counts.stale += reader.get_one(Counter, self._key).value < self._value
                endpoint = reader.endpoint_of(self._physical)
                counts.from_replica += endpoint is not None and endpoint.role is Role.REPLICA
            if self._value % SAMPLED == SAMPLED // 2:
                self._go_forwards(counts)
        return counts

    def _read_naively(self, counts: Counts) -> None:
        """Read one replica, then the other, as a service that knows no tokens."""
        first, second = (self._plain(next(self._naive)) for _ in range(2))
        next(self._naive)  # so that the other one is first, next time
        counts.naive += 1
        counts.naive_stale += first < self._value
        counts.naive_regressions += second < first

    def _plain(self, replica: psycopg.Connection[Any]) -> int:
        row = replica.execute(self._select, (self._key,)).fetchone()
        return -1 if row is None else int(row[0])

    def _go_forwards(self, counts: Counts) -> None:
        """Read twice from where the last read was."""
        for _ in range(2):
            with self._cluster.reader(after=self._seen) as reader:
                found = reader.get_one(Counter, self._key).value
            self._seen = reader.token
            counts.monotonic += 1
            counts.regressions += found < self._last
            self._last = found


def _replicas(shard: PhysicalShard) -> Iterator[psycopg.Connection[Any]]:
    """Yield plain connections to the replicas in turns, for ever."""
    urls = (e.url.set(drivername="postgresql") for e in shard.replicas)
    opened = [
        psycopg.connect(url.render_as_string(hide_password=False), autocommit=True) for url in urls
    ]
    return itertools.cycle(opened)
