"""What a mover does next: one pure function, `decide`.

view → action. The view is what both ownership rows say, which steps the journal has, and facts with
their ages; an action is a value, which `shardkit.ops.moves.driver` carries out, and simulations
with a clock of their own. Every step can be done again, so a mover that died anywhere is continued
from the view alone. Reads no clock and no server.

    claim → import → lock → build → copy → index → follow → catch up → verify → prepare back
      → fence → drain → decide → activate → turn → check                     forward
    lift → detach → discard → drop copy → unlock → release                   abort
    detach → drop source → unlock → release                                  clean

A way back is a move in the other direction that inherits the copy: its journal begins with the
steps up to `follow` done. Source: docs/moves.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from shardkit.ops.moves.transitions import Move, Row
from shardkit.ownership import State

__all__ = [
    "ABORTS",
    "BUDGET",
    "CLEANS",
    "FORWARD",
    "INHERITED",
    "MAX_FENCES",
    "Action",
    "Do",
    "Done",
    "Facts",
    "GiveUp",
    "Goal",
    "Step",
    "Stop",
    "View",
    "Wait",
    "decide",
]

BUDGET: Final = 2.0
"""Seconds from the fence to the decision, beyond which the fence is lifted; less than half of
`shardkit.ownership.LIFT_AFTER`, so that nobody else lifts a fence that its mover still uses."""

NEAR: Final = 256 * 1024
"""Bytes of log the target may be behind when the source is fenced: what is drained in the fence."""

STALL: Final = 10.0
"""Seconds without progress of an apply that has something to apply, after which it has stalled."""

MAX_FENCES: Final = 30
"""Fences that were tried before the move is given up."""

FRESH: Final = 300.0
"""Seconds for which a clean diff counts; every resume diffs again."""

_POLL: Final = 0.05
_SHORTEST: Final = 0.1
_LONGEST: Final = 2.0


class Goal(StrEnum):
    """What a mover is to reach."""

    MOVE = "move"
    ABORT = "abort"
    CLEAN = "clean"


class Step(StrEnum):
    """A step that is written down: into the journal, an ownership row, or both."""

    CLAIM = "claim"
    IMPORT = "import"
    LOCK = "lock"
    BUILD = "build"
    COPY = "copy"
    INDEX = "index"
    FOLLOW = "follow"
    CATCH_UP = "catch up"
    VERIFY = "verify"
    PREPARE_BACK = "prepare back"
    FENCE = "fence"
    DRAIN = "drain"
    DECIDE = "decide"
    ACTIVATE = "activate"
    TURN = "turn"
    CHECK = "check"

    LIFT = "lift"
    YIELD = "yield"
    DETACH = "detach"
    DISCARD = "discard"
    DROP_COPY = "drop copy"
    DROP_SOURCE = "drop source"
    UNLOCK = "unlock"
    RELEASE = "release"


FORWARD: Final = (
    Step.CLAIM, Step.IMPORT, Step.LOCK, Step.BUILD, Step.COPY, Step.INDEX, Step.FOLLOW,
    Step.CATCH_UP, Step.VERIFY, Step.PREPARE_BACK, Step.FENCE, Step.DRAIN, Step.DECIDE,
    Step.ACTIVATE, Step.TURN, Step.CHECK,
)  # fmt: skip
"""Steps of a move, in order."""

ABORTS: Final = (Step.LIFT, Step.DETACH, Step.DISCARD, Step.DROP_COPY, Step.UNLOCK, Step.RELEASE)
"""Steps of giving up, in order."""

CLEANS: Final = (Step.DETACH, Step.DROP_SOURCE, Step.UNLOCK, Step.RELEASE)
"""Steps of forgetting the old copy, in order."""

INHERITED: Final = frozenset({Step.BUILD, Step.COPY, Step.INDEX, Step.FOLLOW})
"""What a way back finds done: the copy was kept current from the other side."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What was seen of the servers; ages in seconds.

    Attributes:
        lag_bytes: of log that the target has not applied; None where nobody follows yet.
        stalled: for how long the apply has not moved although there was something to apply.
        broken: why following cannot go on: a lost slot, an error of the apply, DDL; or None.
        verified: age of the last clean diff by this attempt; None for none.
        fence_age: of the fence on the source, by its clock; None where it is not fenced.
        is_drained: whether the target has everything of the present fence, durably, with its
            sequences set.
        n_fences: fences that were tried by this attempt and led nowhere.
        since_fence: since the last of them; None for none.
        blocker: who was in the way of the last one.
        first_timeline: of the source when it was claimed; None when it is not known.
        is_held: whether the mover is to stop before it fences.
        notice: seconds for which clients have yet to hear that it is on its way.
        pause: random, from 0 to 1; spreads what is tried again.
    """

    lag_bytes: int | None = None
    stalled: float = 0.0
    broken: str | None = None
    verified: float | None = None
    fence_age: float | None = None
    is_drained: bool = False
    n_fences: int = 0
    since_fence: float | None = None
    blocker: str | None = None
    first_timeline: int | None = None
    is_held: bool = False
    notice: float = 0.0
    pause: float = 0.5


@dataclass(frozen=True, slots=True)
class View:
    """All that a decision depends on.

    Attributes:
        move: which attempt asks.
        goal: what it is to reach.
        to: name of the target.
        source: its ownership row; None for none.
        target: likewise.
        done: steps that the journal has as done, for this goal.
        timeline: of the source's primary now; None where it does not answer.
        is_target_up: whether the target's primary answers.
        facts: what was seen besides.
    """

    move: Move
    goal: Goal
    to: str
    source: Row | None
    target: Row | None
    done: frozenset[Step] = frozenset()
    timeline: int | None = 1
    is_target_up: bool = True
    facts: Facts = field(default_factory=Facts)


@dataclass(frozen=True, slots=True)
class Do:
    """Do a step, and write down that it is done."""

    step: Step


@dataclass(frozen=True, slots=True)
class Wait:
    """Look again after some seconds."""

    seconds: float
    why: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The move cannot succeed, and nothing is handed over: go on with the goal `ABORT`."""

    why: str


