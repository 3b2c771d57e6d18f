"""How an ownership row may change: one pure function, `step`.

(row, event) → (new row, what else its transaction does). Nothing else decides about these rows;
`shardkit.ops.moves.transactions` runs what is decided here, each in one transaction that holds
the row, and simulations drive the same function with a clock of their own.

    none            ── Place ──▶ active
    none, retired   ── Import ─▶ importing        the target, at the start of a move
    active          ── Claim ──▶ active           the source: one move at a time
    active          ── Fence ──▶ fenced           the source: writes wait
    fenced          ── Lift, Expire ──▶ active    the source, by its mover or by anybody
    fenced          ── Decide ─▶ retired          the source: from here on only forward
    importing       ── Activate ▶ active          the target, when the source has retired
    importing       ── Discard ▶ retired          the target: the copy is given up
    active, fenced  ── Promote ▶ the same         after a failover: the epoch grows
    active, fenced  ── Yield ──▶ retired          the source lost its decision in a failover
    any             ── Resume ─▶ the same         a new attempt at the move
    active, retired ── Release ▶ the same         the move is over

**The source's row is the only arbiter**: while it says `fenced`, the source alone can lift and
the target cannot open; once it says `retired`, the move can only roll forward.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

from shardkit.errors import RefusedError
from shardkit.ownership import State

__all__ = [
    "Action",
    "Activate",
    "Change",
    "Claim",
    "Decide",
    "Discard",
    "Event",
    "Expire",
    "Fence",
    "Import",
    "Lift",
    "Move",
    "Place",
    "Promote",
    "Release",
    "Resume",
    "Row",
    "Yield",
    "step",
]


@dataclass(frozen=True, slots=True)
class Move:
    """One attempt at a move.

    Attributes:
        id: of the move, a UUID.
        attempt: from 1; each resume adds one, and a row that has seen a later one refuses it.
    """

    id: str
    attempt: int = 1


@dataclass(frozen=True, slots=True)
class Row:
    """An ownership row.

    Attributes:
        epoch: counts hand-overs and promotions; 0 before the first ownership.
        state: what the physical shard is to the logical shard.
        moved_to: where it goes or went; kept while it comes back.
        move_id: of the move that has claimed it, or None.
        attempt: of that move.
        fenced_at: seconds of the database's clock at which it was fenced, or None.
        fence_timeline: the server's timeline then, or None.
    """

    epoch: int
    state: State
    moved_to: str | None = None
    move_id: str | None = None
    attempt: int = 0
    fenced_at: float | None = None
    fence_timeline: int | None = None


class Action(Enum):
    """What else the transaction of a change does, in this order."""

    LOCK = "lock every table against writers, and wait for those under way"
    CLOSE_WRITES = "take the rights to write from everybody, and note them"
    CLOSE = "take every right from everybody, and note them"
    OPEN = "give back the rights that were noted"


@dataclass(frozen=True, slots=True)
class Place:
    """The first placement."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A move begins, on its source."""

    move: Move


@dataclass(frozen=True, slots=True)
class Import:
    """A move begins, on its target."""

    move: Move


@dataclass(frozen=True, slots=True)
class Resume:
    """A move is taken up again: earlier attempts are refused from now on."""

    move: Move


@dataclass(frozen=True, slots=True)
class Fence:
    """Writes stop on the source.

    Attributes:
        to: name of the target.
        at: seconds of the database's clock.
        timeline: of the server now.
    """

    move: Move
    to: str
    at: float
    timeline: int


@dataclass(frozen=True, slots=True)
class Lift:
    """The mover gives the writes back."""

    move: Move
    timeline: int


@dataclass(frozen=True, slots=True)
class Expire:
    """Anybody gives the writes back after a mover that has gone silent; see `LIFT_AFTER`.

    Attributes:
        after: seconds that a fence may last.
    """

    at: float
    timeline: int
    after: float


@dataclass(frozen=True, slots=True)
class Decide:
    """The source hands over."""

    move: Move
    timeline: int


@dataclass(frozen=True, slots=True)
class Activate:
    """The target opens.

    Attributes:
        source: the source's row, read after its decision.
        here: name of the target.
    """

    move: Move
    source: Row
    here: str


@dataclass(frozen=True, slots=True)
class Discard:
    """The target gives its copy up."""

    move: Move


@dataclass(frozen=True, slots=True)
class Promote:
    """A replica of the physical shard has become its primary."""


@dataclass(frozen=True, slots=True)
class Yield:
    """A source that lost its decision in a failover gives way to the target that is open.

    Attributes:
        to: name of the target.
        target: its row.
    """

    move: Move
    to: str
    target: Row


@dataclass(frozen=True, slots=True)
class Release:
    """The move is over, here."""

    move: Move


