"""Are ids unique when processes fork, are killed, restart, and the clock steps? `make uniqueness`.

8 processes with 2 threads each mint ids of one logical shard. In mid-run half of the processes
are killed (SIGKILL) and started again, every process forks a child that goes on with what it
inherited, and the clock steps by 5 seconds forwards and back, then back and forwards. Each thread
writes down every id it was given. Afterwards all are read: how many occur twice, and how many are
not larger than the one before in the same thread.

The makers of ids: shardkit's leases; snowflake-id, with an instance number of its own for every
process and under a lock, as its documentation asks; and the published `next_id()`. The clock is
the server's, so it is stepped where the functions read it: `shardkit.id_clock_ms()`, of one line,
is replaced by one that adds a number from a table. Everything around it is what runs in
production, and no other part of shardkit takes part in an id's time. In the published function
`clock_timestamp()` is replaced likewise, in snowflake-id its module's `time`.
"""

from __future__ import annotations

import importlib
import itertools
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from array import array
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from sqlalchemy import MetaData

from benchmarks.measure import connect, database, report, servers
from benchmarks.published import PUBLISHED
from shardkit.config import load
from shardkit.connections import Connections
from shardkit.errors import ShardkitError
from shardkit.ids import EPOCH_MS
from shardkit.minting import IdMinter
from shardkit.testing import wait_until
from shardkit.topology import PhysicalShard, Topology, schema_name

__all__ = ["Outcome", "Trial", "run"]

SHARD = 5
WORKERS, THREADS, BATCH = 8, 2, 100
TIMEOUT = 300.0

Mint = Callable[[int], list[int]]

STEPPED = f"""
CREATE TABLE IF NOT EXISTS shardkit.clock_step (ms bigint NOT NULL);
DELETE FROM shardkit.clock_step;
INSERT INTO shardkit.clock_step VALUES (0);
GRANT SELECT ON shardkit.clock_step TO PUBLIC;
CREATE OR REPLACE FUNCTION shardkit.id_clock_ms() RETURNS bigint LANGUAGE sql VOLATILE AS
'SELECT floor(pg_catalog.date_part(''epoch'', pg_catalog.clock_timestamp()) * 1000)::bigint'
    ' - {EPOCH_MS} + (SELECT ms FROM shardkit.clock_step)'
"""


@dataclass(frozen=True)
class Trial:
    """One run, in a form that other processes can be given.

    Attributes:
        maker: a key of `MAKERS`.
        topology: of one physical shard, whose database the run has to itself.
        folder: where threads write ids down, and the clock's step stands.
        n_ids: how many are minted, all together, at least.
        step: seconds the clock steps by.
    """

    maker: str
    topology: Topology
    folder: Path
    n_ids: int
    step: float = 5.0

    @property
    def shard(self) -> PhysicalShard:
        """The one physical shard."""
        return next(iter(self.topology.physical.values()))


@dataclass(frozen=True)
class Outcome:
    """What the threads had written down.

    Attributes:
        n_ids: ids in all.
        duplicates: ids beyond the first of each value.
        disorder: ids not larger than the one before in their thread.
        seconds: duration of the run.
    """

    n_ids: int
    duplicates: int
    disorder: int
    seconds: float


def run(trial: Trial) -> Outcome:
    """Mint ids under forks, kills and clock steps, and count what went wrong."""
    prepare(trial)
    began = time.perf_counter()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [__name__ if __name__ != "__main__" else "benchmarks.uniqueness"]
    )

    def start(number: int, share: int) -> BaseProcess:
        process = context.Process(target=work, args=(trial, number, share))
        process.start()
        return process

    share = trial.n_ids // WORKERS
    workers = [start(number, share) for number in range(WORKERS)]

    def reach(part: float) -> None:
        def is_reached() -> bool:
            ended = [worker.exitcode for worker in workers if worker.exitcode]
            assert not ended, f"workers ended with {ended}"
            return written(trial) >= trial.n_ids * part

        wait_until(is_reached, TIMEOUT, f"{part:.0%} of the ids are minted")

    try:
        reach(0.15)
        for number in range(0, WORKERS, 2):
            workers[number].kill()
            workers[number].join()
            left = share - written(trial, f"{number}-*")
            workers[number] = start(number, max(left, THREADS * BATCH))
        for part, step in ((0.3, 1), (0.45, 0), (0.6, -1), (0.75, 0)):
            reach(part)
            step_clock(trial, round(step * trial.step * 1000))
        for worker in workers:
            worker.join(TIMEOUT)
            assert worker.exitcode == 0, f"a worker ended with {worker.exitcode}"
    finally:
        for worker in workers:
            worker.kill()
    return judge(trial, time.perf_counter() - began)


def prepare(trial: Trial) -> None:
    """Make the functions with a clock that can be stepped."""
    schema = schema_name(SHARD)
    clock = "EXTRACT(EPOCH FROM clock_timestamp()) * 1000"
    stepped = f"{clock} + (SELECT ms FROM shardkit.clock_step)"
    assert clock in PUBLISHED
    published = PUBLISHED.format(schema=schema, shard=SHARD).replace(clock, stepped)
    with connect(trial.shard, admin=True) as admin:
        admin.execute(STEPPED.encode())
        if trial.maker == "published":
            admin.execute(published.encode())
    step_file(trial).write_text("0")


def step_clock(trial: Trial, ms: int) -> None:
    with connect(trial.shard, admin=True) as admin:
        admin.execute("UPDATE shardkit.clock_step SET ms = %s", (ms,))
    step_file(trial).write_text(str(ms))


def step_file(trial: Trial) -> Path:
    return trial.folder / "step"


def written(trial: Trial, files: str = "*-*") -> int:
    """Return how many ids have been written down."""
    return sum(file.stat().st_size for file in trial.folder.glob(files)) // 8


