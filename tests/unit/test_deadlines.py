"""A deadline is one point in time, and the earliest counts."""

from __future__ import annotations

import asyncio
import contextvars
import math

import pytest
from sqlalchemy.util import greenlet_spawn

from shardkit import deadlines
from shardkit.deadlines import deadline
from shardkit.errors import DeadlineExceededError
from shardkit.parallel import run
from shardkit.testing import FakeClock


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def test_what_is_left_shrinks_and_ends(clock: FakeClock) -> None:
    assert deadlines.current() is None
    assert deadlines.left(5.0) == 5.0
    with deadline(2.0, clock=clock) as until:
        assert until.left() == 2.0
        assert deadlines.left(5.0) == 2.0
        assert deadlines.left(1.0) == 1.0
        clock.advance(1.5)
        assert deadlines.left(math.inf) == 0.5
        assert not deadlines.is_over()
        deadlines.check("an attempt", needs=0.4)
        with pytest.raises(DeadlineExceededError, match="no time left for an attempt"):
            deadlines.check("an attempt", needs=0.5)
        clock.advance(1.0)
        assert deadlines.is_over()
        assert deadlines.left(5.0) == 0.0
        assert until.left() == -0.5
    assert deadlines.current() is None
    assert not deadlines.is_over()


@pytest.mark.parametrize(("outer", "inner", "counts"), [(2.0, 5.0, 2.0), (5.0, 2.0, 2.0)])
def test_the_earlier_of_two_counts(
    clock: FakeClock, outer: float, inner: float, counts: float
) -> None:
    with deadline(outer, clock=clock):
        with deadline(inner, clock=clock):
            assert deadlines.left(math.inf) == counts
        assert deadlines.left(math.inf) == outer


def test_a_scope_can_be_used_again_and_within_itself(clock: FakeClock) -> None:
    scope = deadline(2.0, clock=clock)
    with scope:
        clock.advance(1.0)
        with scope:
            assert deadlines.left(math.inf) == 1.0
    with scope:
        assert deadlines.left(math.inf) == 2.0


def test_a_share_leaves_time_for_something_else(clock: FakeClock) -> None:
    with deadlines.share(0.5):
        assert deadlines.current() is None
    with deadline(2.0, clock=clock):
        with deadlines.share(0.5):
            assert deadlines.left(math.inf) == 1.0
        clock.advance(3.0)
        with deadlines.share(0.5):
            assert deadlines.is_over()


def test_tasks_of_one_thread_share_it(clock: FakeClock) -> None:
    with deadline(2.0, clock=clock):
        assert run([lambda: deadlines.left(9.0), lambda: deadlines.left(9.0)]) == [2.0, 2.0]


def test_a_context_of_its_own_has_its_own(clock: FakeClock) -> None:
    with deadline(2.0, clock=clock):
        assert contextvars.Context().run(deadlines.current) is None


def test_a_greenlet_of_sqlalchemy_sees_that_of_its_task(clock: FakeClock) -> None:
    async def main() -> float:
        async with deadline(2.0, clock=clock):
            return await greenlet_spawn(deadlines.left, 9.0)

    assert asyncio.run(main()) == 2.0


@pytest.mark.parametrize("seconds", [0, -1, -0.0, math.nan, math.inf, -math.inf])
def test_seconds_are_above_zero_and_finite(seconds: float) -> None:
    with pytest.raises(ValueError, match="seconds above 0"):
        deadline(seconds)
