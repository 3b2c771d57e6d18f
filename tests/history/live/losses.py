"""Primaries that are lost for good: killed or frozen at any time, or at a named step of a move.

The watcher of `shardkit failover` has to replace each of them; how often it did, and how often
logical shards were moving then, is counted here.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import psycopg

from shardkit.testing import wait_until
from tests.history.live.stage import Stage
from tests.history.live.watching import Watching

__all__ = ["LONGEST", "STEPS", "Losses"]

LONGEST: Final = 120.0
"""Seconds that a failover may take until every server follows again, on a busy machine."""

STEPS: Final = (
    "begin done", "copy begun", "copy done", "follow done", "catch up done", "verify begun",
    "prepare back done", "fence begun", "fence done", "drain done", "decide done",
    "activate done", "turn done", "check done", "detach done", "drop source done",
)  # fmt: skip
"""Steps of a move at which a primary is lost; the mover waits until it is."""

_AT_A_STEP: Final = 0.75
"""Share of the losses that wait for a step of a move."""

_PATIENCE: Final = 15.0
"""Seconds to wait for a step; a loss whose step does not come happens all the same."""


_AT_ONCE: Final = 2.0
"""Seconds, at most, that a mover waits at its step for the loss."""


@dataclass(eq=False)
class _Loss:
    """One loss.

    Attributes:
        step: of a move at which it happens.
        is_source: whether the source of that move loses its primary, else the target.
        how: `kill` or `freeze`.
        done: set when it has happened, or could not.
        name: of the server; empty for none.
        physical: whose primary it was.
    """

    step: str
    is_source: bool
    how: str
    done: threading.Event = field(default_factory=threading.Event)
    name: str = ""
    physical: str = ""


class Losses:
    """Has primaries lost, one after the other.

    Args:
        stage: whose primaries.
        counts: of what was done.
        is_moving: whether any logical shard moves now.

    Attributes:
        watching: the watcher that replaces them.
    """

    def __init__(self, stage: Stage, counts: Counter[str], is_moving: Callable[[], bool]) -> None:
        self._stage = stage
        self._counts = counts
        self._is_moving = is_moving
        self._lock = threading.Lock()
        self._wanted: _Loss | None = None
        self._replaced: Counter[str] = Counter()
        self._in_move: dict[str, bool] = {}
        self.watching = Watching(stage, self._failed_over)

    def at_step(self, shard: int, source: str, target: str, step: str) -> None:
        """Have the loss happen that waits for this step."""
        with self._lock:
            loss = self._wanted
            if loss is None or loss.step != step:
                return
            self._wanted = None
        physical = source if loss.is_source else target
        self._stage.note(f"{shard}: {physical} is lost at {step}")
        self._lose(loss, physical)

    def lose(self, draw: random.Random, stop: threading.Event, *, has_moves: bool) -> None:
        """Lose a primary; wait until another has taken its place, and all servers follow it."""
        physical = draw.choice(sorted(self._stage.topology.physical))
        how = draw.choice(("kill", "kill", "freeze"))
        loss = _Loss(draw.choice(STEPS), draw.random() < 0.5, how)
        at_a_step = has_moves and draw.random() < _AT_A_STEP
        if not self.watching.are_well():
            stop.wait(0.1)
            return
        before = Counter(self._replaced)
        if at_a_step:
            self._wanted = loss
            loss.done.wait(_PATIENCE)
            with self._lock:
                is_late, self._wanted = self._wanted is loss, None
            if not is_late:
                loss.done.wait(LONGEST)
                self._counts["primaries lost at a step of a move"] += bool(loss.name)
                self._counts[f"(lost at {loss.step})"] += bool(loss.name)
        if not loss.done.is_set() and not stop.is_set():
            self._lose(loss, physical)
        if not loss.name:
            stop.wait(0.1)
            return
        wait_until(
            lambda: (
                self._replaced[loss.physical] > before[loss.physical]
                and self.watching.is_well(loss.physical)
            ),
            LONGEST,
            f"another primary of {loss.physical}: {self.watching.latest}",
        )

    def _lose(self, loss: _Loss, physical: str) -> None:
        stage = self._stage
        try:
            name = stage.primary(physical).name
            self._in_move[physical] = self._is_moving()
            began = time.monotonic_ns()
            if not stage.lock.acquire(timeout=_AT_ONCE):  # servers are made anew
                return
            try:
                if not self.watching.is_well(physical):  # one more would be too many
                    return
                if loss.how == "kill":
                    stage.local.kill_server(name)
                else:
                    stage.local.pause(name)
                stage.lost.add(name)
            finally:
                stage.lock.release()
            loss.name, loss.physical = name, physical
            self._counts[f"{loss.how} a primary for good"] += 1
            stage.fault(f"{loss.how} {name} for good", began)
        except psycopg.Error:  # it has none now
            return
        finally:
            loss.done.set()

    def _failed_over(self, physical: str) -> None:
        self._counts["failovers"] += 1
        self._counts["failovers during a move"] += self._in_move.pop(physical, self._is_moving())
        self._replaced[physical] += 1
        self._stage.lost -= {server.name for server in self._stage.members(physical)}
        self._stage.note(f"{physical} has another primary")
