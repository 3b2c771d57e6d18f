"""The breaker against a model that keeps every call in a list and reads the clock each time.

The model says when successes are counted in bulk, too, since that is what a caller gets: while
nothing is bad they count as of the last reading of the clock.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from shardkit import breaker as subject
from shardkit.breaker import Breaker, Probe
from shardkit.errors import BreakerOpenError
from shardkit.testing import FakeClock
from shardkit.windows import BreakerRules, open_time

RULES = BreakerRules(slow_after=1.0, probe_time=5.0)
DURATIONS = st.sampled_from([0.0, 0.25, 1.0, 3.0])
QUARTERS = st.integers(0, 60).map(lambda n: n / 4)  # exact as floats


class Model:
    """What protocols and docstrings say, in the plainest words."""

    def __init__(self) -> None:
        self.now = 0.0
        self.state = "closed"
        self.opened = 0
        self.retry_at = 0.0
        self.closed_at = -math.inf
        self.successes = 0
        self.permit: object = None
        self.expires = 0.0
        self.forget()

    def forget(self) -> None:
        self.calls: list[tuple[int, bool, bool]] = []  # second, failed, slow
        self.in_a_row = 0
        self.read_in = math.floor(self.now)
        self.unread = 0
        self.calm = True

    def admits(self) -> str:
        if self.state == "closed":
            return "call"
        waits_for = self.expires if self.permit else self.retry_at
        if self.now < waits_for:
            return "nothing"
        if self.state == "open":
            self.state, self.successes = "half-open", 0
        return "probe"

    def outcome(self, *, failed: bool, seconds: float, permit: object) -> None:
        if self.state == "closed":
            self.closed_outcome(failed, seconds)
        elif permit is not None and permit is self.permit:
            self.permit = None
            if failed or seconds >= RULES.slow_after:
                self.open()
            else:
                self.successes += 1
                if self.successes == RULES.successes:
                    self.state, self.opened, self.closed_at = "closed", 0, self.now
                    self.forget()

    def closed_outcome(self, failed: bool, seconds: float) -> None:
        second, slow = math.floor(self.now), seconds >= RULES.slow_after
        if failed and self.now - seconds < self.closed_at:
            return
        if self.calm and not failed and not slow:
            self.calls.append((self.read_in, False, False))
            self.unread += 1
            if self.unread == subject._STRIDE:
                self.read_in, self.unread = second, 0
            return
        self.read_in, self.unread = second, 0
        self.in_a_row = self.in_a_row + 1 if failed else 0
        self.calls.append((second, failed, slow))
        window = [call for call in self.calls if call[0] > second - 10]
        failures, slows = sum(call[1] for call in window), sum(call[2] for call in window)
        if self.in_a_row >= 5 or (
            len(window) >= 20 and (failures / len(window) >= 0.5 or slows / len(window) >= 0.8)
        ):
            self.open()
        self.calm = not (failures or slows or self.in_a_row)

    def open(self) -> None:
        self.state, self.permit = "open", None
        self.retry_at = self.now + open_time(RULES, self.opened, 0.0)
        self.opened += 1


class Machine(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.clock = FakeClock()
        self.model = Model()
        self.breaker = Breaker(
            "alpha", rules=RULES, clock=self.clock, uniform=lambda low, high: (low + high) / 2
        )
        self.out: list[tuple[Probe | None, object]] = []

    @rule(seconds=QUARTERS)
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.model.now += seconds

    @rule()
    def time_passes_until_a_probe_may_go(self) -> None:
        if self.model.state != "closed":
            self.time_passes(max(0.0, self.model.retry_at - self.model.now))

    @rule()
    def a_call_begins(self) -> None:
        expected = self.model.admits()
        if expected == "nothing":
            with pytest.raises(BreakerOpenError) as refused:
                self.breaker.admit()
            assert 0 <= (refused.value.retry_after or 0.0) <= 60
            return
        probe = self.breaker.admit()
        assert expected == ("call" if probe is None else "probe")
        permit: Any = None
        if probe is not None:
            permit = self.model.permit = object()
            self.model.expires = self.model.now + RULES.probe_time
        self.out.append((probe, permit))

    @rule(failed=st.booleans(), seconds=DURATIONS, data=st.data())
    def a_call_ends(self, failed: bool, seconds: float, data: st.DataObject) -> None:
        if self.out:
            probe, permit = self.out.pop(data.draw(st.integers(0, len(self.out) - 1)))
            self.end(failed, seconds, probe, permit)

    @rule(n=st.integers(1, 40), failed=st.lists(st.booleans(), min_size=1), seconds=DURATIONS)
    def many_calls(self, n: int, failed: list[bool], seconds: float) -> None:
        for turn in range(n):
            before = len(self.out)
            self.a_call_begins()
            if len(self.out) > before:
                self.end(failed[turn % len(failed)], seconds, *self.out.pop())

    @rule(data=st.data(), cancelled=st.booleans())
    def a_call_tells_nothing(self, data: st.DataObject, cancelled: bool) -> None:
        if self.out:
            probe, permit = self.out.pop(data.draw(st.integers(0, len(self.out) - 1)))
            if cancelled:
                self.breaker.abandoned(probe)
            else:
                assert not self.breaker.failed(ValueError("the caller's own"), 9.0, probe)
            if permit is not None and permit is self.model.permit:
                self.model.permit = None

    def end(self, failed: bool, seconds: float, probe: Probe | None, permit: object) -> None:
        self.model.outcome(failed=failed, seconds=seconds, permit=permit)
        if failed:
            assert self.breaker.failed(ConnectionResetError(), seconds, probe)
        else:
            self.breaker.succeeded(seconds, probe)

    @invariant()
    def both_agree(self) -> None:
        assert self.breaker.current_state == self.model.state == self.breaker.state.name
        assert self.breaker.is_closed == (self.model.state == "closed")
        if self.model.state == "closed":
            assert self.breaker.fail_counter == self.model.in_a_row
        if self.model.state == "half-open":
            assert self.breaker.success_counter == self.model.successes

    @invariant()
    def at_most_one_probe_is_out(self) -> None:
        now = self.clock.monotonic()
        valid = [p for p, _ in self.out if p is not None and p.expires > now]
        current = [p for p in valid if p is self.breaker._probe]
        assert len(current) <= 1
        assert self.breaker.current_state != "half-open" or len(valid) <= 1


TestBreaker = Machine.TestCase
TestBreaker.settings = settings(
    derandomize=True, max_examples=300, stateful_step_count=60, deadline=None
)