@dataclass(frozen=True, slots=True)
class Stop:
    """Nothing can be done now; a later resume goes on."""

    why: str


@dataclass(frozen=True, slots=True)
class Done:
    """The goal is reached."""


Action = Do | Wait | GiveUp | Stop | Done


def decide(view: View) -> Action:
    """Return what a mover does next.

    Args:
        view: read by this attempt; ownership rows no older than its last own change to them.
    """
    if view.goal is Goal.CLEAN:
        return _clean(view)
    if view.timeline is None:
        if view.source is not None and view.source.state is State.RETIRED and view.is_target_up:
            return _handed_over(view)
        return Stop("the source does not answer")
    if view.goal is Goal.ABORT:
        return _abort(view)
    return _forward(view)


def _owns(row: Row | None, view: View) -> bool:
    return row is not None and row.move_id == view.move.id


def _forward(view: View) -> Action:
    source, target = view.source, view.target
    if source is None:
        return Stop("the source does not know the logical shard")
    if source.state is State.RETIRED:
        return _handed_over(view)
    if source.state is State.IMPORTING:
        return Stop("the source is receiving a copy itself")
    if not _owns(source, view):
        # Claimed once and claimed no more: somebody has given the move up meanwhile.
        return Stop("the move was given up") if Step.CLAIM in view.done else Do(Step.CLAIM)
    if _is_promoted(view):
        return _promoted(view)
    if source.state is State.FENCED:
        return _fenced(view)
    if not view.is_target_up:
        return Stop("the target does not answer")
    if target is None or not _owns(target, view) or target.state is State.RETIRED:
        return Do(Step.IMPORT)
    if view.facts.broken is not None:
        return GiveUp(view.facts.broken)
    missing = [step for step in FORWARD[2:7] if step not in view.done]
    return Do(missing[0]) if missing else _followed(view)


