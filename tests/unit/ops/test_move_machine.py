"""What a mover does next: the table of both rows, and worlds in which it dies at every step."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import pytest

from shardkit.errors import RefusedError
from shardkit.ops.moves.machine import (
    BUDGET,
    FORWARD,
    MAX_FENCES,
    STALL,
    Do,
    Done,
    Facts,
    GiveUp,
    Goal,
    Step,
    Stop,
    View,
    Wait,
    decide,
)
from shardkit.ops.moves.transitions import (
    Activate,
    Claim,
    Decide,
    Discard,
    Expire,
    Fence,
    Import,
    Lift,
    Move,
    Promote,
    Release,
    Resume,
    Row,
    Yield,
    step,
)
from shardkit.ownership import LIFT_AFTER, State

MOVE = Move("m", 1)
READY = frozenset(FORWARD[:10])
OPEN = Row(3, State.ACTIVE, None, "m", 1)
FENCED = Row(3, State.FENCED, "beta", "m", 1, 100.0, 1)
RETIRED = Row(4, State.RETIRED, "beta", "m", 1)
COPY = Row(0, State.IMPORTING, None, "m", 1)
MOVED = Row(4, State.ACTIVE, None, "m", 1)
NEAR = Facts(lag_bytes=10, verified=1.0, first_timeline=1)


def view(source: Row | None, target: Row | None, **changes: object) -> View:
    given = {"done": READY, "facts": NEAR, **changes}
    goal = given.pop("goal", Goal.MOVE)
    return View(MOVE, goal, "beta", source, target, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("found", "action"),
    [
        (view(None, None), Stop),
        (view(replace(OPEN, move_id=None), None, done=frozenset()), Do(Step.CLAIM)),
        (view(replace(OPEN, move_id=None), None), Stop),
        (view(OPEN, None, done=frozenset()), Do(Step.IMPORT)),
        (view(OPEN, Row(2, State.RETIRED), done=frozenset()), Do(Step.IMPORT)),
        (view(OPEN, COPY, done=frozenset()), Do(Step.LOCK)),
        (view(OPEN, COPY, done=READY - {Step.COPY}), Do(Step.COPY)),
        (view(OPEN, COPY, done=READY - {Step.CATCH_UP}), Do(Step.CATCH_UP)),
        (view(OPEN, COPY, facts=replace(NEAR, lag_bytes=1 << 30)), Wait),
        (view(OPEN, COPY, facts=replace(NEAR, verified=None)), Do(Step.VERIFY)),
        (view(OPEN, COPY, done=READY - {Step.PREPARE_BACK}), Do(Step.PREPARE_BACK)),
        (view(OPEN, COPY), Do(Step.FENCE)),
        (view(OPEN, COPY, facts=replace(NEAR, is_held=True)), Done()),
        (view(OPEN, COPY, facts=replace(NEAR, n_fences=1, since_fence=0.0)), Wait),
        (view(OPEN, COPY, facts=replace(NEAR, n_fences=1, since_fence=9.0)), Do(Step.FENCE)),
        (view(OPEN, COPY, facts=replace(NEAR, n_fences=MAX_FENCES)), GiveUp),
        (view(OPEN, COPY, facts=replace(NEAR, stalled=STALL)), GiveUp),
        (view(OPEN, COPY, facts=replace(NEAR, broken="DDL")), GiveUp("DDL")),
        (view(OPEN, COPY, is_target_up=False), Stop),
        (view(FENCED, COPY, facts=replace(NEAR, fence_age=0.1)), Do(Step.DRAIN)),
        (view(FENCED, COPY, facts=replace(NEAR, fence_age=0.1, is_drained=True)), Do(Step.DECIDE)),
        (view(FENCED, COPY, facts=replace(NEAR, fence_age=BUDGET + 0.1, is_drained=True)), Do(Step.LIFT)),
        (view(FENCED, COPY, is_target_up=False), Do(Step.LIFT)),
        (view(RETIRED, COPY), Do(Step.ACTIVATE)),
        (view(RETIRED, COPY, is_target_up=False), Stop),
        (view(RETIRED, None), Stop),
        (view(RETIRED, MOVED), Do(Step.TURN)),
        (view(RETIRED, MOVED, done=READY | {Step.TURN}), Do(Step.CHECK)),
        (view(RETIRED, MOVED, done=frozenset(Step)), Done()),
        (view(RETIRED, MOVED, timeline=None), Stop),
        (view(RETIRED, COPY, timeline=None), Do(Step.ACTIVATE)),
        (view(OPEN, COPY, timeline=None), Stop),
        (view(OPEN, COPY, timeline=2), GiveUp),
        (view(FENCED, MOVED, timeline=2), Do(Step.YIELD)),
        (view(FENCED, COPY, timeline=2, is_target_up=False), Stop),
        # Giving up.
        (view(FENCED, COPY, goal=Goal.ABORT, done=frozenset()), Do(Step.LIFT)),
        (view(OPEN, COPY, goal=Goal.ABORT, done=frozenset()), Do(Step.DETACH)),
        (view(OPEN, COPY, goal=Goal.ABORT, done=frozenset({Step.DETACH})), Do(Step.DISCARD)),
        (view(RETIRED, COPY, goal=Goal.ABORT), Do(Step.ACTIVATE)),
        (view(replace(OPEN, move_id=None), None, goal=Goal.ABORT), Done()),
        # After a failover of the source: the target first, and then the lift.
        (view(FENCED, COPY, goal=Goal.ABORT, done=frozenset({Step.DETACH}), timeline=2), Do(Step.DISCARD)),
        (view(FENCED, Row(0, State.RETIRED), goal=Goal.ABORT, done=frozenset({Step.DETACH}), timeline=2), Do(Step.LIFT)),
        # Forgetting the old copy.
        (view(RETIRED, MOVED, goal=Goal.CLEAN, done=frozenset()), Do(Step.DETACH)),
        (view(OPEN, COPY, goal=Goal.CLEAN), Stop),
        (view(RETIRED, replace(MOVED, move_id=None), goal=Goal.CLEAN), Done()),
    ],
)  # fmt: skip
def test_the_table(found: View, action: object) -> None:
    decided = decide(found)
    assert isinstance(decided, action) if isinstance(action, type) else decided == action


@dataclass
class World:
    """Two ownership rows, a journal and what lies on the servers, with a mover that may die."""

    chance: random.Random
    goal: Goal = Goal.MOVE
    attempt: int = 1
    now: float = 0.0
    timeline: int = 1
    source: Row | None = field(default_factory=lambda: Row(3, State.ACTIVE))
    target: Row | None = None
    done: dict[Goal, set[Step]] = field(default_factory=lambda: {goal: set() for goal in Goal})
    first: int | None = None
    drained: float | None = None
    verified: bool = False
    n_fences: int = 0
    failed_over: bool = False
    trace: list[str] = field(default_factory=list)

    def run(self) -> None:
        for _ in range(400):
            if self._passes():
                return
            owners = [
                row
                for row in (self.source, self.target)
                if row is not None and row.state is State.ACTIVE
            ]
            assert len(owners) < 2 or owners[0].epoch != owners[1].epoch, self.trace
        raise AssertionError(self.trace)

    def _passes(self) -> bool:
        self.now += self.chance.expovariate(2.0)
        self._faults()
        action = decide(self._view())
        self.trace.append(f"{self.now:.1f} {action}")
        if isinstance(action, Done):
            return True
        if isinstance(action, GiveUp):
            self.goal = Goal.ABORT
        elif isinstance(action, Do):
            if self.chance.random() < 0.15:
                self._dies()  # before
                return False
            try:
                self._do(action.step)
            except RefusedError:
                assert action.step in {Step.DECIDE, Step.DRAIN}, (action, self.trace)
                return False
            if self.chance.random() < 0.15:
                self._dies()  # after, with nothing written down
                return False
            if action.step is not Step.LIFT:
                self.done[self.goal].add(action.step)
        else:
            assert not isinstance(action, Stop), self.trace
        return False

    def _faults(self) -> None:
        if self.source is not None and self.source.state is State.FENCED:
            expire = Expire(self.now, self.timeline, LIFT_AFTER)
            self.source = step(self.source, expire).row
        if not self.failed_over and self.chance.random() < 0.01:
            self.failed_over = True
            self.timeline += 1
            assert self.source is not None
            self.source = step(self.source, Promote()).row

    def _dies(self) -> None:
        self.trace.append("dies")
        self.attempt += 1
        self.drained, self.verified, self.n_fences = None, False, 0
        move = Move("m", self.attempt)
        for side in ("source", "target"):
            row = getattr(self, side)
            if row is not None and row.move_id == "m":
                setattr(self, side, step(row, Resume(move)).row)
        if self.goal is Goal.MOVE and self.chance.random() < 0.2:
            self.goal = Goal.ABORT

    def _view(self) -> View:
        source = self.source
        age = None if source is None or source.fenced_at is None else self.now - source.fenced_at
        facts = Facts(
            lag_bytes=0,
            verified=0.0 if self.verified else None,
            fence_age=age,
            is_drained=source is not None
            and source.fenced_at is not None
            and self.drained == source.fenced_at,
            n_fences=self.n_fences,
            since_fence=99.0,
            first_timeline=self.first,
        )
        return View(
            Move("m", self.attempt), self.goal, "beta", source, self.target,
            frozenset(self.done[self.goal]), self.timeline, facts=facts,
        )  # fmt: skip

    def _do(self, what: Step) -> None:
        move = Move("m", self.attempt)
        source, target = self.source, self.target
        match what:
            case Step.CLAIM:
                self.source = step(source, Claim(move)).row
            case Step.IMPORT:
                self.target = step(target, Import(move)).row
                self.first = self.timeline if self.first is None else self.first
            case Step.VERIFY:
                self.verified = True
            case Step.FENCE:
                self.source = step(source, Fence(move, "beta", self.now, self.timeline)).row
            case Step.DRAIN:
                assert source is not None
                self.drained = source.fenced_at
            case Step.LIFT:
                assert source is not None
                self.source = step(source, Lift(move, source.fence_timeline or 0)).row
                self.n_fences += 1
            case Step.DECIDE:
                self.source = step(source, Decide(move, self.timeline)).row
            case Step.ACTIVATE:
                assert source is not None
                self.target = step(target, Activate(move, source, "beta")).row
            case Step.YIELD:
                assert target is not None
                self.source = step(source, Yield(move, "beta", target)).row
            case Step.DISCARD:
                self.target = step(target, Discard(move)).row
            case Step.RELEASE:
                self.source = step(source, Release(move)).row
            case _:
                pass


@pytest.mark.parametrize("block", range(10))
def test_a_mover_that_dies_anywhere_is_brought_to_an_end_and_nobody_owns_twice(block: int) -> None:
    ends = set()
    for seed in range(block * 100, block * 100 + 100):
        world = World(random.Random(seed))
        world.run()
        moved = world.target is not None and world.target.state is State.ACTIVE
        ends.add(moved)
        assert world.source is not None
        assert world.source.state is (State.RETIRED if moved else State.ACTIVE), world.trace
        if not moved:
            assert world.source.move_id is None
            assert world.target is None or world.target.state is State.RETIRED
    assert ends == {True, False}


def test_clients_are_given_time_to_hear_of_it_before_the_first_fence() -> None:
    waiting = decide(view(OPEN, COPY, facts=replace(NEAR, notice=1.0)))
    assert isinstance(waiting, Wait)
    assert waiting.seconds <= 1.0
    held = replace(NEAR, notice=1.0, is_held=True)
    assert decide(view(OPEN, COPY, facts=held)) == Done(), "whoever resumes it comes later"
    assert decide(view(OPEN, COPY, facts=replace(NEAR, notice=-0.1))) == Do(Step.FENCE)
