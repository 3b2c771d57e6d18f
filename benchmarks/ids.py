"""What an id costs, and how many a logical shard can have, beside other makers of ids.

In one process, CPU time, interleaved: `IdGenerator` one at a time and 1,000 at a time against
`uuid.uuid4`, uuid_utils, snowflake-id and python-ulid. It waits when it is more than 50 ms ahead
of the clock; that CPU time is counted too. On a server, wall time, 8 connections in processes of
their own: leases of 1,000 ids on one logical shard, which must reach the cap of the layout and
cannot pass it; and leases over 8 logical shards against the widely published `next_id()` over 8
schemas, also 1,000 ids a round trip.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import psycopg
import ulid
import uuid_utils
from snowflake import SnowflakeGenerator
from sqlalchemy import MetaData

from benchmarks.measure import connect, database, interleaved, report, servers
from benchmarks.published import PUBLISHED
from shardkit.config import load
from shardkit.ids import IdGenerator
from shardkit.topology import PhysicalShard, schema_name

PEERS = ("uuid.uuid4", "uuid_utils.uuid7", "snowflake-id", "python-ulid", "published next_id()")
TARGETS = {
    "scalar_vs_uuid4": "≥ 3",
    "bulk_vs_uuid4": "≥ 60",
    "cap_share": "≥ 0.97",
    "lease_vs_published": "≥ 5",
}
CAP = 1_024_000
"""Ids a second that the layout has room for on one logical shard."""
BACKENDS = 8
BLOCK = 1000
LEASE = b"SELECT first_state FROM shardkit.lease_ids(ARRAY[%d], ARRAY[%d])"
CALL = b"SELECT count(%s.next_id()) FROM generate_series(1, %d)"
NEXT = b"SELECT count(shardkit.next_id(%d)) FROM generate_series(1, %d)"


def main(*, as_json: bool, quick: bool = False) -> None:
    medians = {f"{name}, per id": t for name, t in scalars(20 if quick else 60).items()}
    with servers(physical=1, logical_shards=64, settings={"max_connections": "60"}) as local:
        _, topology = load(local.config_path)
        made = database(local, topology, "bench", logical_shards=64, metadata=MetaData())
        (shard,) = made.physical.values()
        with connect(shard, admin=True) as admin:
            for number in range(BACKENDS):
                admin.execute(PUBLISHED.format(schema=schema_name(number), shard=number).encode())
        rates = measure(shard, rounds=3 if quick else 9, seconds=1.5 if quick else 3)
    medians |= {f"{name}, per id": 1 / rate for name, rate in rates.items()}
    uuid4 = medians["uuid.uuid4, per id"]
    figures = {
        "scalar_vs_uuid4": uuid4 / medians["IdGenerator.next, per id"],
        "bulk_vs_uuid4": uuid4 / medians["IdGenerator.many(1000), per id"],
        "cap_share": rates["leases of 1000, one logical shard"] / CAP,
        "lease_vs_published": rates["leases of 1000"] / rates["published next_id()"],
        "next_id_vs_published": rates["shardkit.next_id()"] / rates["published next_id()"],
    }
    report("ids", figures, peers=PEERS, medians=medians, targets=TARGETS, as_json=as_json)


def scalars(rounds: int, calls: int = 10_000) -> dict[str, float]:
    """Return median CPU seconds per id in one process."""
    generator, bulk = IdGenerator(42), IdGenerator(43)
    snowflakes = SnowflakeGenerator(42)

    def many(mint: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(calls):
                mint()

        return run

    def blocks() -> None:
        for _ in range(calls // BLOCK):
            bulk.many(BLOCK)

    arms = {
        "IdGenerator.next": many(generator.next),
        "IdGenerator.many(1000)": blocks,
        "uuid.uuid4": many(uuid.uuid4),
        "uuid_utils.uuid7": many(uuid_utils.uuid7),
        "snowflake-id": many(snowflakes.__next__),
        "python-ulid": many(ulid.ULID),
    }
    times = interleaved(arms, rounds=rounds, warm_up=3, timer=time.process_time)
    return {name: seconds / calls for name, seconds in times.items()}


def measure(shard: PhysicalShard, *, rounds: int, seconds: float) -> dict[str, float]:
    """Return median ids per second of each arm, all backends together."""
    everywhere = range(BACKENDS)
    arms = {
        "leases of 1000, one logical shard": [LEASE % (20, BLOCK) for _ in everywhere],
        "leases of 1000": [LEASE % (number, BLOCK) for number in everywhere],
        "published next_id()": [CALL % (schema_name(n).encode(), BLOCK) for n in everywhere],
        "shardkit.next_id()": [NEXT % (number, BLOCK) for number in everywhere],
    }
    rates: dict[str, list[float]] = {name: [] for name in arms}
    with backends(shard) as pipes:
        for _ in range(rounds):
            for name, statements in arms.items():
                for pipe, statement in zip(pipes, statements, strict=True):
                    pipe.send((statement, seconds))
                # From the first to begin to the last to end: clocks of processes are the same.
                done, began, ended = zip(*(pipe.recv() for pipe in pipes), strict=True)
                rates[name].append(BLOCK * sum(done) / (max(ended) - min(began)))
    return {name: statistics.median(measured) for name, measured in rates.items()}


@contextmanager
def backends(shard: PhysicalShard) -> Iterator[list[Connection[Any, Any]]]:
    """Run processes that each time statements on a connection of their own."""
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    for _ in range(BACKENDS):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=backend, args=(shard, theirs), daemon=True))
        processes[-1].start()
        pipes.append(ours)
    yield pipes
    for pipe in pipes:
        pipe.send(None)
    for process in processes:
        process.join()


def backend(shard: PhysicalShard, pipe: Connection[Any, Any]) -> None:
    """Repeat a statement for a time; answer how often it ran, and from when to when.

    The first half second is not counted: a shard at rest has 50 ms of ids in hand.
    """
    with connect(shard) as connection:
        while work := pipe.recv():
            statement, seconds = work
            repeat(connection, statement, 0.5)
            pipe.send(repeat(connection, statement, seconds))


def repeat(
    connection: psycopg.Connection[Any], statement: bytes, seconds: float
) -> tuple[int, float, float]:
    """Return how often it ran, when it began and when it ended."""
    began = now = time.perf_counter()
    n = 0
    while now - began < seconds:
        connection.execute(statement)
        n += 1
        now = time.perf_counter()
    return n, began, now
