"""How moves go on, for those who watch: a bar a logical shard, with rate and estimate."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from shardkit.clock import SYSTEM
from shardkit.commands.output import console, printable
from shardkit.errors import ShardkitError
from shardkit.garbage import being_aside
from shardkit.ops.moves import MovePlan, Outcome, Report
from shardkit.ops.moves.journal import Known
from shardkit.ops.moves.machine import Goal

__all__ = ["Moving", "outcome_line", "plan_table", "status_table"]

EVERY = 5.0
"""Seconds between two lines about a copy where no bar can be shown."""


class Moving:
    """Shows what `shardkit.ops.moves` tells, on standard error. Thread-safe."""

    def __init__(self, *, quiet: bool) -> None:
        out = console(stderr=True, markup=False)
        self._quiet = quiet
        self._is_live = out.is_terminal and not quiet
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[rate]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=out,
            disable=not self._is_live,
        )
        self._tasks: dict[int, Any] = {}
        self._steps: dict[int, tuple[str, float]] = {}
        self._next: dict[int, float] = {}
        self._lock = threading.Lock()
        self._aside = ExitStack()

    def __enter__(self) -> Self:
        # A full collection in the middle of a hand-over takes longer than the hand-over.
        self._aside.enter_context(being_aside())
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()
        self._aside.close()
        if kind is KeyboardInterrupt:
            self._bar.console.print(
                "interrupted; shardkit move resume goes on, shardkit move abort gives it up"
            )

    def on_report(self, report: Report) -> None:
        """Show how far a move is."""
        if self._quiet:
            return
        with self._lock:
            number, now = report.logical_shard, SYSTEM.monotonic()
            step, since = self._steps.get(number, ("", now))
            is_new = step != report.step
            if is_new:
                since = now
                self._steps[number] = report.step, now
            about = printable(f"{number}: {report.step} {report.text}".strip())
            rate = _rate(report, now - since)
            if self._is_live:
                if number not in self._tasks:
                    self._tasks[number] = self._bar.add_task(about, total=None, rate="")
                self._bar.update(
                    self._tasks[number],
                    description=about,
                    completed=report.done,
                    total=report.total or None,
                    rate=rate,
                )
            elif is_new or now >= self._next.get(number, 0.0):
                self._next[number] = now + EVERY
                self._bar.console.print(f"{about} {rate}".strip())

    def on_end(self, number: int, found: Outcome | ShardkitError) -> None:
        """Say what has become of one of many."""
        with self._lock:
            if number in self._tasks:
                self._bar.remove_task(self._tasks.pop(number))
            if not self._quiet:
                text = outcome_line(found) if isinstance(found, Outcome) else found.message
                self._bar.console.print(printable(f"{number}: {text}"))


def _rate(report: Report, seconds: float) -> str:
    if not report.total:
        return ""
    if report.unit != "bytes":
        return f"{report.done} of {report.total} {report.unit}"
    megabytes = report.done / 1e6
    text = f"{megabytes:,.1f} of about {report.total / 1e6:,.1f} MB"
    return f"{text}, {megabytes / seconds:,.1f} MB/s" if seconds > 0.2 else text


def outcome_line(found: Outcome) -> str:
    """Return what has become of a move, in one line."""
    if found.goal is Goal.CLEAN:
        return f"cleaned: the old copy on {found.source} is gone"
    if found.goal is Goal.ABORT and not found.is_moved:
        return f"given up: {found.source} goes on, and nothing is left on {found.target}"
    if not found.is_moved:
        return "ready: shardkit move cutover hands over"
    pause = "" if found.pause is None else f", writes waited {found.pause * 1000:.0f} ms"
    return f"moved in {found.seconds:.1f} s{pause}; {found.n_rows:,} rows compared"


def plan_table(plan: MovePlan) -> Table:
    """Return what speaks for and against a move."""
    table = Table(
        f"logical shard {plan.logical_shard}",
        f"{plan.source} → {plan.target}, {plan.size_bytes / 1e6:,.1f} MB",
        "",
        box=None,
    )
    for check in plan.checks:
        verdict = f"[red]refused: {check.problem}[/red]" if check.problem else "ok"
        table.add_row(check.name, printable(check.found), printable(verdict))
    return table


def status_table(known: Sequence[Known]) -> Table:
    """Return how far moves are."""
    table = Table("logical shard", "from", "to", "step", "since", "attempt", "what next", box=None)
    for each in known:
        table.add_row(
            str(each.logical_shard),
            each.source or "?",
            each.target or "?",
            each.step,
            "-" if each.since is None else f"{each.since:,.0f} s",
            str(each.attempt),
            each.advice,
        )
    return table
