"""The crash grid of moves: every persisted step by {mover, source, target} by {kill, freeze, cut}.

    make move-grid                                   # all of it
    python -m tests.fault.movegrid --only source     # cells whose name has the text

In each cell a mover in a process of its own comes to a step and is held there; something breaks
and is healed; the mover goes on as far as it can; then somebody resumes the move or gives it up,
in turns. A writer writes all the while. A cell is well when the move is at an end within a minute
of the healing, nothing is left behind, and every acknowledged row is with the owner.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shardkit.config import load
from shardkit.errors import ShardkitError
from shardkit.local import LocalCluster
from shardkit.ops import moves
from shardkit.ops.moves.machine import FORWARD, Goal, Step
from shardkit.testing import FaultProxy
from tests.fixtures.clients import new_user
from tests.fixtures.moved import SCRIPT, Servers
from tests.fixtures.servers import options
from tests.models import Photo

__all__ = ["CELLS", "Cell", "Grid"]

LIMIT = 60.0
"""Seconds from the healing within which a move has to be at an end."""

HELD = 1.5
"""Seconds for which a server is frozen or cut off."""

_QUIET = {Step.DRAIN, Step.DECIDE, Step.ACTIVATE}
STEPS = [
    "begin done",
    *(
        f"{step} {what}"
        for step in FORWARD
        for what in ("begun", "done")
        if what == "done" or step not in _QUIET
    ),
]
"""Where a mover writes something down, by the names of its hook."""


@dataclass(frozen=True)
class Cell:
    """One fault at one step.

    Attributes:
        ending: `resume` or `abort`: what is done once it is healed.
    """

    step: str
    victim: str
    fault: str
    ending: str

    @property
    def name(self) -> str:
        """What it is called."""
        return f"{self.step} / {self.victim} / {self.fault} / {self.ending}"


CELLS = [
    Cell(step, victim, fault, ("resume", "abort")[n % 2])
    for n, (step, victim, fault) in enumerate(
        itertools.product(STEPS, ("mover", "source", "target"), ("kill", "freeze", "cut"))
    )
]


def run_mover(
    config: Path, ports: dict[str, int], shard: int, target: str, step: str, pipe: Any
) -> None:
    """Move a logical shard by way of proxies; be held at a step until told to go on."""
    _, topology = load(config)
    through = {
        name: replace(
            physical, admin_url=physical.admin_url.set(host="127.0.0.1", port=ports[name])
        )
        for name, physical in topology.physical.items()
    }
    topology = replace(topology, physical=through)

    times = itertools.count()

    def hook(name: str) -> None:
        if name == step and next(times) == 0:
            pipe.send("reached")
            pipe.recv()

    try:
        moves.move(topology, shard, target, script=SCRIPT, options=moves.Options(hook=hook))
    except ShardkitError as error:
        pipe.send(f"{type(error).__name__}: {error}")
        os._exit(4)
    pipe.send("moved")
    os._exit(0)


class Writer:
    """Writes rows of one owner until it is told to stop; knows which were acknowledged."""

    def __init__(self, servers: Servers, shard: int) -> None:
        self.acknowledged: list[str] = []
        self._cluster = servers.cluster()
        self._owner = new_user(self._cluster, shard)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stop."""
        self._stop.set()
        self._thread.join(60.0)
        self._cluster.close()

    def missing(self, servers: Servers, shard: int) -> set[str]:
        """Return what was acknowledged and is not there, or is there twice."""
        query = f"SELECT caption FROM {{}}.photos WHERE owner_id = {self._owner}"
        there = [str(text) for (text,) in servers.fetch(shard, query)]
        twice = {text for text in there if there.count(text) > 1} if len(there) < 5000 else set()
        return (set(self.acknowledged) - set(there)) | twice

    def _work(self) -> None:
        for n in itertools.count():
            if self._stop.wait(0.02):
                return

            def unit(session: Any, caption: str = f"c{n}") -> None:
                session.add(Photo(owner_id=self._owner, caption=caption))

            try:
                self._cluster.run(unit)
            except Exception:  # noqa: BLE001  the server is down, or the outcome unknown
                continue
            self.acknowledged.append(f"c{n}")


