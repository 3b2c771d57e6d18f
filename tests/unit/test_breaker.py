"""The breaker of one server: what trips it, what closes it, what leaves it alone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pybreaker
import pytest
from sqlalchemy.exc import IntegrityError

from shardkit.breaker import Breaker, OpenState
from shardkit.clock import SYSTEM
from shardkit.errors import BreakerOpenError, ConfigurationError, EndpointUnavailableError
from shardkit.testing import FakeClock, wait_until
from shardkit.windows import BreakerRules, Cause, open_time

REFUSED = ConnectionRefusedError("refused")
NEUTRAL = IntegrityError("INSERT", {}, Exception("duplicate key"))


def middle(low: float, high: float) -> float:
    return (low + high) / 2


def breaker_at(clock: FakeClock, **options: Any) -> Breaker:
    return Breaker("alpha/primary@h:1", clock=clock, **{"uniform": middle, **options})


def fail(breaker: Breaker, times: int = 1) -> None:
    for _ in range(times):
        breaker.failed(REFUSED, 0.0, breaker.admit())


def succeed(breaker: Breaker, times: int = 1, *, seconds: float = 0.01) -> None:
    for _ in range(times):
        breaker.succeeded(seconds, breaker.admit())


def tripped(clock: FakeClock, **options: Any) -> Breaker:
    breaker = breaker_at(clock, **options)
    fail(breaker, 5)
    assert breaker.current_state == "open"
    return breaker


def test_five_failures_in_a_row_trip_it() -> None:
    breaker = breaker_at(FakeClock())
    succeed(breaker, 1000)
    fail(breaker, 4)
    assert breaker.current_state == "closed"
    fail(breaker)
    assert (breaker.current_state, breaker.cause) == ("open", Cause.CONSECUTIVE)


def test_one_that_is_heard_of_is_tried_at_once_and_another_one_let_through() -> None:
    clock = FakeClock()
    again, another = (tripped(clock) for _ in range(2))
    for _ in range(6):
        for breaker in (again, another):
            clock.advance(breaker.retry_after or 0.0)
            fail(breaker)
    assert again.retry_after == another.retry_after == 50.0
    again.expect()
    another.expect(is_another=True)
    assert (again.retry_after, another.current_state) == (0.0, "closed")
    probe = again.admit()
    assert probe is not None
    with pytest.raises(BreakerOpenError):
        again.admit()
    again.expect()  # the probe that is out counts
    again.succeeded(0.01, probe)
    succeed(again, 2)
    assert again.current_state == "closed"


def test_one_that_was_opened_by_hand_stays_so_whoever_hears_of_it() -> None:
    clock = FakeClock()
    breaker = breaker_at(clock)
    breaker.open()
    breaker.expect(is_another=True)
    assert breaker.retry_after == 1.0


def test_a_success_between_ends_the_row() -> None:
    breaker = breaker_at(FakeClock())
    for _ in range(4):
        fail(breaker, 4)
        succeed(breaker, 40)
    assert breaker.current_state == "closed"


def test_excluded_errors_between_failures_end_no_row() -> None:
    breaker = breaker_at(FakeClock(), exclude=[TimeoutError])
    for _ in range(5):
        assert not breaker.failed(NEUTRAL, 0.0)
        assert not breaker.failed(TimeoutError(), 0.0)
        assert not breaker.failed(asyncio.CancelledError(), 0.0)
        assert breaker.failed(REFUSED, 0.0)
    assert breaker.current_state == "open"


def test_neutral_errors_alone_never_trip_it() -> None:
    breaker = breaker_at(FakeClock())
    for _ in range(1000):
        breaker.failed(NEUTRAL, 10.0, breaker.admit())
    assert breaker.fail_counter == 0
    succeed(breaker)


@pytest.mark.parametrize("healthy", [0, 5, 10_000])
def test_a_server_that_fails_four_of_five_calls_trips_it_within_25(healthy: int) -> None:
    clock = FakeClock()
    breaker = breaker_at(clock)
    succeed(breaker, healthy)
    clock.advance(11)
    calls = 0
    while breaker.current_state == "closed":
        succeed(breaker) if calls % 5 == 4 else fail(breaker)
        calls += 1
    assert calls <= 25
    assert breaker.cause is Cause.RATE


def test_half_of_twenty_calls_is_too_many_failures_and_less_is_not() -> None:
    few, many = breaker_at(FakeClock()), breaker_at(FakeClock())
    for turn in range(20):
        succeed(few) if turn % 2 or not turn else fail(few)
        succeed(many) if turn % 2 else fail(many)
    assert (few.current_state, many.current_state) == ("closed", "open")


def test_failures_among_many_successes_do_not_trip_it() -> None:
    breaker = breaker_at(FakeClock())
    succeed(breaker, 1000)
    for _ in range(40):
        fail(breaker)
        succeed(breaker)
    assert breaker.current_state == "closed"


def test_calls_of_ten_seconds_ago_count_no_longer() -> None:
    clock = FakeClock()
    breaker = breaker_at(clock)
    for _ in range(9):
        fail(breaker)
        succeed(breaker)
    clock.advance(10)
    fail(breaker)
    succeed(breaker)
    assert breaker.current_state == "closed", "two calls in the window, not twenty"


def test_slow_answers_trip_it() -> None:
    breaker = breaker_at(FakeClock())
    succeed(breaker, 4)
    succeed(breaker, 15, seconds=1.0)
    assert breaker.current_state == "closed"
    succeed(breaker, seconds=1.0)
    assert (breaker.current_state, breaker.cause) == ("open", Cause.SLOW)


def test_quick_answers_between_slow_ones_are_weighed_at_once() -> None:
    breaker = breaker_at(FakeClock())
    succeed(breaker, 16, seconds=1.0)
    succeed(breaker, 3)
    assert breaker.current_state == "closed"
    succeed(breaker)
    assert breaker.cause is Cause.SLOW, "16 of 20"


def test_a_duration_that_is_no_number_is_slow_not_quick() -> None:
    breaker = breaker_at(FakeClock())
    succeed(breaker, 20, seconds=float("nan"))
    assert breaker.cause is Cause.SLOW


def test_open_it_refuses_and_says_when_to_try_again() -> None:
    clock = FakeClock()
    breaker = tripped(clock)
    clock.advance(0.25)
    with pytest.raises(BreakerOpenError) as refused:
        breaker.admit()
    error = refused.value
    assert error.retryable
    assert error.retry_after == pytest.approx(0.75)
    assert error.endpoint == "alpha/primary@h:1"
    assert isinstance(error, EndpointUnavailableError)
    assert isinstance(error, pybreaker.CircuitBreakerError), "those who catch pybreaker's go on"


def test_one_probe_at_a_time_and_three_close_it() -> None:
    clock = FakeClock()
    breaker = tripped(clock)
    clock.advance(1.0)
    for _ in range(3):
        probe = breaker.admit()
        assert probe is not None
        assert breaker.current_state == "half-open"
        with pytest.raises(BreakerOpenError):
            breaker.admit()
        breaker.succeeded(0.01, probe)
    assert breaker.current_state == "closed"
    assert breaker.admit() is None


def test_a_probe_that_fails_opens_it_for_twice_as_long() -> None:
    clock = FakeClock()
    breaker = tripped(clock)
    waits = []
    for _ in range(9):
        wait = breaker.retry_after
        assert wait is not None
        waits.append(wait)
        clock.advance(wait)
        fail(breaker)
        assert (breaker.current_state, breaker.cause) == ("open", Cause.PROBE)
    assert waits == pytest.approx([1, 2, 4, 8, 16, 32, 50, 50, 50])


@pytest.mark.parametrize(("drawn", "shortest"), [(-1.0, 0.8), (1.0, 1.2)])
def test_open_times_differ_by_a_fifth_and_never_pass_a_minute(
    drawn: float, shortest: float
) -> None:
    rules = BreakerRules()
    assert open_time(rules, 0, drawn) == pytest.approx(shortest)
    assert open_time(rules, 2, drawn) == pytest.approx(4 * shortest)
    assert open_time(rules, 10_000, drawn) <= 60.0


def test_closing_forgets_how_long_it_was_open() -> None:
    clock = FakeClock()
    breaker = tripped(clock)
    clock.advance(1.0)
    fail(breaker)
    clock.advance(2.0)
    succeed(breaker, 3)
    fail(breaker, 5)
    assert breaker.retry_after == pytest.approx(1.0)


def test_a_cancelled_probe_makes_way_for_the_next() -> None:
    clock = FakeClock()
    breaker = tripped(clock)
    clock.advance(1.0)
    breaker.failed(asyncio.CancelledError(), 0.1, breaker.admit())
    breaker.abandoned(breaker.admit())
    breaker.failed(NEUTRAL, 0.1, breaker.admit())
    assert breaker.admit() is not None
    assert breaker.current_state == "half-open", "none of them changed anything"


def test_a_probe_that_never_ends_expires_and_counts_no_longer() -> None:
    clock = FakeClock()
    breaker = tripped(clock)
    clock.advance(1.0)
    lost = breaker.admit()
    clock.advance(4.9)
    with pytest.raises(BreakerOpenError):
        breaker.admit()
    clock.advance(0.1)
    second = breaker.admit()
    assert second is not lost
    breaker.failed(REFUSED, 5.0, lost)
    breaker.succeeded(0.1, lost)
    assert (breaker.current_state, breaker.success_counter) == ("half-open", 0)
    breaker.abandoned(lost)
    with pytest.raises(BreakerOpenError):  # the second is still out
        breaker.admit()


def test_calls_from_before_it_opened_change_nothing() -> None:
    clock = FakeClock()
    breaker = tripped(clock)
    breaker.succeeded(0.1)
    breaker.failed(REFUSED, 0.1)
    assert (breaker.current_state, breaker.retry_after) == ("open", 1.0)
    clock.advance(1.0)
    probe = breaker.admit()
    breaker.succeeded(0.1)
    breaker.failed(REFUSED, 2.0)
    assert (breaker.current_state, breaker.success_counter) == ("half-open", 0)
    breaker.succeeded(0.1, probe)
    succeed(breaker, 2)
    assert breaker.current_state == "closed"
    for _ in range(10):  # they hung since before it opened
        breaker.failed(REFUSED, 3.0)
    assert breaker.current_state == "closed"


def test_a_slow_probe_opens_it_again_unless_slowness_may_not() -> None:
    clock = FakeClock()
    for may_trip, after in ((None, "open"), (lambda cause: cause is not Cause.SLOW, "half-open")):
        breaker = tripped(clock, may_trip=may_trip)
        clock.advance(1.0)
        succeed(breaker, seconds=3.0)
        assert breaker.current_state == after


def test_it_stays_closed_while_it_may_not_trip() -> None:
    allowed: list[Cause] = []
    breaker = breaker_at(FakeClock(), may_trip=lambda cause: cause in allowed)
    fail(breaker, 50)
    assert breaker.current_state == "closed"
    allowed.append(Cause.CONSECUTIVE)
    fail(breaker)
    assert breaker.current_state == "open"


def test_it_is_opened_and_closed_by_hand_as_pybreakers() -> None:
    clock = FakeClock()
    breaker = breaker_at(clock)
    breaker.open()
    assert (breaker.current_state, breaker.cause) == ("open", Cause.ORDER)
    assert breaker._state_storage.opened_at is not None
    breaker.half_open()
    assert breaker.admit() is not None
    breaker.close()
    assert breaker.admit() is None
    breaker.state = "open"
    assert isinstance(breaker.state, pybreaker.CircuitOpenState)
    with pytest.raises(ValueError, match="half-open"):
        breaker.state = "ajar"


def test_pybreakers_settings_are_the_rules() -> None:
    breaker = breaker_at(FakeClock())
    assert (breaker.fail_max, breaker.reset_timeout, breaker.success_threshold) == (5, 1.0, 3)
    breaker.fail_max, breaker.reset_timeout, breaker.success_threshold = 2, 7.0, 1
    fail(breaker, 2)
    assert breaker.retry_after == pytest.approx(7.0)
    with pytest.raises(ConfigurationError):
        breaker.reset_timeout = float("nan")


@pytest.mark.parametrize(
    "wrong",
    [
        {"consecutive": 0}, {"least_calls": 0}, {"successes": -1}, {"failure_share": 0.0},
        {"failure_share": 1.1}, {"slow_share": float("nan")}, {"slow_after": 0.0},
        {"open_time": float("inf")}, {"probe_time": -1.0}, {"longest_open": 0.5},
        {"jitter": 1.0}, {"jitter": float("nan")},
    ],
    ids=str,
)  # fmt: skip
def test_rules_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        BreakerRules(**wrong)


class Seen(pybreaker.CircuitBreakerListener):
    def __init__(self) -> None:
        self.heard: list[str] = []

    def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
        self.heard.append(f"{old_state.name} → {new_state.name}")
        if isinstance(new_state, OpenState):
            self.heard.append(f"{new_state.cause} for {new_state.seconds:g} s")

    def failure(self, cb: Any, exc: BaseException) -> None:
        self.heard.append(type(exc).__name__)

    def before_call(self, cb: Any, func: Any, *args: Any, **kwargs: Any) -> None:
        self.heard.append(f"before {args}")


class Successes(pybreaker.CircuitBreakerListener):
    count = 0

    def success(self, cb: Any) -> None:
        self.count += 1


def test_pybreakers_listeners_hear_everything_in_order() -> None:
    clock = FakeClock()
    seen = Seen()
    breaker = breaker_at(clock, listeners=[seen], rules=BreakerRules(consecutive=2))
    fail(breaker, 2)
    clock.advance(1.0)
    succeed(breaker, 3)
    assert seen.heard == [
        "ConnectionRefusedError", "ConnectionRefusedError", "closed → open",
        "consecutive failures for 1 s", "open → half-open", "half-open → closed",
    ]  # fmt: skip


def test_a_listener_of_successes_hears_each() -> None:
    successes = Successes()
    breaker = breaker_at(FakeClock())
    succeed(breaker, 5)
    breaker.add_listener(successes)
    succeed(breaker, 100)
    breaker.remove_listener(successes)
    succeed(breaker, 100)
    assert successes.count == 100
    assert breaker.listeners == ()


def test_a_listener_that_raises_breaks_no_call(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(pybreaker.CircuitBreakerListener):
        def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
            raise RuntimeError("broken listener")

    seen = Seen()
    breaker = breaker_at(FakeClock(), listeners=[Broken(), seen])
    fail(breaker, 5)
    assert "closed → open" in seen.heard
    assert "broken listener" in caplog.text


def test_a_listener_may_use_the_breaker_and_holds_nobody_up() -> None:
    inside, leave = threading.Event(), threading.Event()

    heard: list[str] = []

    class Hangs(pybreaker.CircuitBreakerListener):
        def failure(self, cb: Any, exc: BaseException) -> None:
            heard.append("failure begins")
            if not inside.is_set():
                inside.set()
                cb.failed(REFUSED, 0.0)
                assert leave.wait(10)
            heard.append("failure ends")

        def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
            heard.append(new_state.name)

    breaker = breaker_at(FakeClock(), listeners=[Hangs()])
    hanging = threading.Thread(target=fail, args=(breaker,))
    hanging.start()
    assert inside.wait(10)
    succeed(breaker, 100)
    fail(breaker, 5)
    assert breaker.current_state == "open", "while a listener hangs"
    assert heard == ["failure begins"]
    leave.set()
    hanging.join(10)
    assert heard == ["failure begins", "failure ends"] * 7 + ["open"]


def test_a_function_is_called_decorated_or_enclosed() -> None:
    clock = FakeClock()
    seen = Seen()
    breaker = breaker_at(clock, rules=BreakerRules(consecutive=3), listeners=[seen])

    @breaker
    def talk(word: str) -> str:
        if word == "no":
            raise REFUSED
        return word

    assert talk("yes") == "yes"
    assert breaker.call(talk, "so") == "so"
    for _ in range(2):
        with pytest.raises(ConnectionRefusedError):
            talk("no")
    with pytest.raises(ConnectionRefusedError), breaker.calling():
        raise REFUSED
    with pytest.raises(pybreaker.CircuitBreakerError):
        talk("yes")
    assert seen.heard[0] == "before ('yes',)"


def test_failing_coroutines_trip_it_and_cancelled_ones_do_not() -> None:
    breaker = breaker_at(FakeClock())

    @breaker
    async def refused() -> None:
        await asyncio.sleep(0)
        raise REFUSED

    async def forever() -> None:
        await asyncio.Event().wait()

    async def run() -> None:
        waiting = [asyncio.create_task(breaker.call(forever)) for _ in range(20)]
        await asyncio.sleep(0)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert (breaker.current_state, breaker.fail_counter) == ("closed", 0)
        outcomes = await asyncio.gather(*(refused() for _ in range(5)), return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {ConnectionRefusedError}
        with pytest.raises(BreakerOpenError):
            await refused()

    asyncio.run(run())


def test_a_cancelled_probe_in_a_task_makes_way() -> None:
    clock = FakeClock()
    breaker = tripped(clock)

    async def forever() -> None:
        await asyncio.Event().wait()

    async def answer() -> str:
        return "here"

    async def run() -> None:
        clock.advance(1.0)
        probing = asyncio.create_task(breaker.call_async(forever))
        await asyncio.sleep(0)
        with pytest.raises(BreakerOpenError):
            await breaker.call_async(answer)
        probing.cancel()
        await asyncio.gather(probing, return_exceptions=True)
        assert [await breaker.call_async(answer) for _ in range(4)] == ["here"] * 4

    asyncio.run(run())
    assert breaker.current_state == "closed"


def test_event_loops_of_several_threads_share_it() -> None:
    breaker = Breaker(rules=BreakerRules(open_time=30.0))
    meeting = threading.Barrier(2, timeout=10)

    async def refused() -> None:
        raise REFUSED

    async def use() -> int:
        meeting.wait()
        outcomes = await asyncio.gather(
            *(breaker.call_async(refused) for _ in range(50)), return_exceptions=True
        )
        return sum(isinstance(outcome, ConnectionRefusedError) for outcome in outcomes)

    with ThreadPoolExecutor(2) as pool:
        reached = sum(pool.map(lambda _: asyncio.run(use()), range(2)))
    assert 5 <= reached <= 6, "a call of the other loop may be on its way"
    assert breaker.current_state == "open"


def test_calls_run_at_the_same_time() -> None:
    breaker = Breaker()
    meeting = threading.Barrier(16, timeout=10)
    with ThreadPoolExecutor(16) as pool:
        waits = [pool.submit(breaker.call, meeting.wait) for _ in range(16)]
        assert sorted(wait.result() for wait in waits) == list(range(16))


def test_there_is_exactly_one_probe_over_a_thousand_recoveries() -> None:
    clock = FakeClock()
    breaker = breaker_at(clock, rules=BreakerRules(successes=1))
    n_threads, recoveries = 8, 1000
    before, after = threading.Barrier(n_threads + 1), threading.Barrier(n_threads + 1)
    probes: list[Any] = []

    def contend() -> None:
        for _ in range(recoveries):
            before.wait(30)
            with contextlib.suppress(BreakerOpenError):
                probes.append(breaker.admit())
            after.wait(30)

    threads = [threading.Thread(target=contend, daemon=True) for _ in range(n_threads)]
    for thread in threads:
        thread.start()
    for _ in range(recoveries):
        fail(breaker, 5)
        clock.advance(1.0)
        before.wait(30)
        after.wait(30)
        assert len(probes) == 1
        breaker.succeeded(0.0, probes.pop())
        assert breaker.current_state == "closed"
    for thread in threads:
        thread.join(10)


def test_all_who_ask_in_the_same_moment_get_one_probe() -> None:
    class Counting(FakeClock):
        def __init__(self) -> None:
            super().__init__()
            self.readers: list[int] = []

        def monotonic(self) -> float:
            self.readers.append(threading.get_ident())
            return super().monotonic()

    clock = Counting()
    breaker = tripped(clock)
    clock.advance(1.0)

    def ask(_: int) -> bool:
        try:
            return breaker.admit() is not None
        except BreakerOpenError:
            return False

    with ThreadPoolExecutor(8) as pool:
        clock.readers.clear()
        with breaker._guard.lock:  # all have seen that it is time when the first may go on
            asked = [pool.submit(ask, number) for number in range(8)]
            wait_until(lambda: len(clock.readers) == 8, 10, "eight threads read the clock")
        assert sum(each.result(10) for each in asked) == 1


def test_threads_that_fail_four_of_five_calls_trip_it_within_25_each() -> None:
    breaker = Breaker(rules=BreakerRules(open_time=30.0), clock=SYSTEM)
    began = threading.Barrier(8, timeout=10)

    def work(number: int) -> int:
        began.wait()
        for call in range(1000):
            try:
                probe = breaker.admit()
            except BreakerOpenError:
                return call
            if (call + number) % 5 == 4:
                breaker.succeeded(0.0, probe)
            else:
                breaker.failed(REFUSED, 0.0, probe)
        return 1000

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(work, range(8))) <= 25 + 8  # each thread may have one on its way


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # forking with threads is the point
def test_a_forked_child_goes_on_with_a_lock_that_a_thread_held() -> None:
    clock = FakeClock()
    breaker = breaker_at(clock)
    held, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with breaker._guard.lock:
            held.set()
            assert leave.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(10)
    child = os.fork()
    if child == 0:  # exits by its own verdict, or by the alarm if it is stuck
        import signal

        signal.alarm(5)
        fail(breaker, 5)
        os._exit(0 if breaker.current_state == "open" else 1)
    _, status = os.waitpid(child, 0)
    leave.set()
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 0
    assert breaker.current_state == "closed", "what a child learns is its own"