Event = (
    Place | Claim | Import | Resume | Fence | Lift | Expire | Decide | Activate | Discard
    | Promote | Yield | Release
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Change:
    """What an event makes of a row.

    Attributes:
        row: the new row; the old one where nothing is left to do.
        actions: what the same transaction does besides.
    """

    row: Row
    actions: tuple[Action, ...] = ()


_OWNS: Final = frozenset({State.ACTIVE, State.FENCED})


def step(row: Row | None, event: Event) -> Change:
    """Return what an event makes of a row.

    Doing again what was done is no change, so that a step whose answer was lost can be repeated.

    Args:
        row: of one logical shard on one physical shard; None where there is none.
        event: what is to happen.

    Raises:
        RefusedError: it may not happen to this row; nothing is to be changed.
    """
    match event:
        case Place():
            if row is None:
                return Change(Row(1, State.ACTIVE))
        case Import(move):
            return _imported(row, move)
        case Promote() if row is not None:
            return Change(replace(row, epoch=row.epoch + (row.state in _OWNS)))
        case Expire(at, timeline, after) if row is not None:
            return _expired(row, at, timeline, after)
        case Claim(move) if row is not None:
            if row.state is State.ACTIVE and row.move_id in {None, move.id}:
                if row.move_id is not None:
                    _own(row, move)
                return Change(replace(row, move_id=move.id, attempt=move.attempt))
        case Resume(move) if row is not None:
            if row.move_id == move.id and row.attempt <= move.attempt:
                return Change(replace(row, attempt=move.attempt))
        case Activate(move, source, here) if row is not None:
            return _activated(row, move, source, here)
        case Promote() | Expire() | Claim() | Resume() | Activate():
            pass
        case _ if row is not None:
            return _moved(row, event)
    raise _refused(row, event)


def _moved(row: Row, event: Fence | Lift | Decide | Discard | Yield | Release) -> Change:
    """Return what a mover's event makes of a row that its move has claimed."""
    _own(row, event.move)
    match event:
        case Fence(_, to, at, timeline) if row.state is State.ACTIVE:
            fenced = replace(
                row, state=State.FENCED, moved_to=to, fenced_at=at, fence_timeline=timeline
            )
            return Change(fenced, (Action.LOCK, Action.CLOSE_WRITES))
        case Lift(_, timeline) if row.state is State.FENCED and row.fence_timeline == timeline:
            return Change(_lifted(row), (Action.OPEN,))
        case Lift() if row.state is State.ACTIVE:
            return Change(row)
        case Decide(_, timeline) if row.state is State.FENCED and row.fence_timeline == timeline:
            return Change(_retired(row, row.epoch + 1, row.moved_to), (Action.CLOSE,))
        case Decide() if row.state is State.RETIRED and row.moved_to is not None:
            return Change(row)
        case Yield(_, to, target) if row.state in _OWNS and target.state is State.ACTIVE:
            # What was written here since is in no copy: whoever yields has diffed before.
            return Change(
                _retired(row, max(row.epoch, target.epoch), to), (Action.LOCK, Action.CLOSE)
            )
        case Discard() if row.state is State.IMPORTING:
            return Change(replace(row, state=State.RETIRED, move_id=None))
        case Release() if row.state in {State.ACTIVE, State.RETIRED}:
            return Change(replace(row, move_id=None))
    raise _refused(row, event)


def _imported(row: Row | None, move: Move) -> Change:
    new = Row(0, State.IMPORTING, None, move.id, move.attempt)
    if row is None:
        return Change(new)
    if row.state is State.IMPORTING:
        _own(row, move)
        return Change(row)
    if row.state is State.RETIRED and row.move_id in {None, move.id}:
        return Change(replace(new, epoch=row.epoch, moved_to=row.moved_to))
    raise _refused(row, Import(move))


def _activated(row: Row, move: Move, source: Row, here: str) -> Change:
    if row.move_id != move.id:
        raise _refused(row, Activate(move, source, here))
    if (source.state, source.moved_to, source.move_id) != (State.RETIRED, here, move.id):
        raise RefusedError(
            f"the source has not handed over to {here!r}: its row says {source.state}",
            hint="decide there first",
        )
    if row.state is State.IMPORTING:
        opened = replace(row, state=State.ACTIVE, epoch=source.epoch, moved_to=None)
        return Change(opened, (Action.OPEN,))
    if row.state in _OWNS:
        return Change(replace(row, epoch=max(row.epoch, source.epoch)))
    raise _refused(row, Activate(move, source, here))


def _expired(row: Row, at: float, timeline: int, after: float) -> Change:
    if (
        row.state is State.FENCED
        and row.fence_timeline == timeline
        and row.fenced_at is not None
        and at - row.fenced_at >= after
    ):
        return Change(_lifted(row), (Action.OPEN,))
    return Change(row)


def _lifted(row: Row) -> Row:
    return replace(row, state=State.ACTIVE, moved_to=None, fenced_at=None, fence_timeline=None)


def _retired(row: Row, epoch: int, to: str | None) -> Row:
    return replace(
        row, state=State.RETIRED, epoch=epoch, moved_to=to, fenced_at=None, fence_timeline=None
    )


def _own(row: Row, move: Move) -> None:
    """Refuse a mover that is not the one that the row knows, or no longer."""
    if (row.move_id, row.attempt) != (move.id, move.attempt):
        held = "no move" if row.move_id is None else f"attempt {row.attempt} of move {row.move_id}"
        raise RefusedError(
            f"attempt {move.attempt} of move {move.id} has not claimed it: {held} has",
            hint="another mover is at work, or this one was given up; look at shardkit move status",
        )


def _refused(row: Row | None, event: Event) -> RefusedError:
    state = "nothing is known of it" if row is None else f"it is {row.state}"
    if row is not None and row.fence_timeline is not None:
        state += f" since timeline {row.fence_timeline}"
    claimed = row is not None and row.move_id is not None
    return RefusedError(
        f"{type(event).__name__}: {state} here"
        + (f", claimed by move {row.move_id}" if claimed and row is not None else ""),
        hint="look at shardkit move status",
    )
