"""How long writers wait while their logical shard moves, small and large, beside a naive mover.

Eight writers in a process of their own write rows of the logical shard by `Cluster.run`, each on a
thread, with a short rest between two writes; a mover sends it back and forth under them. A pause is
the longest write of one writer around one hand-over, from the call to the acknowledgement. The
naive arm fences first and copies then, as a mover without replication does.
"""

from __future__ import annotations

import multiprocessing
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql
from sqlalchemy import BigInteger
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from benchmarks.measure import connect, report, servers
from shardkit import Cluster, Sharded, ids, set_aside
from shardkit.config import PoolConfig, load
from shardkit.local import LocalCluster
from shardkit.ops import moves
from shardkit.ops.moves.transactions import change, row_of
from shardkit.ops.moves.transitions import Activate, Claim, Decide, Fence, Import, Move, Release
from shardkit.testing import create_tables, schema_script
from shardkit.topology import Topology, schema_name

PEERS = ("Citus 13.2.2, one writer: 104-144 ms at 4 MB, 1,172 ms at 400 MB", "fence, then copy")
TARGETS = {
    "write_pause_p99_ms": "≤ 100",
    "pause_400mb_vs_4mb": "≤ 2",
    "failed_writes": "≤ 0",
    "lost_writes": "≤ 0",
}
WRITERS = 8
REST = 0.01
"""Seconds that a writer rests between two writes, so that the queue of a full machine is not what
is measured."""
ROW = 1024
SHARD = 0
OWNER = ids.compose(1, SHARD, 1)

Writes = list[tuple[int, float, float]]
"""Writer, and when a write began and was acknowledged, on the clock that processes share."""


class Base(DeclarativeBase):
    """The model of the writers."""


class Note(Sharded, Base):
    __tablename__ = "notes"
    __shard_key__ = "owner_id"
    owner_id: Mapped[int] = mapped_column(BigInteger)
    body: Mapped[str]


def main(*, as_json: bool = False, quick: bool = False) -> None:
    set_aside()
    small = arm(4, moves_=25 if quick else 60)
    naive = arm(4, moves_=6 if quick else 15, is_naive=True)
    large = arm(400, moves_=5 if quick else 12)
    figures = {
        "write_pause_p99_ms": percentile(small["pauses"], 0.99) * 1000,
        "write_pause_p50_ms": percentile(small["pauses"], 0.5) * 1000,
        "fence_p50_ms": statistics.median(small["fences"]) * 1000,
        "fence_p99_ms": percentile(small["fences"], 0.99) * 1000,
        "pause_400mb_vs_4mb": percentile(large["pauses"], 0.5) / percentile(small["pauses"], 0.5),
        "write_pause_400mb_p99_ms": percentile(large["pauses"], 0.99) * 1000,
        "naive_pause_p50_ms": percentile(naive["pauses"], 0.5) * 1000,
        "naive_vs_shardkit": percentile(naive["pauses"], 0.5) / percentile(small["pauses"], 0.5),
        "failed_writes": float(small["failed"] + large["failed"]),
        "lost_writes": float(small["lost"] + large["lost"]),
        "moves": float(small["moves"] + large["moves"]),
        "writes": float(small["writes"] + large["writes"]),
        "move_4mb_s": small["seconds"],
        "move_400mb_s": large["seconds"],
        "write_p50_ms": percentile(small["quiet"], 0.5) * 1000,
        "write_p99_ms": percentile(small["quiet"], 0.99) * 1000,
    }
    medians = {
        "a write, nothing moves": percentile(small["quiet"], 0.5),
        "the longest write of a hand-over, 4 MB": percentile(small["pauses"], 0.5),
        "the same, 400 MB": percentile(large["pauses"], 0.5),
        "the same, fence then copy, 4 MB": percentile(naive["pauses"], 0.5),
    }
    report("move", figures, peers=PEERS, medians=medians, targets=TARGETS, as_json=as_json)


