"""A mover in the simulation: the production machine decides, messages to simulated servers do it.

`shardkit.ops.moves.machine.decide` is asked with what both servers say, as the driver of
`shardkit move` asks it; what it wants done is carried out by messages that come late or get lost.
A mover may be killed at any point: another one goes on with the next attempt, or gives up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from shardkit.ops.moves import machine
from shardkit.ops.moves.machine import Do, Done, Facts, GiveUp, Goal, Step, Stop, View, Wait
from shardkit.ops.moves.transitions import (
    Activate,
    Claim,
    Decide,
    Discard,
    Fence,
    Import,
    Lift,
    Move,
    Release,
    Resume,
    Row,
    Yield,
)
from shardkit.ownership import State
from tests.simulation.answers import Error, Ok
from tests.simulation.database import Database
from tests.simulation.holding import Timed
from tests.simulation.scheduler import LOST, Call, Steps

if TYPE_CHECKING:
    from tests.simulation.world import World

__all__ = ["Job", "mover"]

_BYTES: Final = 100_000
"""Bytes of log that a commit stands for."""

_PATIENCE: Final = 0.2
_LONGEST: Final = 600
"""Looks of one mover, at most: more, and it goes in circles."""


@dataclass(slots=True)
class Job:
    """A move, whoever works at it.

    Attributes:
        id: of the move.
        shard: that is moved.
        source: where it is.
        target: where it goes.
        goal: what is to be reached.
        attempt: the last one.
        is_done: whether the goal was reached.
        timeline: of the source when it was claimed; the production driver has it in the journal.
        is_begun: whether it has claimed anything, as far as anybody knows.
        is_refused: whether its claim was refused.
    """

    id: str
    shard: int
    source: Database
    target: Database
    goal: Goal = Goal.MOVE
    attempt: int = 0
    is_done: bool = False
    timeline: int | None = None
    is_begun: bool = False
    is_refused: bool = False


def mover(world: World, job: Job) -> Steps:
    """Take a move up, and go on until its goal is reached."""
    job.attempt += 1
    work = _Work(world, job, Move(job.id, job.attempt))
    if job.is_begun:
        yield from work.resume()
    view = None
    for _ in range(_LONGEST):
        view = yield from work.look()
        if view is None:
            yield _PATIENCE
            continue
        action = machine.decide(view)
        world.simulation.say("mover", f"{job.id} {job.goal} {action}")
        match action:
            case Do(step):
                yield from work.do(step)
                if job.is_refused:
                    job.is_done = True
                    return
            case Wait(seconds):
                yield seconds
            case GiveUp():
                job.goal = Goal.ABORT
            case Stop():
                # The command ends here, and somebody resumes it later.
                yield _PATIENCE
                job.attempt += 1
                work = _Work(world, job, Move(job.id, job.attempt))
                yield from work.resume()
            case Done():
                has_moved = work.has_handed_over
                world.n_moves += has_moved and job.goal is not Goal.CLEAN
                world.n_given_up += not has_moved and job.goal is Goal.ABORT
                if job.goal is Goal.CLEAN or not has_moved:
                    job.is_done = True
                    return
                job.goal = Goal.CLEAN
    raise AssertionError(f"{job.id} does not end: {machine.decide(view) if view else 'no view'}")


class _Work:
    """One attempt at a move."""

    def __init__(self, world: World, job: Job, move: Move) -> None:
        self.world = world
        self.job = job
        self.move = move
        self._facts = Facts()
        self._fenced_at: float | None = None
        self._drained: float | None = None
        self._verified: float | None = None
        self._failed_at: float | None = None
        self._rows: tuple[Row | None, Row | None] = (None, None)

    @property
    def has_handed_over(self) -> bool:
        """Whether the source has given the logical shard away."""
        source = self._rows[0]
        return source is not None and source.state is State.RETIRED

    # -- what is seen

    def look(self) -> Steps:
        """Return the view; None where it could not be made."""
        job, now = self.job, self.world.simulation.now
        ask = ("look", job.shard, job.id)
        here = yield Call(job.source, ask, _PATIENCE)
        there = yield Call(job.target, ask, _PATIENCE)
        source, timeline, at, sequence, *_ = here.value if isinstance(here, Ok) else _NOBODY
        target, _, _, _, entries, copy = there.value if isinstance(there, Ok) else _NOBODY
        if source is not None and source.state is State.RETIRED and here is LOST:
            return None
        facts = replace(
            self._facts,
            lag_bytes=None if copy is None else (sequence - copy.at) * _BYTES,
            broken=None if copy is None else copy.broken,
            verified=None if self._verified is None else now - self._verified,
            fence_age=None if source is None or source.fenced_at is None else at - source.fenced_at,
            is_drained=source is not None
            and source.fenced_at is not None
            and self._drained == source.fenced_at,
            since_fence=None if self._failed_at is None else now - self._failed_at,
            first_timeline=job.timeline,
            pause=self.world.simulation.random.random(),
        )
        self._rows = (source, target)
        done = frozenset(Step(step) for _, goal, step in entries if goal == job.goal)
        return View(
            self.move,
            job.goal,
            job.target.name,
            source,
            target,
            done,
            timeline if isinstance(here, Ok) else None,
            isinstance(there, Ok),
            facts,
        )

    def resume(self) -> Steps:
        """Have earlier attempts refused, on the source first."""
        for server in (self.job.source, self.job.target):
            while True:
                answer = yield from self._change(server, Resume(self.move))
                noted = yield Call(server, ("attempt", self.move), _PATIENCE)
                is_refused = isinstance(answer, Error) and answer.why == "refused"
                if isinstance(noted, Ok) and (isinstance(answer, Ok) or is_refused):
                    break
                yield 0.05

    # -- what is done

    def _ask(self, server: Database, *request: Any) -> Steps:
        """Have something done that no transaction of an ownership row does."""
        answer = yield Call(server, ("as", self.move, request), _PATIENCE)
        return isinstance(answer, Ok)

    def _change(self, server: Database, event: Any) -> Steps:
        answer = yield Call(server, ("change", self.job.shard, event), 0.5)
        return answer

    def do(self, step: Step) -> Steps:
        """Do a step, and write down that it is done, where it was."""
        is_done = yield from getattr(self, f"_{step.name.lower()}")()
        if is_done:
            job = self.job
            # Claims and releases are in the rows themselves.
            yield from self._ask(job.target, "note", job.id, self.move.attempt, job.goal, step)
        else:
            yield 0.01

    def _nothing(self) -> Steps:
        yield 0.001
        return True

    _lock = _index = _catch_up = _prepare_back = _check = _unlock = _nothing

    def _claim(self) -> Steps:
        job = self.job
        looked = yield Call(job.source, ("look", job.shard, job.id), _PATIENCE)
        if not isinstance(looked, Ok):
            return False
        if job.timeline is None:
            job.timeline = looked.value[1]
        job.is_begun = True
        answer = yield from self._change(job.source, Claim(self.move))
        job.is_refused = isinstance(answer, Error) and answer.why == "refused"
        return isinstance(answer, Ok)

    def _import(self) -> Steps:
        answer = yield from self._change(self.job.target, Import(self.move))
        return isinstance(answer, Ok)

    def _build(self) -> Steps:
        return (yield from self._ask(self.job.target, "drop", self.job.shard))

    def _copy(self) -> Steps:
        """Copy what there is; whoever follows begins where the copy ends."""
        job = self.job
        found = yield Call(job.source, ("changes", job.shard, 0), _PATIENCE)
        if not isinstance(found, Ok):
            return False
        # A copy that was interrupted begins anew.
        for what in ("unfollow", "drop"):
            if not (yield from self._ask(job.target, what, job.shard)):
                return False
        changes, at, timeline = found.value
        for part in (changes[: len(changes) // 2], changes[len(changes) // 2 :]):
            if not (yield from self._ask(job.target, "copy", job.shard, part)):
                return False
        return (yield from self._ask(job.target, "follow", job.shard, job.source, at, timeline))

    def _follow(self) -> Steps:
        yield 0.01
        return True

    def _verify(self) -> Steps:
        """Compare both sides at one commit of the source."""
        job = self.job
        here = yield Call(job.target, ("look", job.shard, job.id), _PATIENCE)
        if not isinstance(here, Ok) or here.value[5] is None:
            return False
        copy = yield Call(job.target, ("rows", job.shard, None), _PATIENCE)
        after = yield Call(job.target, ("look", job.shard, job.id), _PATIENCE)
        if not isinstance(copy, Ok) or not isinstance(after, Ok) or after.value[5] is None:
            return False
        at = after.value[5].at
        again = yield Call(job.target, ("rows", job.shard, None), _PATIENCE)
        rows = yield Call(job.source, ("rows", job.shard, at), _PATIENCE)
        if not isinstance(rows, Ok) or not isinstance(again, Ok) or again.value != copy.value:
            return False
        if rows.value != copy.value:
            later = yield Call(job.target, ("look", job.shard, job.id), _PATIENCE)
            if isinstance(later, Ok) and later.value[5] is not None and later.value[5].at == at:
                self._facts = replace(self._facts, broken="the copy differs")
            return False
        self._verified = self.world.simulation.now
        return True

    def _fence(self) -> Steps:
        to = self.job.target.name
        answer = yield from self._change(self.job.source, Timed(Fence, (self.move, to)))
        if isinstance(answer, Ok):
            return True
        self._failed_at = self.world.simulation.now
        self._facts = replace(self._facts, n_fences=self._facts.n_fences + 1)
        return False

    def _drain(self) -> Steps:
        """Wait until the target has everything of the fence, with its sequence set."""
        job, bugs = self.job, self.world.bugs
        looked = yield Call(job.source, ("look", job.shard, job.id), _PATIENCE)
        last = yield Call(job.source, ("last_id", job.shard), _PATIENCE)
        if not isinstance(looked, Ok) or not isinstance(last, Ok) or looked.value[0] is None:
            return False
        row, _, _, until, *_ = looked.value
        target = yield Call(job.target, ("look", job.shard, job.id), _PATIENCE)
        if not isinstance(target, Ok) or target.value[5] is None or row.fenced_at is None:
            return False
        if target.value[5].at < until and "catch-up not awaited" not in bugs:
            return False
        done: bool = yield from self._ask(job.target, "sequence", job.shard, last.value)
        if done:
            self._drained = row.fenced_at
        return done

    def _decide(self) -> Steps:
        if "activation before decision" in self.world.bugs:
            return (yield from self._activated_early())
        answer = yield from self._change(self.job.source, Timed(Decide, (self.move,)))
        return isinstance(answer, Ok)

    def _activated_early(self) -> Steps:
        """Open the target, and then come too late with the decision: the fence is lifted."""
        source = self._rows[0]
        assert source is not None, "it is fenced"
        forged = replace(source, state=State.RETIRED, epoch=source.epoch + 1)
        yield from self._change(self.job.target, Activate(self.move, forged, self.job.target.name))
        yield from self._change(self.job.source, Lift(self.move, source.fence_timeline or 0))
        self.job.is_refused = True
        return False

    def _activate(self) -> Steps:
        job = self.job
        looked = yield Call(job.source, ("look", job.shard, job.id), _PATIENCE)
        if not isinstance(looked, Ok) or looked.value[0] is None:
            return False
        yield from self._ask(job.target, "unfollow", job.shard)
        answer = yield from self._change(
            job.target, Activate(self.move, looked.value[0], job.target.name)
        )
        return isinstance(answer, Ok)

    def _turn(self) -> Steps:
        return (yield from self._ask(self.job.target, "unfollow", self.job.shard))

    def _lift(self) -> Steps:
        """Give the writes back: on the timeline of the fence, whatever the present one is."""
        source = self._rows[0]
        assert source is not None, "it is fenced"
        timeline = source.fence_timeline or 0
        answer = yield from self._change(self.job.source, Lift(self.move, timeline))
        return isinstance(answer, Ok)

    def _yield(self) -> Steps:
        _, target = self._rows
        assert target is not None, "it is open"
        answer = yield from self._change(
            self.job.source, Yield(self.move, self.job.target.name, target)
        )
        return isinstance(answer, Ok)

    def _detach(self) -> Steps:
        return (yield from self._turn())

    def _discard(self) -> Steps:
        answer = yield from self._change(self.job.target, Discard(self.move))
        return isinstance(answer, Ok)

    def _drop_copy(self) -> Steps:
        return (yield from self._build())

    def _drop_source(self) -> Steps:
        return (yield from self._ask(self.job.source, "drop", self.job.shard))

    def _release(self) -> Steps:
        """End the claims; that of the target last, since it says that there is something to do."""
        source, target = self._rows
        for server, row in ((self.job.source, source), (self.job.target, target)):
            if row is not None and row.move_id == self.move.id:
                answer = yield from self._change(server, Release(self.move))
                if not isinstance(answer, Ok):
                    return False
        return True


_NOBODY: Final = (None, None, 0.0, 0, (), None)