class Grid:
    """The servers on which cells are run, one after the other."""

    def __init__(self, local: LocalCluster, stack: ExitStack) -> None:
        self.servers = Servers(local)
        self._local = local
        self._shards = itertools.cycle(range(self.servers.topology.n_logical_shards))
        self.proxies = {
            name: stack.enter_context(FaultProxy(shard.admin_url.host, shard.admin_url.port))
            for name, shard in self.servers.topology.physical.items()
        }

    def run(self, cell: Cell) -> dict[str, Any]:
        """Run a cell; return how it went, with `problem` where it did not go well."""
        shard = next(self._shards)
        source, target = self.servers.owner(shard), self.servers.other(shard)
        writer = Writer(self.servers, shard)
        context = multiprocessing.get_context("spawn")
        pipe, there = context.Pipe()
        ports = {name: proxy.port for name, proxy in self.proxies.items()}
        process = context.Process(
            target=run_mover,
            args=(self._local.config_path, ports, shard, target, cell.step, there),
            daemon=True,
        )
        process.start()
        found: dict[str, Any] = {"cell": cell.name}
        try:
            said = pipe.recv() if pipe.poll(240.0) else "nothing"
            if said != "reached":
                process.kill()
                process.join(10.0)
                self._finish(shard, "abort", time.monotonic() + LIMIT)
                return {**found, "problem": f"it did not come to the step: {said}"}
            self._break(cell, process, pipe, {"source": source, "target": target}.get(cell.victim))
            healed = time.monotonic()
            if cell.victim != "mover" or cell.fault == "cut":
                process.join(30.0)
            found["mover"] = pipe.recv() if pipe.poll() else "killed, or hangs"
            if process.is_alive() and cell.fault != "freeze":
                process.kill()
            problem = self._finish(shard, cell.ending, healed + LIMIT)
            found["seconds"] = round(time.monotonic() - healed, 2)
            if cell.victim == "mover" and cell.fault == "freeze":
                os.kill(process.pid or 0, signal.SIGCONT)
                pipe.send("go")
                process.join(30.0)
                if process.is_alive():
                    problem = problem or "the frozen mover did not end"
            else:
                process.kill()
            owner = self.servers.owner(shard)
            found["moved"] = owner == target
            if found["moved"]:
                moves.clean(self.servers.topology, shard)
            writer.end()
            if missing := writer.missing(self.servers, shard):
                problem = f"lost or twice: {sorted(missing)[:3]}"
            found["acknowledged"] = len(writer.acknowledged)
            leftovers = self._leftovers()
            if leftovers:
                problem = problem or f"left behind: {leftovers}"
        finally:
            process.kill()
            process.join(10.0)
            writer.end()
        return {**found, **({"problem": problem} if problem else {})}

    def _break(self, cell: Cell, process: Any, pipe: Any, physical: str | None) -> None:
        if cell.victim == "mover" and cell.fault == "kill":
            process.kill()
            process.join(10.0)
        elif cell.victim == "mover" and cell.fault == "freeze":
            os.kill(process.pid, signal.SIGSTOP)
        elif cell.fault == "cut":
            cut = [self.proxies[physical]] if physical else [*self.proxies.values()]
            for proxy in cut:
                proxy.black_hole()
            pipe.send("go")
            time.sleep(HELD)
            for proxy in cut:
                proxy.heal()
        else:
            name = self._local.primary(physical or "").name
            if cell.fault == "kill":
                self._local.kill_server(name)
                pipe.send("go")
                time.sleep(0.3)
                self._local.start_server(name)
            else:
                self._local.pause(name)
                pipe.send("go")
                time.sleep(HELD)
                self._local.resume(name)

    def _finish(self, shard: int, ending: str, until: float) -> str | None:
        """Resume or give up until the move is at an end; return why it is not."""
        problem = "it never ended"
        while time.monotonic() < until:
            try:
                known = [
                    k for k in moves.status(self.servers.topology)[0] if k.logical_shard == shard
                ]
                if not known:
                    return None
                if known[-1].is_handed_over and Step.CHECK in known[-1].journal.done(Goal.MOVE):
                    return None
                if ending == "resume" or known[-1].is_handed_over:
                    moves.resume(self.servers.topology, shard, script=SCRIPT)
                else:
                    moves.abort(self.servers.topology, shard, script=SCRIPT)
            except ShardkitError as error:
                problem = f"{type(error).__name__}: {error}"
            time.sleep(0.1)
        return problem

    def _leftovers(self) -> list[str]:
        """Return what is left behind once those that are about to go have gone."""
        until = time.monotonic() + 10.0
        while True:
            found = self.servers.leftovers()
            if not found or time.monotonic() > until:
                return found
            time.sleep(0.1)


@contextmanager
def grid(folder: Path) -> Iterator[Grid]:
    """Run two servers with proxies before them."""
    shape = options(replicas=0, logical_shards=4, redis=False, memcached=False, pgbouncer=False)
    with ExitStack() as stack:
        local = stack.enter_context(LocalCluster(folder / "cluster", shape))
        yield Grid(local, stack)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run cells, print how each went, and a summary as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cells whose name has this text")
    parser.add_argument("--first", type=int, default=0, help="cells to leave out at the beginning")
    parser.add_argument("--every", type=int, default=1, help="one cell of so many")
    given = parser.parse_args(arguments)
    cells = [cell for cell in CELLS if given.only in cell.name][given.first :: given.every]
    took: list[float] = []
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # the servers run under an account of their own
        with grid(Path(folder)) as servers:
            for cell in cells:
                found = servers.run(cell)
                took.append(found.get("seconds", 0.0))
                bad += "problem" in found
                print(json.dumps(found), flush=True)
    summary = {
        "cells": len(cells),
        "bad": bad,
        "longest_s": max(took, default=0.0),
        "median_s": sorted(took)[len(took) // 2] if took else 0.0,
    }
    print(json.dumps(summary), flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
