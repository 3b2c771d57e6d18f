"""How many calls may be in flight: what raises the limit, what lowers it, who is shed."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkit.errors import ConfigurationError, OverloadedError, UnavailableError
from shardkit.limits import BATCH, FLOOR, PROBE_SAMPLES, ConcurrencyLimit, Priority, next_limit
from shardkit.testing import FakeClock


def limit_at(clock: FakeClock, **options: Any) -> ConcurrencyLimit:
    return ConcurrencyLimit(
        "alpha/primary@h:1", clock=clock, uniform=lambda low, high: (low + high) / 2, **options
    )


def run(limit: ConcurrencyLimit, seconds: float, *, batches: int = 1) -> None:
    """Keep the server as busy as the limit allows."""
    for _ in range(batches * BATCH):
        while limit.in_flight < limit.limit:
            limit.acquire()
        limit.release(seconds)
    while limit.in_flight:
        limit.release()


def test_above_the_limit_calls_are_shed_with_an_error_to_try_again() -> None:
    limit = limit_at(FakeClock(), initial=3)
    for _ in range(3):
        limit.acquire()
    with pytest.raises(OverloadedError, match="3 calls in flight") as shed:
        limit.acquire()
    assert shed.value.retryable
    assert isinstance(shed.value, UnavailableError)
    limit.release(0.01)
    limit.acquire()


@pytest.mark.parametrize(("initial", "for_background"), [(2, 1), (10, 8), (100, 80)])
def test_background_is_shed_before_users(initial: int, for_background: int) -> None:
    limit = limit_at(FakeClock(), initial=initial)
    for _ in range(for_background):
        limit.acquire(Priority.BACKGROUND)
    with pytest.raises(OverloadedError, match="background"):
        limit.acquire(Priority.BACKGROUND)
    for _ in range(initial - for_background):
        limit.acquire(Priority.USER)
    with pytest.raises(OverloadedError, match="user"):
        limit.acquire(Priority.USER)


def test_it_grows_while_the_server_keeps_its_pace() -> None:
    clock = FakeClock()
    limit = limit_at(clock, initial=20)
    run(limit, 0.01, batches=10)
    assert limit.limit > 60


def test_it_grows_no_further_than_its_ceiling() -> None:
    clock = FakeClock()
    limit = limit_at(clock, initial=20, ceiling=30)
    run(limit, 0.01, batches=10)
    assert limit.limit == 30


def test_it_does_not_grow_while_it_is_not_used() -> None:
    limit = limit_at(FakeClock(), initial=20)
    for _ in range(20 * BATCH):
        limit.acquire()
        limit.release(0.01)
    assert limit.limit == 20


def test_it_falls_when_the_server_slows_down_and_stops_at_the_floor() -> None:
    clock = FakeClock()
    limit = limit_at(clock, initial=100)
    run(limit, 0.01)
    before = limit.limit
    run(limit, 0.1, batches=1)
    assert limit.limit < before
    run(limit, 10.0, batches=40)
    assert FLOOR <= limit.limit <= 6, "half of itself and its root: 4 stays 4"


def test_calls_that_did_not_answer_say_nothing_about_speed() -> None:
    limit = limit_at(FakeClock(), initial=4)
    for seconds in (None, float("nan"), float("inf"), -1.0):
        for _ in range(3 * BATCH):
            limit.acquire()
            limit.release(seconds)
    assert (limit.limit, limit.in_flight) == (4, 0)


def test_the_least_time_is_measured_anew_with_fewer_calls_in_flight() -> None:
    clock = FakeClock()
    limit = limit_at(clock, initial=40)
    run(limit, 0.001)
    normal = limit.limit
    clock.advance(30)
    limit.acquire()
    limit.release(0.05)
    assert limit.limit == normal // 4, "so that no queue is measured"
    for _ in range(PROBE_SAMPLES):
        limit.acquire()
        limit.release(0.05)
    assert limit.limit == normal
    run(limit, 0.05, batches=3)
    assert limit.limit > normal, "0.05 s is what this server takes now"


def test_a_quiet_server_ends_the_measurement_by_time() -> None:
    clock = FakeClock()
    limit = limit_at(clock, initial=40)
    for wait in (30.0, 1.0):
        clock.advance(wait)
        limit.acquire()
        limit.release(0.01)
    assert limit.limit == 40


@pytest.mark.parametrize(("initial", "ceiling"), [(1, 10), (0, 10), (-5, 10), (20, 10)])
def test_limits_that_make_no_sense_are_refused(initial: int, ceiling: int) -> None:
    with pytest.raises(ConfigurationError):
        ConcurrencyLimit(initial=initial, ceiling=ceiling)


@given(
    limit=st.floats(2, 1e6),
    least=st.floats(0, 1e3),
    median=st.floats(0, 1e3),
    ceiling=st.integers(2, 10**6),
)
def test_the_next_limit_is_never_out_of_bounds(
    limit: float, least: float, median: float, ceiling: int
) -> None:
    found = next_limit(limit, least=least, median=median, ceiling=ceiling)
    assert FLOOR <= found <= ceiling
    assert found <= limit + limit**0.5 + 1e-6
    assert found >= min(limit * 0.5, ceiling)


def test_threads_never_pass_the_limit_and_leave_nothing_behind() -> None:
    limit = ConcurrencyLimit(initial=4, ceiling=4)
    most: list[int] = []

    def work(_: int) -> int:
        shed = 0
        for _ in range(500):
            try:
                limit.acquire()
            except OverloadedError:
                shed += 1
                continue
            most.append(limit.in_flight)
            limit.release(0.001)
        return shed

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, range(16)))
    assert max(most) <= 4
    assert limit.in_flight == 0


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_has_no_calls_in_flight() -> None:
    limit = limit_at(FakeClock(), initial=2)
    limit.acquire()
    limit.acquire()
    child = os.fork()
    if child == 0:
        os._exit(limit.in_flight)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert limit.in_flight == 2
