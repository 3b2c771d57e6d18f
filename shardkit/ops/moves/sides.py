"""What every step of a move stands on: both servers, their connections, and how far it is.

Made by `shardkit.ops.moves.run`; `shardkit.ops.moves.work` adds the steps.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import psycopg

from shardkit.clock import SYSTEM
from shardkit.errors import MoveError
from shardkit.ops.moves import cutover, replication, rows, shapes
from shardkit.ops.moves.machine import BUDGET, STALL, Step
from shardkit.ops.moves.presence import PATIENCE, open_connection
from shardkit.ops.moves.rows import Diff, Key
from shardkit.ops.moves.transitions import (
    Move,
    Row,
)
from shardkit.topology import PhysicalShard, Topology

__all__ = ["Report", "Script", "Sides"]

Connection = psycopg.Connection[Any]

Script = Callable[[PhysicalShard, int, Connection], str]
"""Makes the SQL of an empty logical shard: for which server and number, as this source has it."""


@dataclass(frozen=True, slots=True)
class Report:
    """How far a step is, for those who watch.

    Attributes:
        logical_shard: that is moved.
        step: which step.
        text: what of it, such as a table.
        done: bytes, tables or the like that are through.
        total: of how many; 0 where nobody knows.
        unit: what is counted: "bytes", "tables", "parts"; "" for nothing.
    """

    logical_shard: int
    step: str
    text: str = ""
    done: int = 0
    total: int = 0
    unit: str = ""


@dataclass
class Sides:
    """One attempt at a move, with its connections.

    Attributes:
        inherits: the move whose copy a way back uses; None for a move of its own.
        hot: rows that change too often to compare before the fence.
        fenced: monotonic time at which this mover fenced; None where it has not.
        is_drained: whether the target has everything of the present fence.
        pause: seconds from the fence to the activation, once both are done.
    """

    topology: Topology
    logical_shard: int
    move: Move
    source: PhysicalShard
    target: PhysicalShard
    script: Script
    report: Callable[[Report], None]
    lock_timeout: float
    inherits: str | None = None
    rows: dict[str, Row | None] = field(default_factory=dict)
    hot: dict[str, list[Key]] = field(default_factory=dict)
    fenced: float | None = None
    is_drained: bool = False
    pause: float | None = None
    diff: Diff | None = None
    blocker: str | None = None
    _open: dict[str, Connection] = field(default_factory=dict)
    _print: tuple[str, float] | None = None
    _is_frozen: bool = False
    _left_behind: cutover.Left | None = None
    _has_standbys: bool = True
    _snapshots: tuple[Future[None], ...] = ()
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

    # -- connections

    def on(self, side: str, use: str = "control") -> Connection:
        """Return the connection for a use to "source" or "target"; opened at the first time."""
        key = f"{side} {use}"
        found = self._open.get(key)
        if found is None or found.closed or found.broken:
            shard = self.source if side == "source" else self.target
            # What reads or makes all of it takes as long as it takes.
            patience = PATIENCE if use == "control" else None
            found = open_connection(shard, self.logical_shard, patience=patience)
            self._open[key] = found
            if use == "rows":
                rows.prepare(found)
        return found

    def close(self) -> None:
        """Close every connection."""
        for connection in self._open.values():
            connection.close()
        self._open.clear()
        self._snapshots = ()
        self._is_frozen = False

    def end(self) -> None:
        """Close every connection, and begin nothing more."""
        self.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _url(self, shard: PhysicalShard) -> Any:
        return shard.mover_url or shard.admin_url

    def _seconds_left(self) -> float:
        if self.fenced is None:  # fenced by an attempt before this one
            return 0.5
        return max(0.0, self.fenced + BUDGET - SYSTEM.monotonic())

    def _thaw(self, connection: Connection) -> None:
        self._is_frozen = False
        if not connection.closed:
            connection.execute("ROLLBACK") if connection.info.transaction_status else None

    def _caught_up(self, source: str, target: str) -> None:
        """Return once one side has applied what the other has committed."""
        here, there, number = self.on(source), self.on(target), self.logical_shard
        state = cutover.touch(here, number)
        errors = replication.progress(here, there, number).errors
        for _ in range(round(STALL)):
            if cutover.reached(there, number, state, 1.0) is not None:
                return
            found = replication.progress(here, there, number)
            if found.lost:
                raise MoveError(found.lost)
            if found.errors > errors + 1:
                raise MoveError(f"the target cannot apply: {found.conflicts or 'its log says why'}")
        raise MoveError(f"a change does not arrive in {STALL:.0f} s: the apply has stalled")

    def _compared(self, source: str, target: str, step: Step) -> Diff:
        here, there = self.on(source, "rows"), self.on(target, "rows")
        return rows.compare(
            here,
            there,
            self.logical_shard,
            lambda: self._caught_up(source, target),
            self._on_table(step),
        )

    def _on_table(self, step: Step) -> Callable[[str, int, int], None]:
        return lambda name, done, total: self.report(
            Report(self.logical_shard, step, name, done, total, "tables")
        )

    def compared(self, *, is_handed_over: bool) -> Diff:
        """Compare all rows and the schemas while clients go on.

        Raises:
            MoveError: the schemas differ, or one copy does not follow.
        """
        self._same_shape()
        pair = ("target", "source") if is_handed_over else ("source", "target")
        return self._compared(*pair, Step.VERIFY)

    def same_shape(self) -> list[str]:
        """Return how the schemas differ: somebody has run DDL in spite of the lock."""
        return shapes.differences(self.on("source"), self.on("target"), self.logical_shard)

    def _same_shape(self) -> None:
        if odd := self.same_shape():
            raise MoveError(
                f"the schemas differ: {'; '.join(odd)}",
                hint="DDL in the middle of a move; run it after the move, by shardkit migrate",
            )