# -- in the workers


def leases(trial: Trial, _number: int) -> Mint:
    """shardkit: blocks much larger than a batch, so that a child inherits most of one."""
    connections = Connections(trial.topology)
    minter = IdMinter(connections.lease_ids, block_size=4096)
    return lambda n: minter.mint({SHARD: n})[SHARD]


def snowflakes(trial: Trial, number: int) -> Mint:
    """snowflake-id, as kindly as can be."""
    module: Any = importlib.import_module("snowflake.snowflake")
    state = {"read": 0.0, "step": 0.0}

    def stepped() -> float:
        now = time.time()
        if now - state["read"] > 0.01:
            text = step_file(trial).read_text()
            state.update(read=now, step=int(text or "0") / 1000)
        return now + state["step"]

    module.time = stepped
    generator = module.SnowflakeGenerator(number)
    lock, pause = threading.Lock(), threading.Event()
    os.register_at_fork(
        before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release
    )

    def mint(n: int) -> list[int]:
        pause.wait(0.001)  # else it is done before anything has happened to it
        with lock:
            return [new for new in itertools.islice(generator, n) if new is not None]

    return mint


def published(trial: Trial, _number: int) -> Mint:
    """The published function, over a connection for each thread of each process."""
    mine = threading.local()
    query = f"SELECT array_agg({schema_name(SHARD)}.next_id()) FROM generate_series(1, %s)".encode()

    def mint(n: int) -> list[int]:
        if getattr(mine, "owner", None) != os.getpid():
            mine.connection, mine.owner = connect(trial.shard), os.getpid()
        made: list[int] = mine.connection.execute(query, (n,)).fetchone()[0]
        return made

    return mint


MAKERS = {"leases": leases, "snowflake": snowflakes, "published": published}


def work(trial: Trial, number: int, share: int) -> None:
    """Mint a share of the ids, the second half of it together with a forked child."""
    mint = MAKERS[trial.maker](trial, number)
    threads = mint_in_threads(trial, mint, f"{number}-{os.getpid()}-", share - share // 4)
    mine = f"{number}-{os.getpid()}-*"
    wait_until(lambda: written(trial, mine) >= share // 2, TIMEOUT, "half are minted")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            name = f"{number}-{os.getpid()}-"
            for thread in mint_in_threads(trial, mint, name, share // 4):
                thread.join()
            code = 0
        finally:
            os._exit(code)
    for thread in threads:
        thread.join()
    _, status = os.waitpid(child, 0)
    sys.exit(os.waitstatus_to_exitcode(status))


def mint_in_threads(trial: Trial, mint: Mint, name: str, n: int) -> list[threading.Thread]:
    def loop(file: Path) -> None:
        left = -(-n // THREADS)
        with file.open("ab", buffering=0) as notes:
            while left > 0:
                try:
                    made = mint(min(BATCH, left))
                except ShardkitError as error:
                    if not error.retryable:
                        raise
                    made = []
                if made:
                    notes.write(array("q", made).tobytes())
                    left -= len(made)
                else:
                    pause.wait(0.02)

    pause = threading.Event()
    files = [trial.folder / f"{name}{thread}" for thread in range(THREADS)]
    threads = [threading.Thread(target=loop, args=(file,)) for file in files]
    for thread in threads:
        thread.start()
    return threads


# -- afterwards


def judge(trial: Trial, seconds: float) -> Outcome:
    """Read everything that was written down; window by window, since 20 M are many."""
    notes = []
    disorder = 0
    for file in trial.folder.glob("*-*"):
        made = array("q", file.read_bytes())
        disorder += sum(a >= b for a, b in itertools.pairwise(made))
        notes.append(array("q", sorted(made)))
    notes = [made for made in notes if made]
    n_ids = sum(map(len, notes))
    lowest, highest = min(made[0] for made in notes), max(made[-1] for made in notes)
    n_windows = n_ids // 500_000 + 1
    edges = [lowest + (highest + 1 - lowest) * i // n_windows for i in range(n_windows + 1)]
    unique = 0
    for low, high in itertools.pairwise(edges):
        window: set[int] = set()
        for made in notes:
            window.update(made[bisect_left(made, low) : bisect_left(made, high)])
        unique += len(window)
    return Outcome(n_ids, n_ids - unique, disorder, seconds)


def main(*, as_json: bool, quick: bool = False) -> None:
    sizes = {"leases": 20_000_000, "snowflake": 2_000_000, "published": 2_000_000}
    scale, step = (10, 0.2) if quick else (1, 5.0)
    figures: dict[str, float] = {}
    medians: dict[str, float] = {}
    settings = {"max_connections": "100"}
    with servers(physical=1, logical_shards=64, settings=settings) as local:
        _, topology = load(local.config_path)
        for maker, n_ids in sizes.items():
            made = database(local, topology, maker, logical_shards=64, metadata=MetaData())
            with tempfile.TemporaryDirectory() as folder:
                trial = Trial(maker, made, Path(folder), n_ids // scale, step=step)
                outcome = run(trial)
            figures |= {
                f"{maker}_ids": outcome.n_ids,
                f"{maker}_duplicates": outcome.duplicates,
                f"{maker}_out_of_order": outcome.disorder,
            }
            medians[f"{maker}, the whole run"] = outcome.seconds
    targets = {
        "leases_ids": f"≥ {sizes['leases'] // scale}",
        "leases_duplicates": "≤ 0",
        "leases_out_of_order": "≤ 0",
        "snowflake_duplicates": "≥ 1",
        "published_duplicates": "≥ 1",
    }
    peers = ("snowflake-id", "published next_id()")
    report("uniqueness", figures, peers=peers, medians=medians, targets=targets, as_json=as_json)
