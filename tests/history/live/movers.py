"""What moves logical shards in the history test, behind one interface."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import Any, Final

from shardkit.errors import RefusedError
from tests.fixtures.movers import Mover as StandIn
from tests.history.live.plan import draw_of
from tests.history.live.stage import Stage
from tests.history.live.tables import Base
from tests.history.live.witness import image

__all__ = ["RealMover", "StandInMover"]


class StandInMover:
    """The mover that copies while the source is fenced; for scenarios that need no more."""

    is_sturdy = False

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def move(self, shard: int, source: str, target: str) -> bool:
        """Move a logical shard; compare both sides between decision and activation."""
        stage = self._stage
        mover = StandIn(stage.local, stage.topology, shard, source, target, metadata=Base.metadata)
        name = str(uuid.uuid4())
        tables = [table.name for table in Base.metadata.sorted_tables]
        try:
            mover.prepare()
            mover.fence()
            mover.copy()
            mover.decide()
            for side, connection in (("source", mover.reads), ("target", mover.writes)):
                stage.recorder.fact(
                    "image", move=name, shard=shard, side=side,
                    image=image(connection, shard, tables),
                )  # fmt: skip
            mover.activate()
        except RefusedError:  # with a bug, two servers own it
            return False
        finally:
            mover.close()
        return True

    def settle(self) -> None:
        """Nothing is left of it."""

    def close(self) -> None:
        """Nothing is left of it."""


_PATIENCE: Final = 120.0
"""Seconds in which a move has to come to its end, whatever happens to it."""


class RealMover:
    """`shardkit move` in a process of its own, which is killed and frozen now and then.

    Whoever comes next resumes, or gives up; afterwards the old copy is forgotten, or the logical
    shard moves back by it.

    Args:
        stage: whose logical shards move.
        dies: share of the moves whose mover dies on the way.
    """

    is_sturdy = True

    def __init__(self, stage: Stage, *, dies: float = 0.15) -> None:
        self._stage = stage
        self._dies = dies
        self._draw = draw_of(stage.plan, "mover")
        self._child: subprocess.Popen[bytes] | None = None
        self._buffer = b""
        self.counts: Counter[str] = Counter()
        self.said: Counter[str] = Counter()

    def move(self, shard: int, source: str, target: str) -> bool:
        """Move a logical shard, and see it through."""
        del source  # the mover finds out
        until = time.monotonic() + _PATIENCE
        told = self._ask("move", shard, target=target)
        while told["end"] in {"again", "dead"}:
            if time.monotonic() > until:
                raise AssertionError(f"move of {shard} has no end: {told}; {dict(self.said)}")
            time.sleep(0.2 + 0.5 * self._draw.random())
            way = "abort" if told["end"] == "dead" and self._draw.random() < 0.3 else "resume"
            self.counts[f"{way} of a move"] += 1
            told = self._ask(way, shard)
        if told["end"] == "refused" and "nothing" not in told["why"]:
            self.said[f"refused: {told['why']}"] += 1
        is_moved = self._has_moved(shard, target)
        if is_moved:
            way = "rollback" if self._draw.random() < 0.15 else "clean"
            self.counts[f"{way} of a move"] += 1
            self._see_through(way, shard, until)
        return is_moved

    def _see_through(self, way: str, shard: int, until: float) -> None:
        told = self._ask(way, shard)
        while told["end"] in {"again", "dead"}:
            if time.monotonic() > until:
                raise AssertionError(f"{way} of {shard} has no end: {told}; {dict(self.said)}")
            time.sleep(0.2 + 0.3 * self._draw.random())
            told = self._ask("resume", shard)
        if way == "rollback":  # whatever came of it, what is left has to go
            self._see_through("clean", shard, until)

    def settle(self) -> None:
        """End what is under way, and forget every old copy."""
        until = time.monotonic() + _PATIENCE
        self._dies = 0.0
        for shard in range(self._stage.plan.logical_shards):
            self._see_through("resume", shard, until)
            self._see_through("clean", shard, until)

    def _has_moved(self, shard: int, target: str) -> bool:
        return self._stage.owner_of(shard) == target

    def _ask(self, do: str, shard: int, **more: Any) -> dict[str, Any]:
        """Have the process do something; return what came of it."""
        child = self._child
        if child is None or child.poll() is not None:
            self.close()
            child = self._child = self._started()
        assert child.stdin is not None, "it is piped"
        child.stdin.write(json.dumps({"do": do, "shard": shard, **more}).encode() + b"\n")
        child.stdin.flush()
        dies_after = self._draw.randrange(30) if self._draw.random() < self._dies else None
        for n in range(10_000):
            said = self._line(child, _PATIENCE)
            if said is None:
                child.kill()
                child.wait()
                return {"end": "dead", "why": "it says nothing"}
            if "end" in said:
                if said["end"] in {"again", "failed", "given up"}:
                    self.said[f"{do}: {said['end']}: {said['why'][:160]}"] += 1
                return said
            if n == dies_after:
                return self._struck(child)
        raise AssertionError("a mover says too much")

    def _struck(self, child: subprocess.Popen[bytes]) -> dict[str, Any]:
        """Kill it, or freeze it for long enough that another takes over, and then kill it."""
        if self._draw.random() < 0.7:
            self.counts["kill mover"] += 1
            child.kill()
        else:
            self.counts["freeze mover"] += 1
            child.send_signal(signal.SIGSTOP)
            time.sleep(self._draw.random() * 3)
            child.send_signal(signal.SIGCONT)
            said: dict[str, Any] | None = {}
            while said is not None and "end" not in said:
                said = self._line(child, _PATIENCE)
            return said or {"end": "dead", "why": "frozen"}
        child.wait()
        return {"end": "dead", "why": "killed"}

    def _line(self, child: subprocess.Popen[bytes], seconds: float) -> dict[str, Any] | None:
        assert child.stdout is not None, "it is piped"
        until = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([child.stdout], [], [], max(0.0, until - time.monotonic()))
            data = os.read(child.stdout.fileno(), 65536) if ready else b""
            if not data:
                return None
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        said: dict[str, Any] = json.loads(line)
        return said

    def _started(self) -> subprocess.Popen[bytes]:
        root = Path(__file__).parents[3]
        self._buffer = b""
        with (Path(self._stage.plan.folder) / "mover.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "tests.history.live.moving", str(self._stage.plan.path)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, cwd=root,
                env={**os.environ, "PYTHONPATH": str(root)},
            )  # fmt: skip

    def close(self) -> None:
        """End the process."""
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None
