"""Carries a move out: looks, asks the machine, acts, writes down, until the goal is reached.

Called by `shardkit.ops.moves`. Decides nothing about a move; what it decides is what an error
means: that the step cannot succeed, that it may at another time, or that a server has gone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Final

import psycopg
from psycopg import errors as pg

from shardkit.clock import SYSTEM
from shardkit.errors import (
    EndpointUnavailableError,
    MoveError,
    OutcomeUnknownError,
    RefusedError,
    ShardkitError,
    TryAgainError,
)
from shardkit.ops.blame import first_line
from shardkit.ops.moves import entries, transactions
from shardkit.ops.moves.lookout import Lookout
from shardkit.ops.moves.machine import (
    INHERITED,
    Do,
    Done,
    GiveUp,
    Goal,
    Step,
    Stop,
    Wait,
    decide,
)
from shardkit.ops.moves.presence import Presence, end_others
from shardkit.ops.moves.transitions import Resume
from shardkit.ops.moves.work import Report, Work
from shardkit.ownership import State

__all__ = ["Driver", "Hook", "Outcome"]

Hook = Callable[[str], None]
"""Called after everything that is written down, with its name; for tests that crash there."""

_PATIENCE: Final = 10.0
"""Seconds for which a server that has gone is waited for."""

_LOCKS: Final = 20
"""Attempts, half a second apart, to get the DDL lock while a migration is at work."""

_QUIET: Final = frozenset({Step.DRAIN, Step.DECIDE, Step.ACTIVATE, Step.LIFT})
"""Steps that write down by themselves what they do: nobody waits for a second line."""

_FATAL: Final = (
    pg.DiskFull,
    pg.IntegrityError,
    pg.DataError,
    pg.ProgrammingError,
    pg.NotSupportedError,
    pg.ConfigurationLimitExceeded,
    pg.ObjectNotInPrerequisiteState,
    pg.UndefinedObject,
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What has become of a move.

    Attributes:
        logical_shard: that was to be moved.
        move_id: of the move.
        source: name of the physical shard that it came from.
        target: name of the one it went to.
        goal: what was reached.
        is_moved: whether the target is its owner now.
        pause: seconds from the fence to the activation; None where another attempt did it.
        seconds: that this attempt took.
        n_rows: that were compared at the end.
        n_fences: fences that led nowhere before.
    """

    logical_shard: int
    move_id: str
    source: str
    target: str
    goal: Goal
    is_moved: bool
    pause: float | None
    seconds: float
    n_rows: int
    n_fences: int