def arm(megabytes: int, *, moves_: int, is_naive: bool = False) -> dict[str, Any]:
    """Return what writers met while a logical shard of some size moved some times."""
    with servers(logical_shards=2, shared_buffers_mb=128) as local:
        _, topology = load(local.config_path)
        create_tables(topology, Base.metadata)
        fill(topology, megabytes)
        with writing(local.config_path) as writers:
            time.sleep(1.0)
            if is_naive:
                spans, seconds = naively(local, topology, moves_), 0.0
            else:
                spans, seconds = moved(topology, moves_)
            writes, failed = writers.end()
        lost = len(writes) - stored(topology)
    held = pauses(writes, spans)
    quiet = [
        ended - begun
        for _, begun, ended in writes
        if not any(first - 0.5 < ended and begun < last + 0.5 for first, last in spans)
    ]
    return {
        "pauses": held,
        "fences": [last - first for first, last in spans],
        "quiet": quiet or [0.0],
        "failed": failed,
        "lost": lost,
        "moves": len(spans),
        "writes": len(writes),
        "seconds": seconds,
    }


def fill(topology: Topology, megabytes: int) -> None:
    """Make the logical shard as large as that."""
    rows = megabytes * 1_000_000 // (ROW + 60)
    with connect(topology.physical["alpha"], admin=True) as admin:
        admin.execute(
            sql.SQL(
                "INSERT INTO {} (id, owner_id, body) SELECT n, {}, repeat(md5(n::text), {}) "
                "FROM generate_series(1, {}) AS n"
            ).format(
                sql.Identifier(schema_name(SHARD), "notes"), OWNER, ROW // 32, sql.Literal(rows)
            )
        )
        admin.execute(f"ANALYZE {schema_name(SHARD)}.notes".encode())


def stored(topology: Topology) -> int:
    """Return how many rows of writers there are where the logical shard is now."""
    for shard in topology.physical.values():
        with connect(shard, admin=True) as admin:
            row = admin.execute(
                "SELECT state FROM shardkit.ownership WHERE logical_shard = %s", (SHARD,)
            ).fetchone()
            if row == ("active",):
                query = f"SELECT count(*) FROM {schema_name(SHARD)}.notes WHERE body LIKE 'w%'"
                found = admin.execute(query.encode()).fetchone()
                assert found is not None
                return int(found[0])
    raise AssertionError("nobody owns it")


# -- writers


class Writers:
    """What the process of writers tells at its end."""

    def __init__(self, pipe: Connection, process: Any) -> None:
        self._pipe = pipe
        self._process = process

    def end(self) -> tuple[Writes, int]:
        """Stop them; return what they wrote, and how many writes failed."""
        self._pipe.send("end")
        found: tuple[Writes, int] = self._pipe.recv()
        self._process.join(30)
        return found


@contextmanager
def writing(config: Path) -> Iterator[Writers]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=write, args=(config, there), daemon=True)
    process.start()
    assert here.recv() == "ready"
    try:
        yield Writers(here, process)
    finally:
        process.kill()


def write(config: Path, pipe: Connection) -> None:
    """Write until told to end; then tell when."""
    stop = threading.Event()
    done: list[Writes] = [[] for _ in range(WRITERS)]
    failed: list[BaseException] = []
    _, topology = load(config)
    with Cluster(topology, pool=PoolConfig(size=WRITERS + 2, timeout=10.0)) as cluster:

        def work(number: int) -> None:
            n = 0
            while not stop.is_set():
                n += 1
                body = f"w{number}-{n}"

                def unit(session: Any, body: str = body) -> None:
                    session.add(Note(owner_id=OWNER, body=body))

                begun = time.monotonic()
                try:
                    cluster.run(unit)
                except Exception as error:  # noqa: BLE001  every failure counts
                    failed.append(error)
                else:
                    done[number].append((number, begun, time.monotonic()))
                stop.wait(REST)

        set_aside()  # as a server does before it serves
        threads = [threading.Thread(target=work, args=(n,)) for n in range(WRITERS)]
        for thread in threads:
            thread.start()
        pipe.send("ready")
        pipe.recv()
        stop.set()
        for thread in threads:
            thread.join()
    pipe.send(([each for some in done for each in some], len(failed)))


