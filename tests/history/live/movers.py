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
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from shardkit.errors import RefusedError
from tests.fixtures.movers import Mover as StandIn
from tests.history.live.plan import draw_of
from tests.history.live.stage import Stage
from tests.history.live.tables import Base
from tests.history.live.witness import image

__all__ = ["AtStep", "RealMover", "StandInMover", "movers"]

AtStep = Callable[[int, str, str, str], None]
"""Told the logical shard, source, target and name of each step; the mover waits meanwhile."""


def _nothing(_shard: int, _source: str, _target: str, _step: str) -> None:
    pass


class StandInMover:
    """The mover that copies while the source is fenced; for scenarios that need no more."""

    is_sturdy = False

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self.shards: Sequence[int] = range(stage.plan.logical_shards)
        self.at_step: AtStep = _nothing

    def move(self, shard: int, source: str, target: str) -> int:
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
            return 0
        finally:
            mover.close()
        return 1

    def settle(self) -> None:
        """Nothing is left of it."""

    def close(self) -> None:
        """Nothing is left of it."""


_PATIENCE: Final = 180.0
"""Seconds in which a move has to come to its end, whatever happens to it."""


class RealMover:
    """`shardkit move` in a process of its own, which is killed and frozen now and then.

    Whoever comes next resumes, or gives up; afterwards the old copy is forgotten, or the logical
    shard moves back by it.

    Args:
        stage: whose logical shards move.
        hand: number of this mover; several work side by side, each on shards of its own.
        hands: how many there are.
        dies: share of the moves whose mover dies on the way.

    Attributes:
        shards: that it moves.
        at_step: see `AtStep`.
        counts: what it did how often.
        said: what came in its way, by text.
    """

    is_sturdy = True

    def __init__(self, stage: Stage, *, hand: int = 0, hands: int = 1, dies: float = 0.1) -> None:
        self._stage = stage
        self._dies = dies
        self._draw = draw_of(stage.plan, f"mover {hand}")
        self._child: subprocess.Popen[bytes] | None = None
        self._buffer = b""
        self._ends = ("", "")
        self.shards: Sequence[int] = range(hand, stage.plan.logical_shards, hands)
        self.at_step: AtStep = _nothing
        self.counts: Counter[str] = Counter()
        self.said: Counter[str] = Counter()

    def move(self, shard: int, source: str, target: str) -> int:
        """Move a logical shard, and see it through; return how often it has changed hands."""
        until = time.monotonic() + _PATIENCE
        self._ends = source, target
        told = self._ask("move", shard, target=target)
        while told["end"] in {"again", "dead"}:
            self._check(until, f"move of {shard}", told)
            way = "abort" if told["end"] == "dead" and self._draw.random() < 0.3 else "resume"
            self.counts[f"{way} of a move"] += 1
            told = self._ask(way, shard)
        if told["end"] == "refused" and "nothing" not in told["why"]:
            self.said[f"refused: {told['why']}"] += 1
            if "shardkit move clean" in told["why"]:
                self._see_through("clean", shard)
                return 0
        if self._stage.owner_of(shard) != target:
            return 0
        if self._draw.random() >= 0.2:
            self._see_through("clean", shard)
            return 1
        self._ends = target, source
        self._see_through("rollback", shard)
        is_back = self._stage.owner_of(shard) == source
        # Whatever came of it, what is left has to go.
        self._see_through("clean", shard)
        return 1 + is_back

    def _see_through(self, way: str, shard: int) -> None:
        until = time.monotonic() + _PATIENCE
        self.counts[f"{way} of a move"] += 1
        told = self._ask(way, shard)
        while told["end"] in {"again", "dead"}:
            self._check(until, f"{way} of {shard}", told)
            # Of a move that is over there is nothing to resume: what is left of it is asked for.
            told = self._ask("clean" if way == "clean" else "resume", shard)

    def _check(self, until: float, what: str, told: dict[str, Any]) -> None:
        """Pause; a move that has no end is a finding."""
        if time.monotonic() > until:
            raise AssertionError(f"{what} has no end: {told}; {dict(self.said)}")
        time.sleep(0.2 + 0.3 * self._draw.random())

    def settle(self) -> None:
        """End what is under way, and forget every old copy."""
        self._dies = 0.0
        for shard in self.shards:
            self._see_through("resume", shard)
            self._see_through("clean", shard)

    def _ask(self, do: str, shard: int, **more: Any) -> dict[str, Any]:
        """Have the process do something; return what came of it."""
        child = self._child
        if child is None or child.poll() is not None:
            self.close()
            child = self._child = self._started()
        self._tell(child, {"do": do, "shard": shard, **more})
        dies_after = self._draw.randrange(30) if self._draw.random() < self._dies else None
        for n in range(10_000):
            said = self._line(child, _PATIENCE)
            if said is None:
                child.kill()
                child.wait()
                return {"end": "dead", "why": "it says nothing"}
            if "end" in said:
                text = f"{do}: {said['end']}: {said['why'][:160]}"
                self._stage.note(f"{shard} {text}")
                if said["end"] in {"again", "failed", "given up"}:
                    self.said[text] += 1
                return said
            self._stage.note(f"{shard} {do}: {said['step']}")
            self.at_step(shard, *self._ends, said["step"])
            if n == dies_after and (end := self._struck(child)) is not None:
                return end
            self._tell(child, {})
        raise AssertionError("a mover says too much")

    def _struck(self, child: subprocess.Popen[bytes]) -> dict[str, Any] | None:
        """Kill it, or freeze it for a while, in which others may lift its fence."""
        if self._draw.random() < 0.7:
            self.counts["kill mover"] += 1
            child.kill()
            child.wait()
            return {"end": "dead", "why": "killed"}
        self.counts["freeze mover"] += 1
        child.send_signal(signal.SIGSTOP)
        time.sleep(self._draw.random() * 7)
        child.send_signal(signal.SIGCONT)
        return None

    def _tell(self, child: subprocess.Popen[bytes], what: dict[str, Any]) -> None:
        assert child.stdin is not None, "it is piped"
        with suppress(BrokenPipeError):  # then it says nothing any more
            child.stdin.write(json.dumps(what).encode() + b"\n")
            child.stdin.flush()

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


def movers(hands: int) -> Callable[[Stage], Sequence[RealMover]]:
    """Return what makes movers that work side by side."""
    return lambda stage: [RealMover(stage, hand=n, hands=hands) for n in range(hands)]