class Driver(Lookout):
    """One attempt at a move.

    Args:
        work: its steps.
        goal: what it is to reach.
        hook: see `Hook`.
        is_held: whether to stop before the fence.
        notice: seconds that clients have between the import and the fence.
        stop: set to have it stop where that is safe; a resume goes on.
        is_resumed: whether somebody has begun it before.
    """

    def __init__(
        self,
        work: Work,
        goal: Goal,
        *,
        hook: Hook = lambda _name: None,
        is_held: bool = False,
        notice: float = 0.0,
        stop: threading.Event | None = None,
        is_resumed: bool = False,
    ) -> None:
        super().__init__(work, goal, is_held=is_held, notice=notice)
        self._hook = hook
        self._is_resumed = is_resumed
        self._stop = stop or threading.Event()
        self._report, work.report = work.report, self._reported
        self._why: MoveError | TryAgainError | None = None
        self._n_locks = 0
        self._presence: Presence | None = None

    def run(self) -> Outcome:
        """Go on until the goal is reached.

        Raises:
            MoveError: the move was given up, and why; its source goes on as before.
            RefusedError: another mover has it.
            TryAgainError: something was in the way; a resume goes on (retryable).
            EndpointUnavailableError: a server does not answer (retryable).
        """
        began = SYSTEM.monotonic()
        work = self.work
        presence = self._presence = Presence(work.target, work.logical_shard)
        try:
            try:
                self._begin(presence)
            except (psycopg.Error, OutcomeUnknownError) as error:
                # A switchover, say: nothing has been done yet but what is found in the rows.
                raise self._stopped("begin", error) from error
            while self._step(presence):
                pass
        except (KeyboardInterrupt, SystemExit):
            self._leave()
            raise
        finally:
            work.end()
            presence.close()
        if self._why is not None:
            raise self._why
        target = work.rows.get("target")
        return Outcome(
            work.logical_shard,
            work.move.id,
            work.source.name,
            work.target.name,
            self._goal,
            target is not None and target.state is State.ACTIVE,
            work.pause,
            SYSTEM.monotonic() - began,
            0 if work.diff is None else work.diff.n_rows,
            self._n_fences,
        )

    def _leave(self) -> None:
        """Give the writes back, since nobody goes on: Ctrl-C between the fence and the decision."""
        source = self.work.rows.get("source")
        if source is not None and source.state is State.FENCED:
            with suppress(psycopg.Error, ShardkitError):
                self.work.close()
                self.work.do(Step.LIFT, self._goal)

    def _reported(self, report: Report) -> None:
        """Pass on how far a step is, unless it is to stop."""
        self._report(report)
        source = self.work.rows.get("source")
        is_open = source is None or source.state is State.ACTIVE
        if self._stop.is_set() and is_open:
            raise TryAgainError(
                "stopped, as it was told to",
                hint=f"shardkit move resume {report.logical_shard} goes on, abort gives it up",
                logical_shard=report.logical_shard,
            )

    def _begin(self, presence: Presence) -> None:
        """End whoever was at it before, and take the move up."""
        work = self.work
        end_others(work.on("target"), work.logical_shard, presence.pid)
        end_others(work.on("source"), work.logical_shard)
        ends = {"source": work.source.name, "target": work.target.name}
        if work.inherits is not None:
            ends["inherits"] = work.inherits
        if self._is_resumed:
            for side in ("source", "target"):
                row = transactions.row_of(work.on(side), work.logical_shard)
                if row is not None and row.move_id == work.move.id:
                    transactions.change(work.on(side), work.logical_shard, Resume(work.move))
            self._hook("resume done")
        self._note("begin", detail=ends)
        if self._goal is not Goal.MOVE:
            self._note("begin", goal=self._goal)
        if work.inherits is not None and self._goal is Goal.MOVE:
            for step in sorted(INHERITED):
                self._note(step)
        self._hook("begin done")
        self._look()

    def _step(self, presence: Presence) -> bool:
        """Do what comes next; return whether anything is left."""
        if presence.is_lost:
            presence.check()
        match decide(self._view()):
            case Do(step):
                self._do(step)
            case Wait(seconds, why):
                self.work.report(Report(self.work.logical_shard, "wait", why))
                SYSTEM.sleep(seconds)
                self._follow()
            case GiveUp(why):
                self._give_up(MoveError(why, logical_shard=self.work.logical_shard))
            case Stop(why):
                raise TryAgainError(
                    why,
                    hint=f"shardkit move resume {self.work.logical_shard} goes on",
                    logical_shard=self.work.logical_shard,
                )
            case Done():
                return False
        return True

    def _do(self, step: Step) -> None:
        work = self.work
        work.report(Report(work.logical_shard, step))
        try:
            if step not in _QUIET:
                self._note(step, is_done=False)
                self._hook(f"{step} begun")
            work.do(step, self._goal)
            if step not in _QUIET and step is not Step.FENCE:
                self._note(step)
            self._done |= {step}
            self._learn(step)
            self._hook(f"{step} done")
        except RefusedError as error:
            self._refused(step, error)
        except MoveError as error:
            error.logical_shard = work.logical_shard
            self._give_up(error)
        except TryAgainError as error:
            self._again(step, error)
        except (OutcomeUnknownError, EndpointUnavailableError, psycopg.OperationalError) as error:
            self._lost(step, error)
        except psycopg.Error as error:
            self._failed(step, error)

    def _learn(self, step: Step) -> None:
        if step is Step.VERIFY:
            self._verified = SYSTEM.monotonic()
        elif step is Step.LIFT:
            self._n_fences += 1
            self._fence_failed = SYSTEM.monotonic()
        elif step is Step.IMPORT:
            self._note("timeline", detail={"timeline": self._timeline})
            # Of a way back there is a new import, too; but its clients were there just now.
            self._imported = None if self.work.inherits else SYSTEM.monotonic()
            self._facts = replace(self._facts, first_timeline=self._timeline)
        if step in {Step.FOLLOW, Step.INDEX, Step.COPY, Step.CATCH_UP}:
            self._follow()

    # -- writing down

    def _note(
        self,
        name: str,
        *,
        is_done: bool = True,
        goal: Goal | None = None,
        detail: dict[str, Any] | None = None,
    ) -> None:
        """Write a line into the journal."""
        goal = goal or self._goal
        text = name if goal is Goal.MOVE else f"{goal}: {name}"
        entries.journal(
            self.work.on("target"),
            self.work.logical_shard,
            self.work.move,
            text,
            is_done=is_done,
            detail=detail,
        )

    # -- what errors mean

    def _give_up(self, error: MoveError | TryAgainError) -> None:
        """Go on with taking everything back, if nothing is handed over."""
        source = self.work.rows.get("source")
        if self._goal is not Goal.MOVE or (source is not None and source.state is State.RETIRED):
            raise error
        error.hint = error.hint or "nothing is left of it; move again when that is settled"
        self._why = error
        self._goal = Goal.ABORT
        self.work.report(Report(self.work.logical_shard, "abort", error.message))
        self._note("begin", goal=Goal.ABORT, detail={"why": error.message})
        self._hook("abort begun")
        self._look()

    def _refused(self, step: Step, error: RefusedError) -> None:
        """A row does not allow a step: it was another mover, or it cannot succeed."""
        work = self.work
        self._look()
        source = work.rows.get("source")
        if step is Step.DECIDE and source is not None and source.state is State.ACTIVE:
            self._n_fences += 1  # somebody has lifted the fence, since it was too old
            self._fence_failed = SYSTEM.monotonic()
            return
        rows = [row for row in work.rows.values() if row is not None]
        is_ours = any(
            (row.move_id, row.attempt) == (work.move.id, work.move.attempt) for row in rows
        )
        if not is_ours or self._goal is not Goal.MOVE:
            raise error
        self._give_up(MoveError(error.message, hint=error.hint, logical_shard=work.logical_shard))

    def _again(self, step: Step, error: TryAgainError) -> None:
        """Something was in the way of a step, which is tried again in a while."""
        if step is Step.FENCE:
            self.work.blocker = f"{error.message}; {error.hint}" if error.hint else error.message
            self._n_fences += 1
            self._fence_failed = SYSTEM.monotonic()
            self.work.report(Report(self.work.logical_shard, step, self.work.blocker))
            self._hook("fence failed")
            self._look()
        elif step is Step.LOCK:
            self._n_locks += 1
            if self._n_locks > _LOCKS:
                self._give_up(error)
            SYSTEM.sleep(0.5)
        elif step is Step.DRAIN:
            self.work.blocker = error.message
            self._facts = replace(self._facts, fence_age=float("inf"))
            self.work.fenced = None
        else:
            raise error

    def _stopped(self, step: str, error: Exception) -> TryAgainError:
        return TryAgainError(
            f"{step}: {first_line(error)}",
            hint=f"shardkit move resume {self.work.logical_shard} goes on",
            logical_shard=self.work.logical_shard,
        )

    def _failed(self, step: Step, error: psycopg.Error) -> None:
        """A server has refused a statement."""
        if not isinstance(error, _FATAL) or self._goal is not Goal.MOVE:
            raise self._stopped(step, error) from error
        hint = "make room on the target" if isinstance(error, pg.DiskFull) else None
        self._give_up(MoveError(f"{step}: {first_line(error)}", hint=hint))

    def _lost(self, step: Step, error: Exception) -> None:
        """A server went away: look again for a while, since it may have been restarted."""
        if isinstance(error, pg.DiskFull | pg.ConfigurationLimitExceeded):
            self._failed(step, error)
            return
        self.work.close()
        if self._presence is not None:
            self._presence.check()  # a mover that was frozen finds out before it does anything
        until = SYSTEM.monotonic() + _PATIENCE
        while True:
            self._look()
            source = self.work.rows.get("source")
            is_fenced = source is not None and source.state is State.FENCED
            if (self._timeline is not None and self._is_target_up) or is_fenced:
                break
            if SYSTEM.monotonic() > until:
                raise EndpointUnavailableError(
                    f"a server went away: {str(error).strip().splitlines()[0]}",
                    hint=f"shardkit move resume {self.work.logical_shard} goes on",
                    logical_shard=self.work.logical_shard,
                ) from error
            SYSTEM.sleep(0.2)
