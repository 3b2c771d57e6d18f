"""A migration meets a transaction that stays: what the application notices meanwhile.

One primary, eight logical shards of two tables. Threads read and write random rows of all of them;
somebody holds a lock on one table of one logical shard for a minute (eight seconds with --quick),
and `shardkit migrate apply` adds a column to that table everywhere. Every statement is timed, with
the blocker alone (half before, half after) and with the migration beside it. The control arm is
`ALTER TABLE` as anybody would type it, for five seconds.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

from benchmarks.measure import connect, report, servers
from benchmarks.migrate import HEAD
from shardkit.config import load
from shardkit.ops import migrate
from shardkit.ops.drift import drift
from shardkit.topology import Topology

PEERS = ("ALTER TABLE without limits",)
TARGETS = {
    "p99_ratio": "≤ 2",
    "p99_ratio_same_table": "≤ 2",
    "longest_seconds": "≤ 0.4",
    "differences_after": "≤ 0",
}
SHARDS, ROWS, THREADS = 8, 1000, 4
HELD = "shard_0003.t"

Timed = list[tuple[bool, float]]
"""Whether a statement was about the table that is held, and its seconds."""


def main(*, as_json: bool, quick: bool = False) -> None:
    seconds = 8.0 if quick else 60.0
    with (
        servers(physical=1, logical_shards=SHARDS) as local,
        tempfile.TemporaryDirectory() as folder,
    ):
        _, topology = load(local.config_path)
        write(Path(folder), 1, 'op.create_table("t", big("id", primary_key=True), big("n"))')
        write(Path(folder), 2, 'op.create_table("u", big("id", primary_key=True), big("n"))')
        applied(topology, folder)
        with connect(topology.physical["alpha"], admin=True) as admin:
            for n in range(SHARDS):
                for table in ("t", "u"):
                    rows = f"SELECT i, 0 FROM generate_series(1, {ROWS}) AS i"
                    admin.execute(f"INSERT INTO shard_{n:04}.{table} {rows}".encode())
        write(Path(folder), 3, 'op.add_column("t", text("more"))')
        with blocker(topology) as holder:
            before = worked(topology, lambda: time.sleep(seconds / 2))
            command = [
                *(sys.executable, "-m", "shardkit", "migrate", "apply", "--wave", "all"),
                *("--config", str(local.config_path), "--migrations", folder),
                *("--lock-attempts", "1000"),
            ]
            with subprocess.Popen(command, stdout=subprocess.DEVNULL) as run:
                beside = worked(topology, lambda: time.sleep(seconds))
                still = run.poll() is None
                holder.execute("ROLLBACK")
                code = run.wait(60)
        after = worked(topology, lambda: time.sleep(seconds / 2))
        if code or not still:
            sys.exit(f"the migration did not wait for the blocker: exit code {code}")
        found = drift(topology, migrate.load_revisions(folder, folder=Path()))
        with blocker(topology):
            naive = worked(topology, lambda: altered(topology, 5.0))
    alone = before + after
    figures = {
        "p99_ratio": p99(beside) / p99(alone),
        "p99_ratio_same_table": p99(only(beside)) / p99(only(alone)),
        "longest_seconds": max(took for _, took in beside),
        "longest_seconds_alone": max(took for _, took in alone),
        "longest_seconds_naive": max(took for _, took in naive),
        "held_up": float(sum(took > 0.2 for _, took in beside)),
        "statements": float(len(beside)),
        "differences_after": float(len(found.differences)),
        "seconds": seconds,
    }
    medians = {
        "p99, blocker alone": p99(alone),
        "p99, beside the migration": p99(beside),
        "p99, beside ALTER TABLE": p99(naive),
    }
    report(
        "migrate_blocker", figures, peers=PEERS, medians=medians, targets=TARGETS, as_json=as_json
    )


def write(folder: Path, n: int, body: str) -> None:
    (folder / "versions").mkdir(exist_ok=True)
    down = f'"r{n - 1:02}"' if n > 1 else "None"
    (folder / "versions" / f"r{n:02}.py").write_text(HEAD.format(n=n, down=down, body=body))


def applied(topology: Topology, folder: str) -> None:
    outcome = migrate.apply(topology, migrate.load_revisions(folder, folder=Path()))
    if outcome.error:
        raise outcome.error


@contextmanager
def blocker(topology: Topology) -> Iterator[psycopg.Connection[Any]]:
    """Hold what a read takes on one table, until the transaction of the connection ends."""
    with connect(topology.physical["alpha"]) as connection:
        connection.execute("BEGIN")
        connection.execute(f"SELECT * FROM {HELD} LIMIT 1".encode())
        yield connection


def altered(topology: Topology, seconds: float) -> None:
    """Run ALTER TABLE as it comes, and give it up after some seconds."""
    with connect(topology.physical["alpha"], admin=True) as admin:
        timer = threading.Timer(seconds, admin.cancel_safe)
        timer.start()
        try:
            admin.execute(f"ALTER TABLE {HELD} ADD COLUMN again text".encode())
        except psycopg.errors.QueryCanceled:
            pass
        finally:
            timer.cancel()


def worked(topology: Topology, meanwhile: Callable[[], None]) -> Timed:
    """Return what the application's statements took while something went on."""
    stop = threading.Event()
    timed: Timed = []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        with connect(topology.physical["alpha"]) as connection:
            while not stop.is_set():
                schema = chance.randrange(SHARDS)
                table = f"shard_{schema:04}.{chance.choice('tu')}"
                one(connection, table, chance, timed)
                stop.wait(0.002)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(THREADS)]
    for thread in threads:
        thread.start()
    try:
        meanwhile()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    return timed


def one(
    connection: psycopg.Connection[Any], table: str, chance: random.Random, timed: Timed
) -> None:
    row = (chance.randint(1, ROWS),)
    text = f"UPDATE {table} SET n = n + 1" if chance.random() < 0.2 else f"SELECT n FROM {table}"
    start = time.perf_counter()
    connection.execute(f"{text} WHERE id = %s".encode(), row)
    timed.append((table == HELD, time.perf_counter() - start))


def only(timed: Timed) -> Timed:
    return [each for each in timed if each[0]]


def p99(timed: Timed) -> float:
    return sorted(took for _, took in timed)[int(len(timed) * 0.99)]
