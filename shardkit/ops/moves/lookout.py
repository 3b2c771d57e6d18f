"""What a mover sees: both rows, the journal, and how far the target is. Changes nothing.

Base of `shardkit.ops.moves.driver`, which asks for a view before each decision.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Final

import psycopg

from shardkit.clock import SYSTEM
from shardkit.errors import EndpointUnavailableError, RefusedError
from shardkit.ops.moves import replication, transactions
from shardkit.ops.moves.journal import Journal, read_journal
from shardkit.ops.moves.machine import Facts, Goal, Step, View
from shardkit.ops.moves.work import Work
from shardkit.ownership import State

__all__ = ["Lookout"]

_DDL: Final = 3.0
"""Seconds between two looks for DDL that somebody has run in spite of the lock."""


class Lookout:
    """What is known to one attempt at a move.

    Args:
        work: its steps, with the rows as they were last seen.
        goal: what it is to reach.
        is_held: whether to stop before the fence.
        notice: seconds that clients have between the import and the fence.
    """

    def __init__(
        self, work: Work, goal: Goal, *, is_held: bool = False, notice: float = 0.0
    ) -> None:
        self.work = work
        self._goal = goal
        self._facts = Facts(is_held=is_held)
        self._done: frozenset[Step] = frozenset()
        self._journal = Journal()
        self._notice = notice
        self._imported: float | None = None
        self._verified: float | None = None
        self._fence_failed: float | None = None
        self._n_fences = 0
        self._moved: tuple[str | None, float] = (None, 0.0)
        self._errors: int | None = None
        self._looked = 0.0
        self._timeline: int | None = None
        self._is_target_up = True

    def _lost(self, step: Step, error: Exception) -> None:
        """Take the loss of a server; the driver knows what to do."""
        raise NotImplementedError

    def _view(self) -> View:
        work, now = self.work, SYSTEM.monotonic()
        source = work.rows.get("source")
        age = self._facts.fence_age
        if source is not None and source.state is State.FENCED and work.fenced is not None:
            age = now - work.fenced
        facts = replace(
            self._facts,
            verified=None if self._verified is None else now - self._verified,
            fence_age=age,
            is_drained=work.is_drained,
            n_fences=self._n_fences,
            since_fence=None if self._fence_failed is None else now - self._fence_failed,
            blocker=work.blocker,
            notice=0.0 if self._imported is None else self._imported + self._notice - now,
            pause=random.random(),  # noqa: S311  spreads what is tried again
        )
        return View(
            work.move,
            self._goal,
            work.target.name,
            source,
            work.rows.get("target"),
            self._done,
            self._timeline,
            self._is_target_up,
            facts,
        )

    def _look(self) -> None:
        """Read both rows and the journal; a server that does not answer is down."""
        work, number = self.work, self.work.logical_shard
        try:
            source = work.on("source")
            work.rows["source"] = row = transactions.row_of(source, number)
            at, self._timeline = transactions.now(source)
            age = None if row is None or row.fenced_at is None else at - row.fenced_at
            self._facts = replace(self._facts, fence_age=age)
        except (EndpointUnavailableError, psycopg.OperationalError):
            self._timeline = None
        try:
            target = work.on("target")
            work.rows["target"] = transactions.row_of(target, number)
            self._journal = read_journal(target, number, work.move.id)
            self._is_target_up = True
        except (EndpointUnavailableError, psycopg.OperationalError):
            self._is_target_up = False
            return
        self._done = self._journal.done(self._goal)
        first = self._journal.noted("timeline")
        self._facts = replace(self._facts, first_timeline=first)
        for row in work.rows.values():
            if row is not None and row.move_id == work.move.id and row.attempt > work.move.attempt:
                raise RefusedError(
                    f"attempt {row.attempt} has taken the move over",
                    hint="this mover is no longer wanted",
                    logical_shard=number,
                )
        self._follow(is_looking=True)

    def _follow(self, *, is_looking: bool = False) -> None:
        """See how far the target is, and whether it can go on.

        Args:
            is_looking: whether a server that has gone is noted, and not waited for: who waits
                looks again and again, and would wait for itself.
        """
        work, now = self.work, SYSTEM.monotonic()
        row = work.rows.get("source")
        is_open = row is not None and row.state is State.ACTIVE
        if is_open:
            work.fenced, work.is_drained = None, False
        if not (is_open and self._goal is Goal.MOVE and Step.COPY in self._done):
            return
        if is_looking and self._timeline is None:
            return
        try:
            found = replication.progress(work.on("source"), work.on("target"), work.logical_shard)
            odd = None
            if now - self._looked > _DDL and Step.INDEX in self._done:
                self._looked = now
                odd = work.same_shape()
        except (EndpointUnavailableError, psycopg.OperationalError) as error:
            if is_looking:
                self._timeline = None
            else:
                self._lost(Step.CATCH_UP, error)
            return
        is_following = Step.FOLLOW in self._done
        if found.position != self._moved[0] or found.lag_bytes == 0:
            self._moved = found.position, now
        if self._errors is None:
            self._errors = found.errors
        broken = found.lost
        if not found.has_slot:
            broken = "the replication slot is gone"
        elif is_following and not found.is_enabled:
            broken = "the subscription is gone, or was disabled"
        elif odd:
            broken = f"DDL in the middle of the move: {'; '.join(odd)}"
        elif found.errors > self._errors + 1 and found.lag_bytes:
            broken = f"the target cannot apply: {found.conflicts or 'its log says why'}"
        self._facts = replace(
            self._facts,
            lag_bytes=found.lag_bytes if is_following else None,
            stalled=now - self._moved[1] if is_following else 0.0,
            broken=broken,
        )
