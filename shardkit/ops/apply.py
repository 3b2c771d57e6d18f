"""One run over a migration plan: rounds, waves, and what came of them.

Called by `shardkit.ops.migrate` with connections that already hold the session locks. What happens
on one physical shard is `shardkit.ops.physical`; this keeps them in step, and halts.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import psycopg

from shardkit.errors import (
    EndpointUnavailableError,
    MigrationError,
    OperationError,
    ShardkitError,
    TryAgainError,
)
from shardkit.ops.limits import Limits
from shardkit.ops.physical import PhysicalRun
from shardkit.ops.plan import MigrationPlan
from shardkit.ops.waves import Wave
from shardkit.topology import Topology

__all__ = ["MigrationOutcome", "run"]

Connection = psycopg.Connection[tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class MigrationOutcome:
    """What a run did.

    Attributes:
        plan: what was to be done.
        done: logical shards brought to the newest revision by this run, by physical shard.
        failed: why a physical shard was given up, by name.
        laggards: why a logical shard was left behind, by number.
        halted: after which wave the run went no further, and why; None when it went on.
        filled: rows that backfills changed, by physical shard and revision.
    """

    plan: MigrationPlan
    done: Mapping[str, tuple[int, ...]]
    failed: Mapping[str, ShardkitError] = field(default_factory=dict)
    laggards: Mapping[int, ShardkitError] = field(default_factory=dict)
    halted: str | None = None
    filled: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def error(self) -> OperationError | None:
        """None when every logical shard is current; else one error that names the rest.

        It is a `TryAgainError` (retryable) when nothing but locks stood in the way.
        """
        problems = [*self.failed.values(), *self.laggards.values()]
        if not problems:
            if self.halted:
                return TryAgainError(self.halted, hint="a rerun continues where this one ended")
            return None
        names = [f"physical shard {name!r}" for name in self.failed]
        names += [f"logical shard {number}" for number in sorted(self.laggards)[:8]]
        if len(self.laggards) > 8:
            names.append(f"{len(self.laggards) - 8} more")
        kind = (
            TryAgainError
            if all(isinstance(problem, TryAgainError) for problem in problems)
            else MigrationError
        )
        return kind(
            f"{f'{self.halted}; ' if self.halted else ''}"
            f"not migrated: {', '.join(names)}; {problems[0]}",
            hint="a rerun continues where this one ended",
        )


def run(
    topology: Topology,
    plan: MigrationPlan,
    connections: Mapping[str, Connection],
    *,
    limits: Limits,
    on_done: Callable[[str, int], None],
    on_rows: Callable[[str, str, int], None] | None = None,
    waves: Sequence[Wave] = (),
    on_wave: Callable[[Wave], None] | None = None,
) -> MigrationOutcome:
    """Work through a plan and return what came of it.

    On an interrupt every transaction under way is finished, then the interrupt goes on.

    Args:
        topology: the cluster.
        plan: what is to be done.
        connections: one per physical shard that answered, holding its session lock.
        limits: timeouts and retries.
        on_done: called with physical and logical shard after each, from several threads.
        on_rows: called with physical shard, revision and changed rows after each batch of a
            backfill, from several threads.
        waves: the roll-out; the run halts after one in which anything failed or waited in vain.
            A physical shard that goes away halts only itself. Empty for all at once.
        on_wave: called before each.
    """
    stop = threading.Event()
    rows = _Rows(on_rows)
    runs = [
        PhysicalRun(
            topology,
            part,
            connections[part.physical],
            limits=limits,
            on_done=on_done,
            on_rows=rows.add,
            stop=stop,
            is_staged=len(waves) > 1,
        )
        for part in plan.physical
        if part.error is None
    ]
    known = {number for part in runs for number in part.laggards}
    halted = None
    with ThreadPoolExecutor(max(1, len(runs))) as pool:

        def everywhere(work: Callable[[PhysicalRun], None]) -> None:
            """Do something on every physical shard that is still there, at the same time."""

            def one(part: PhysicalRun) -> None:
                try:
                    work(part)
                except ShardkitError as error:
                    part.failed = error

            futures = [pool.submit(one, part) for part in runs if part.failed is None]
            try:
                wait(futures)
            except BaseException:
                stop.set()
                raise
            for future in futures:
                future.result()

        everywhere(PhysicalRun.begin)
        for number in range(max((len(part.rounds) for part in runs), default=0)):
            if halted or stop.is_set():
                break
            everywhere(lambda part, n=number: _start(part, n))  # type: ignore[misc]
            for wave in waves or (None,):
                if stop.is_set():
                    break
                if wave is not None and on_wave:
                    on_wave(wave)
                reached = wave.logical_shards if wave is not None else None
                everywhere(lambda part, n=number, r=reached: _migrate(part, n, r))  # type: ignore[misc]
                if halted := _reason(runs, known, wave if len(waves) > 1 else None):
                    break
    return _outcome(plan, runs, halted, rows)


class _Rows:
    """Counts what backfills change, from several threads."""

    def __init__(self, on_rows: Callable[[str, str, int], None] | None) -> None:
        self.found: dict[str, Counter[str]] = {}
        self._on_rows = on_rows
        self._lock = threading.Lock()

    def add(self, physical: str, revision: str, rows: int) -> None:
        with self._lock:
            self.found.setdefault(physical, Counter())[revision] += rows
        if self._on_rows:
            self._on_rows(physical, revision, rows)


def _outcome(
    plan: MigrationPlan, runs: Sequence[PhysicalRun], halted: str | None, rows: _Rows
) -> MigrationOutcome:
    failed = {part.physical: part.error for part in plan.physical if part.error}
    laggards: dict[int, ShardkitError] = {}
    for part in runs:
        laggards |= part.laggards
        if part.failed:
            failed[part.name] = part.failed
    done = {part.name: tuple(sorted(part.done)) for part in runs}
    return MigrationOutcome(plan, done, failed, laggards, halted, rows.found)


def _start(part: PhysicalRun, number: int) -> None:
    if number < len(part.rounds):
        part.start_round(number)


def _migrate(part: PhysicalRun, number: int, reached: frozenset[int] | None) -> None:
    if number < len(part.rounds):
        part.migrate(reached)


def _reason(runs: Sequence[PhysicalRun], known: set[int], wave: Wave | None) -> str | None:
    """Return why a run goes no further after a wave, or None."""
    unwell = [f"{part.name}: {part.unwell}" for part in runs if part.unwell]
    after = f"halted in wave {wave.name}" if wave else "halted"
    if unwell:
        return f"{after}: {unwell[0]}"
    if wave is None:
        return None
    behind = sum(number not in known for part in runs for number in part.laggards)
    given_up = [
        part.name
        for part in runs
        if part.failed and not isinstance(part.failed, EndpointUnavailableError)
    ]
    if behind:
        return f"{after}: {behind} logical shards left behind"
    return f"{after}: {given_up[0]} was given up" if given_up else None