def _followed(view: View) -> Action:
    """Return what comes next while the target follows the open source."""
    facts = view.facts
    if facts.stalled >= STALL:
        return GiveUp(f"the target has applied nothing for {facts.stalled:.0f} s")
    if facts.lag_bytes is None or facts.lag_bytes > NEAR:
        return Wait(_POLL, "the target catches up")
    if Step.CATCH_UP not in view.done:
        return Do(Step.CATCH_UP)
    if facts.verified is None or facts.verified > FRESH:
        return Do(Step.VERIFY)
    if Step.PREPARE_BACK not in view.done:
        return Do(Step.PREPARE_BACK)
    if facts.is_held:
        return Done()
    if facts.notice > 0:
        return Wait(min(facts.notice, _POLL), "clients hear of it, and connect")
    if facts.n_fences >= MAX_FENCES:
        return GiveUp(f"no fence in {facts.n_fences} attempts: {facts.blocker or 'no lock'}")
    if facts.since_fence is not None:
        # Grows to some seconds: whoever blocks is given time, and writers pass meanwhile.
        bound = min(_LONGEST, _SHORTEST * 2 ** min(facts.n_fences, 6))
        left = bound * (0.5 + facts.pause / 2) - facts.since_fence
        if left > 0:
            return Wait(min(left, _POLL), "between two attempts to fence")
    return Do(Step.FENCE)


def _fenced(view: View) -> Action:
    age = view.facts.fence_age or 0.0
    if not view.is_target_up or age > BUDGET:
        return Do(Step.LIFT)
    if view.facts.is_drained:
        return Do(Step.DECIDE)
    # Draining waits by itself, and not beyond the budget.
    return Do(Step.DRAIN)


def _handed_over(view: View) -> Action:
    """Return what comes after the decision: there is no way but forward."""
    source, target = view.source, view.target
    if source is None or not _owns(source, view) or source.moved_to != view.to:
        return Stop("the source has handed over by another move")
    if not view.is_target_up:
        return Stop("handed over, and the target does not answer: it opens once it does")
    if target is None or target.state is State.RETIRED:
        return Stop("handed over, and the target has no copy: restore it from its replica")
    if target.state is State.IMPORTING:
        return Do(Step.ACTIVATE)
    if view.timeline is None:
        return Stop("the source does not answer; the target is open")
    if Step.TURN not in view.done:
        return Do(Step.TURN)
    if view.goal is Goal.ABORT or Step.CHECK in view.done:
        return Done()
    return Do(Step.CHECK)


def _is_promoted(view: View) -> bool:
    first = view.facts.first_timeline
    return first is not None and view.timeline is not None and first != view.timeline


def _promoted(view: View) -> Action:
    """Return what follows a failover of the source before its decision is there.

    A decision may have been lost with the old primary, so the target is asked before anything is
    lifted: open means that it was, and the new primary gives way.
    """
    if not view.is_target_up:
        return Stop("the source has failed over, and only the target knows whether it was decided")
    target = view.target
    if _owns(target, view) and target is not None and target.state in {State.ACTIVE, State.FENCED}:
        return Do(Step.YIELD)
    if view.goal is Goal.ABORT:
        return _give_up(view)
    # Slots of the old primary are gone or behind, and with them what the copy stands on.
    return GiveUp("the source has failed over during the move")


def _abort(view: View) -> Action:
    source = view.source
    if source is None:
        return Done()
    if source.state is State.RETIRED and _owns(source, view):
        return _handed_over(view)
    if not _owns(source, view):
        return Done()
    if _is_promoted(view):
        return _promoted(view)
    return _give_up(view)


def _give_up(view: View) -> Action:
    source, target = view.source, view.target
    assert source is not None, "asked by _abort"
    if source.state is State.FENCED and not _is_promoted(view):
        return Do(Step.LIFT)
    if not view.is_target_up:
        return Stop("the target does not answer; its copy has to go first")
    if Step.DETACH not in view.done:
        return Do(Step.DETACH)
    if _owns(target, view):
        return Do(Step.DISCARD)
    if source.state is State.FENCED:  # of a timeline that is gone: the target cannot open any more
        return Do(Step.LIFT)
    for step in (Step.DROP_COPY, Step.UNLOCK):
        if step not in view.done:
            return Do(step)
    return Do(Step.RELEASE)


def _clean(view: View) -> Action:
    source, target = view.source, view.target
    if not view.is_target_up or view.timeline is None:
        return Stop("both servers have to answer")
    if target is None or target.state is not State.ACTIVE:
        return Stop("the move is not over")
    if source is not None and source.state is not State.RETIRED:
        return Stop("the source has not handed over")
    if not _owns(target, view):
        return Done()
    for step in CLEANS[:-1]:
        if step not in view.done:
            return Do(step)
    return Do(Step.RELEASE)
