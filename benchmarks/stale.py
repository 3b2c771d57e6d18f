"""Write, then read at once: a million times, and no read is stale.

Each pair commits a new version of a row and reads it with the token of the commit, in a new
session, as a web service does. In every second pair a naive split reads the row first, at once,
from the two replicas in turn with plain psycopg. One replica replays 5 ms later than the other.
A third reader goes on from the token of its last read, over both replicas, and must never go back.

`python -m benchmarks stale` makes a million pairs and takes an hour; `--quick` makes 20,000.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy import update
from sqlalchemy.orm import DeclarativeBase, Mapped

from benchmarks.measure import report, servers
from shardkit import Cluster, Sharded, ids, tokens
from shardkit.clock import SYSTEM
from shardkit.config import load
from shardkit.local import LocalCluster
from shardkit.testing import create_tables
from shardkit.topology import PhysicalShard, Role, schema_name

PEERS = ("a naive split: primary and replica by psycopg",)
TARGETS = {
    "stale": "≤ 0",
    "monotonic_regressions": "≤ 0",
    "replica_share": "≥ 0.9",
    "naive_stale_share": "",
}
PAIRS = 1_000_000
DELAY_MS = 5
PROCESSES = 2


class Base(DeclarativeBase):
    """Models of this benchmark."""


class Counter(Sharded, Base):
    __tablename__ = "counters"
    value: Mapped[int]


@dataclass
class Counts:
    """What one process saw.

    Attributes:
        pairs: writes, each followed by one read of each arm.
        stale: reads with the token that missed the write.
        naive: reads of the naive split that missed it.
        from_replica: reads with the token that a replica answered.
        regressions: reads that were older than the one before, whose token they had.
    """

    pairs: int = 0
    stale: int = 0
    naive: int = 0
    from_replica: int = 0
    regressions: int = 0

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
    figures = {
        "pairs": total.pairs,
        "stale": total.stale,
        "monotonic_regressions": total.regressions,
        "replica_share": total.from_replica / total.pairs,
        "naive_stale_share": total.naive / (total.pairs // 2),
    }
    report("stale", figures, peers=PEERS, medians={"pair": seconds / pairs}, targets=TARGETS,
           as_json=as_json)  # fmt: skip


def delay(local: LocalCluster) -> None:
    """Have one replica replay later than the other."""
    replica = local.replicas("alpha")[0]
    with psycopg.connect(local.superuser_dsn(replica.name), autocommit=True) as connection:
        connection.execute(f"ALTER SYSTEM SET recovery_min_apply_delay = '{DELAY_MS}ms'".encode())
        connection.execute("SELECT pg_reload_conf()")


def run(config: Path, pairs: int, processes: int = PROCESSES) -> Counts:
    """Return what processes saw that wrote and read so many pairs together."""
    context = multiprocessing.get_context("spawn")
    total = Counts()
    with context.Pool(processes) as pool:
        share = [(config, pairs // processes, number) for number in range(processes)]
        for counts in pool.starmap(work, share):
            total.add(counts)
    return total


def work(config: Path, pairs: int, number: int) -> Counts:
    """Write and read, and count what was stale; runs in a process of its own."""
    counts = Counts()
    _, topology = load(config)
    (shard,) = topology.physical.values()
    key = ids.compose(1, number % topology.n_logical_shards, os.getpid() % 1024)

    with Cluster(topology) as cluster, _naive(shard) as replicas:
        with cluster.writer() as session:
            session.add(Counter(id=key, value=0))
            session.commit()
        select = f"SELECT value FROM {schema_name(ids.shard_of(key))}.counters WHERE id = %s"
        last, seen = 0, tokens.NOTHING
        for value, replica in zip(range(1, pairs + 1), itertools.cycle(replicas), strict=False):
            with cluster.writer() as session:
                session.execute(update(Counter).where(Counter.id == key).values(value=value))
                session.commit()
            is_naive_first = value % 2 == 0
            row = replica.execute(select.encode(), (key,)).fetchone() if is_naive_first else None
            with cluster.reader(after=session.token) as reader:
                found = reader.get_one(Counter, key).value
                endpoint = reader.endpoint_of(shard.name)
                counts.from_replica += endpoint is not None and endpoint.role is Role.REPLICA
            with cluster.reader(after=seen) as reader:
                later = reader.get_one(Counter, key).value
            seen = reader.token
            counts.pairs += 1
            counts.stale += found < value
            counts.naive += is_naive_first and (row is None or row[0] < value)
            counts.regressions += later < last
            last = later
    return counts


class _naive:  # noqa: N801 - a context manager
    """Plain connections to the replicas."""

    def __init__(self, shard: PhysicalShard) -> None:
        self._shard = shard

    def __enter__(self) -> list[psycopg.Connection[Any]]:
        urls = (e.url.set(drivername="postgresql") for e in self._shard.replicas)
        self._open = [
            psycopg.connect(url.render_as_string(hide_password=False), autocommit=True)
            for url in urls
        ]
        return self._open

    def __exit__(self, *_: object) -> None:
        for connection in self._open:
            connection.close()
