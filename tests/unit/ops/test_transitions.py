"""How an ownership row may change: which events pass which rows, and what no order of events does."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.strategies import floats, integers, sampled_from

from shardkit.errors import RefusedError
from shardkit.ops.moves.transitions import (
    Action,
    Activate,
    Claim,
    Decide,
    Discard,
    Event,
    Expire,
    Fence,
    Import,
    Lift,
    Move,
    Place,
    Promote,
    Release,
    Resume,
    Row,
    Yield,
    step,
)
from shardkit.ownership import State

MOVE = Move("m1")
ACTIVE = Row(1, State.ACTIVE)
CLAIMED = replace(ACTIVE, move_id="m1", attempt=1)
FENCED = replace(CLAIMED, state=State.FENCED, moved_to="beta", fenced_at=100.0, fence_timeline=1)
RETIRED = Row(2, State.RETIRED, "beta", "m1", 1)
IMPORTING = Row(0, State.IMPORTING, None, "m1", 1)
OPENED = Row(2, State.ACTIVE, None, "m1", 1)


@pytest.mark.parametrize(("before", "event", "after", "actions"), [
    (None, Place(), ACTIVE, ()),
    (None, Import(MOVE), IMPORTING, ()),
    (replace(RETIRED, move_id=None), Import(MOVE), replace(IMPORTING, epoch=2, moved_to="beta"), ()),
    (ACTIVE, Claim(MOVE), CLAIMED, ()),
    (CLAIMED, Fence(MOVE, "beta", 100.0, 1), FENCED, (Action.LOCK, Action.CLOSE_WRITES)),
    (FENCED, Lift(MOVE, 1), CLAIMED, (Action.OPEN,)),
    (FENCED, Expire(105.0, 1, 5.0), CLAIMED, (Action.OPEN,)),
    (FENCED, Expire(104.9, 1, 5.0), FENCED, ()),
    (FENCED, Expire(999.0, 2, 5.0), FENCED, ()),
    (FENCED, Decide(MOVE, 1), RETIRED, (Action.CLOSE,)),
    (IMPORTING, Activate(MOVE, RETIRED, "beta"), OPENED, (Action.OPEN,)),
    (IMPORTING, Discard(MOVE), Row(0, State.RETIRED, None, None, 1), ()),
    (FENCED, Promote(), replace(FENCED, epoch=2), ()),
    (RETIRED, Promote(), RETIRED, ()),
    (CLAIMED, Resume(Move("m1", 2)), replace(CLAIMED, attempt=2), ()),
    (CLAIMED, Release(MOVE), replace(ACTIVE, attempt=1), ()),
    (replace(CLAIMED, epoch=3), Yield(MOVE, "beta", OPENED), replace(RETIRED, epoch=3), (Action.LOCK, Action.CLOSE)),
])  # fmt: skip
def test_what_an_event_makes_of_a_row(
    before: Row | None, event: Event, after: Row, actions: tuple[Action, ...]
) -> None:
    change = step(before, event)
    assert (change.row, change.actions) == (after, actions)


@pytest.mark.parametrize(("row", "event"), [
    (CLAIMED, Claim(MOVE)),
    (IMPORTING, Import(MOVE)),
    (CLAIMED, Lift(MOVE, 1)),
    (RETIRED, Decide(MOVE, 1)),
    (OPENED, Activate(MOVE, RETIRED, "beta")),
])  # fmt: skip
def test_what_is_done_may_be_asked_for_again(row: Row, event: Event) -> None:
    assert step(row, event).row == row
    assert not step(row, event).actions


@pytest.mark.parametrize(("row", "event"), [
    (ACTIVE, Place()),
    (ACTIVE, Import(MOVE)),
    (ACTIVE, Fence(MOVE, "beta", 0.0, 1)),
    (CLAIMED, Claim(Move("m2"))),
    (CLAIMED, Claim(Move("m1", 2))),
    (CLAIMED, Fence(Move("m2"), "beta", 0.0, 1)),
    (CLAIMED, Fence(Move("m1", 2), "beta", 0.0, 1)),
    (CLAIMED, Decide(MOVE, 1)),
    (FENCED, Fence(MOVE, "beta", 0.0, 1)),
    (FENCED, Lift(MOVE, 2)),
    (FENCED, Decide(MOVE, 2)),
    (FENCED, Decide(Move("m1", 2), 1)),
    (FENCED, Release(MOVE)),
    (RETIRED, Lift(MOVE, 1)),
    (RETIRED, Import(Move("m2"))),
    (replace(CLAIMED, attempt=3), Resume(Move("m1", 2))),
    (IMPORTING, Activate(MOVE, FENCED, "beta")),
    (IMPORTING, Activate(MOVE, RETIRED, "gamma")),
    (IMPORTING, Activate(Move("m2"), RETIRED, "beta")),
    (IMPORTING, Claim(MOVE)),
    (OPENED, Discard(MOVE)),
    (None, Claim(MOVE)),
    (None, Promote()),
    (None, Fence(MOVE, "beta", 0.0, 1)),
])  # fmt: skip
def test_what_may_not_happen_is_refused(row: Row | None, event: Event) -> None:
    with pytest.raises(RefusedError):
        step(row, event)


class Moves(RuleBasedStateMachine):
    """A source, a target, and movers that stop, come back late and do things in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.source: Row = ACTIVE
        self.target: Row | None = None
        self.attempt = 1
        self.timeline = 1
        self.now = 0.0
        self.has_decided = False
        self.top = 1

    def _step(self, row: Row | None, event: Event) -> Row | None:
        try:
            return step(row, event).row
        except RefusedError:
            return row

    def _on_source(self, event: Event) -> None:
        found = self._step(self.source, event)
        assert found is not None
        self.source = found

    @initialize()
    def begins(self) -> None:
        self._on_source(Claim(MOVE))
        self.target = self._step(None, Import(MOVE))

    @rule(seconds=floats(0, 10))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def resume(self) -> None:
        self.attempt += 1
        self._on_source(Resume(Move("m1", self.attempt)))
        self.target = self._step(self.target, Resume(Move("m1", self.attempt)))

    @rule(late=integers(0, 2))
    def fence(self, late: int) -> None:
        self._on_source(Fence(self._mover(late), "beta", self.now, self.timeline))

    @rule(late=integers(0, 2), event=sampled_from([Lift, Decide]))
    def lift_or_decide(self, late: int, event: type[Lift | Decide]) -> None:
        before = self.source
        self._on_source(event(self._mover(late), self.timeline))
        if event is Decide and before.state is State.FENCED and self.source.state is State.RETIRED:
            assert self._mover(late).attempt == self.attempt, "overtaken attempts decide nothing"
            self.has_decided = True

    @rule()
    def expire(self) -> None:
        before = self.source
        self._on_source(Expire(self.now, self.timeline, 5.0))
        if before != self.source:
            assert before.fenced_at is not None
            assert self.now - before.fenced_at >= 5.0

    @rule()
    def activate(self) -> None:
        self.target = self._step(self.target, Activate(self._mover(0), self.source, "beta"))

    @precondition(lambda self: not self.has_decided)
    @rule()
    def the_source_fails_over(self) -> None:
        self.timeline += 1
        self._on_source(Promote())

    def _mover(self, late: int) -> Move:
        return Move("m1", max(1, self.attempt - late))

    @invariant()
    def one_owner_at_most(self) -> None:
        target = self.target
        opened = target is not None and target.state is State.ACTIVE
        assert not (opened and self.source.state is not State.RETIRED)
        if opened:
            assert self.has_decided
            assert target is not None
            assert target.epoch == self.source.epoch

    @invariant()
    def epochs_never_fall(self) -> None:
        top = max(self.source.epoch, self.target.epoch if self.target else 0)
        assert top >= self.top
        self.top = top


TestMoves = Moves.TestCase
TestMoves.settings = settings(max_examples=100, stateful_step_count=25, deadline=None)