def pauses(writes: Writes, spans: list[tuple[float, float]]) -> list[float]:
    """Return the longest write of each writer that lies around each hand-over."""
    found: dict[tuple[int, int], float] = {}
    for writer, begun, ended in writes:
        for n, (first, last) in enumerate(spans):
            if begun < last and ended > first:
                key = (n, writer)
                found[key] = max(found.get(key, 0.0), ended - begun)
    return list(found.values())


def percentile(values: list[float], share: float) -> float:
    """Return a percentile: the value of which that share is not larger."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


# -- movers


def moved(topology: Topology, n: int) -> tuple[list[tuple[float, float]], float]:
    """Move the logical shard there and back; return when each fence began and the target opened."""
    spans: list[tuple[float, float]] = []
    begun = 0.0

    def hook(name: str) -> None:
        nonlocal begun
        now = time.monotonic()
        if name == "fence begun":
            begun = now
        elif name == "activate done":
            spans.append((begun, now))

    # As `shardkit move start` does, which also sets aside what it has loaded.
    options = moves.Options(notice=moves.NOTICE, hook=hook)
    start = time.monotonic()
    moves.move(topology, SHARD, "beta", script=schema_script(Base.metadata), options=options)
    seconds = time.monotonic() - start
    for _ in range(n - 1):
        time.sleep(0.7)  # so that no write belongs to two hand-overs
        moves.rollback(topology, SHARD, options=options)
    return spans, seconds


def naively(local: LocalCluster, topology: Topology, n: int) -> list[tuple[float, float]]:
    """Fence, copy, hand over: as long as the copy takes nobody writes."""
    spans = []
    for turn in range(n):
        source, target = ("alpha", "beta") if turn % 2 == 0 else ("beta", "alpha")
        time.sleep(0.7)
        spans.append(_naive(local, topology, source, target, f"00000000-0000-0000-0000-{turn:012}"))
    return spans


def _naive(
    local: LocalCluster, topology: Topology, source: str, target: str, move_id: str
) -> tuple[float, float]:
    move = Move(move_id)
    schema = schema_name(SHARD)
    shard = topology.physical[target]
    with (
        connect(topology.physical[source], admin=True) as here,
        connect(shard, admin=True) as there,
        psycopg.connect(
            local.superuser_dsn(local.primary(source).name), dbname="shardkit"
        ) as reads,
        psycopg.connect(local.superuser_dsn(local.primary(target).name), dbname="shardkit") as into,
    ):
        change(here, SHARD, Claim(move))
        change(there, SHARD, Import(move))
        with there.transaction():
            there.execute(f"DROP SCHEMA IF EXISTS {schema} CASCADE".encode())
            there.execute(b"DELETE FROM shardkit.closed_rights")
            there.execute(schema_script(Base.metadata)(shard, SHARD, None).encode())
            there.execute("SET LOCAL search_path = pg_catalog")
            there.execute("SELECT shardkit.close_shard(%s, true)", (SHARD,))
        begun = time.monotonic()
        change(here, SHARD, lambda at, line: Fence(move, target, at, line), lock_timeout=2.0)
        into.execute("SET session_replication_role = replica")
        query = (
            b"SELECT relname FROM pg_class WHERE relnamespace = %s::regnamespace AND relkind = 'r'"
        )
        for (name,) in reads.execute(query, (schema,)).fetchall():
            table = sql.Identifier(schema, name)
            into.execute(sql.SQL("TRUNCATE {}").format(table))
            out = sql.SQL("COPY {} TO STDOUT (FORMAT binary)").format(table)
            copied = sql.SQL("COPY {} FROM STDIN (FORMAT binary)").format(table)
            with reads.cursor().copy(out) as rows, into.cursor().copy(copied) as writer:
                for piece in rows:
                    writer.write(piece)
        into.execute("SELECT setval(%s, 1000000)", (f"{schema}.version_seq",))
        into.commit()
        change(here, SHARD, lambda _at, line: Decide(move, line))
        decided = row_of(here, SHARD)
        assert decided is not None
        change(there, SHARD, Activate(move, decided, target))
        ended = time.monotonic()
        change(here, SHARD, Release(move))
        change(there, SHARD, Release(move))
    return begun, ended
