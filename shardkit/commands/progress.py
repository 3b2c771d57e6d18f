"""How a migration goes on, for those who watch: a bar a physical shard, and a line a wave."""

from __future__ import annotations

from collections import Counter
from types import TracebackType
from typing import Any, Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from shardkit.clock import SYSTEM
from shardkit.commands.output import console, printable
from shardkit.ops.plan import MigrationPlan
from shardkit.ops.waves import Wave

__all__ = ["Watching"]

EVERY = 10.0
"""Seconds between two lines about a backfill where no bar can be shown."""


class Watching:
    """Shows what `shardkit.ops.migrate` tells, on standard error; with `quiet` it only counts.

    Attributes:
        left: logical shards that are not done, by physical shard.
    """

    def __init__(self, *, quiet: bool) -> None:
        out = console(stderr=True, markup=False)
        self.left: Counter[str] = Counter()
        self._quiet = quiet
        self._is_live = out.is_terminal and not quiet
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=out,
            disable=not self._is_live,
        )
        self._tasks: dict[tuple[str, ...], Any] = {}
        self._rows: Counter[tuple[str, ...]] = Counter()
        self._next = 0.0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def on_plan(self, plan: MigrationPlan) -> None:
        """Begin a bar for each physical shard with something to do."""
        for part in plan.physical:
            self.left[part.physical] = len(part.work)
            if part.work:
                self._tasks[part.physical,] = self._bar.add_task(
                    part.physical, total=len(part.work)
                )

    def on_done(self, physical: str, _logical_shard: int) -> None:
        """Count a logical shard."""
        self.left[physical] -= 1
        self._bar.advance(self._tasks[physical,])

    def on_rows(self, physical: str, revision: str, rows: int) -> None:
        """Count the rows of a batch."""
        key = (physical, revision)
        self._rows[key] += rows
        about = printable(f"{physical} rows of {revision}")
        if self._is_live:
            if key not in self._tasks:
                self._tasks[key] = self._bar.add_task(about, total=None)
            self._bar.advance(self._tasks[key], rows)
        elif SYSTEM.monotonic() >= self._next:
            self._next = SYSTEM.monotonic() + EVERY
            self.say(f"{about}: {self._rows[key]:,}")

    def on_wave(self, wave: Wave) -> None:
        """Say that a wave begins."""
        self.say(f"wave {wave.name}: {len(wave.logical_shards)} logical shards")

    def interrupted(self) -> None:
        """Say what is left after an interrupt."""
        left = ", ".join(f"{name}: {n} left" for name, n in self.left.items())
        self.say(f"interrupted between transactions; {left or 'nothing begun'}; a rerun continues")

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        if not self._quiet:
            self._bar.console.print(text)
