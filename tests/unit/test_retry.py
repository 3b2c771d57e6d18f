"""What is tried again, how often, and how soon."""

from __future__ import annotations

import threading
from collections.abc import Callable

import psycopg
import pytest
from sqlalchemy.exc import DBAPIError, IntegrityError, InternalError

from shardkit.deadlines import deadline
from shardkit.errors import (
    CrossShardWriteError,
    DeadlineExceededError,
    EndpointUnavailableError,
    GatherError,
    OutcomeUnknownError,
    PoolTimeoutError,
    ShardFencedError,
    ShardMovedError,
)
from shardkit.retry import (
    ALWAYS,
    ATTEMPTS,
    MOVES,
    SETTLED,
    SHARE,
    WINDOW,
    Attempts,
    RetryBudget,
    is_away,
    is_transient,
)
from shardkit.testing import FakeClock

GONE = EndpointUnavailableError("gone")


def from_server(sqlstate: str) -> DBAPIError:
    error = psycopg.errors.lookup(sqlstate)("said the server")
    found = DBAPIError.instance("SELECT", None, error, psycopg.Error)
    assert isinstance(found, DBAPIError)
    return found


def asking(asked: list[BaseException], *, grant: bool) -> Callable[[BaseException], bool]:
    """Return a budget that remembers what it was asked for."""

    def spend(error: BaseException) -> bool:
        asked.append(error)
        return grant

    return spend


def test_a_connection_that_ends_while_a_statement_is_rolled_back_is_gone() -> None:
    """SQLAlchemy then raises what the rollback has met, and does not say so."""
    lost = psycopg.OperationalError("consuming input failed: server closed the connection")
    error = DBAPIError.instance("SELECT", None, lost, psycopg.Error)
    assert isinstance(error, DBAPIError)
    assert not error.connection_invalidated
    assert is_transient(error)
    assert is_away(error)
    odd = DBAPIError.instance("SELECT", None, psycopg.ProgrammingError("odd"), psycopg.Error)
    assert not is_transient(odd)
    assert not is_away(odd)


def test_a_publication_that_a_move_drops_in_between_is_passing() -> None:
    for text, expected in (
        ("cache lookup failed for publication 156187", True),
        ("cache lookup failed for relation 156187", False),
    ):
        error = InternalError("UPDATE …", {}, psycopg.errors.InternalError_(text))
        assert is_transient(error) is expected


def test_without_successes_one_a_second_is_granted() -> None:
    clock = FakeClock()
    budget = RetryBudget(clock=clock)
    assert sum(budget.spend() for _ in range(100)) == WINDOW * ALWAYS
    clock.advance(WINDOW - 1)
    assert not budget.spend()
    clock.advance(1)
    assert sum(budget.spend() for _ in range(100)) == WINDOW * ALWAYS


def test_a_tenth_of_the_successes_is_granted_besides() -> None:
    clock = FakeClock()
    budget = RetryBudget(clock=clock)
    for _ in range(1000):
        budget.succeeded()
    assert sum(budget.spend() for _ in range(1000)) == 1000 * SHARE + WINDOW * ALWAYS
    clock.advance(WINDOW)
    assert sum(budget.spend() for _ in range(1000)) == WINDOW * ALWAYS, "successes are forgotten"


def test_an_hour_of_nothing_is_forgotten_at_once() -> None:
    clock = FakeClock()
    budget = RetryBudget(clock=clock)
    budget.succeeded()
    clock.advance(3600.5)
    assert budget.spend()


def test_threads_do_not_spend_a_credit_twice() -> None:
    budget = RetryBudget(clock=FakeClock())
    granted: list[bool] = []
    threads = [
        threading.Thread(target=lambda: granted.extend(budget.spend() for _ in range(200)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(granted) == WINDOW * ALWAYS


def test_total_failure_is_not_amplified() -> None:
    """A hundred calls a second, all of which fail, for a minute: three times as many, naively."""
    clock = FakeClock()
    budget = RetryBudget(clock=clock)
    calls, attempts = 6_000, 0
    for _ in range(calls):
        clock.advance(0.01)
        again = Attempts(is_transient, lambda _: budget.spend())
        attempts += 1
        try:
            while True:
                again.pause(GONE)
                attempts += 1
        except EndpointUnavailableError:
            pass
    assert calls < attempts <= calls * 1.12


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (GONE, True),
        (PoolTimeoutError(), True),
        (DeadlineExceededError(), False),
        (GatherError({"alpha": GONE}, {}), True),
        (GatherError({"alpha": GONE, "beta": DeadlineExceededError()}, {}), False),
        (OutcomeUnknownError(), False),
        (CrossShardWriteError(), False),
        (ValueError(), False),
        (KeyboardInterrupt(), False),
        *((from_server(code), True) for code in ("40001", "40P01", "57P01", "57P02", "57P03")),
        *((from_server(code), True) for code in ("08006", "42501", "42P01", "3F000", "25006")),
        *((from_server(code), False) for code in ("23505", "57014", "22012", "55P03")),
        (IntegrityError("INSERT", None, psycopg.errors.UniqueViolation()), False),
    ],
    ids=repr,
)
def test_only_what_may_have_passed_is_tried_again(error: BaseException, expected: bool) -> None:
    assert is_transient(error) is expected


def test_pauses_are_jittered_and_there_is_a_last_attempt() -> None:
    pauses = []
    for _ in range(200):
        attempts = Attempts(is_transient, lambda _: True)
        mine = [attempts.pause(GONE) for _ in range(ATTEMPTS - 1)]
        assert mine[0] <= 0.02
        assert mine[1] <= 0.04
        pauses += mine
        with pytest.raises(EndpointUnavailableError) as caught:
            attempts.pause(GONE)
        assert caught.value is GONE
    assert len(set(pauses)) > 300, "no two alike"


def test_the_error_of_the_last_attempt_is_raised_when_the_budget_is_spent() -> None:
    asked: list[BaseException] = []
    attempts = Attempts(is_transient, asking(asked, grant=False))
    with pytest.raises(EndpointUnavailableError):
        attempts.pause(GONE)
    assert asked == [GONE]


def pauses_of(error: BaseException, clock: FakeClock | None = None) -> list[float]:
    """Return the pauses of a unit that meets the same error, a millisecond later each time."""
    clock = clock or FakeClock()
    attempts, found = Attempts(is_transient, lambda _: True, clock=clock), []
    while True:
        try:
            found.append(attempts.pause(error))
        except type(error):
            return found
        clock.advance(found[-1] + 0.001)


def test_what_moves_is_tried_again_until_it_has_settled() -> None:
    pauses = pauses_of(ShardMovedError())
    assert max(pauses[:3]) <= 0.002, "a move by itself is over at once"
    assert max(pauses) <= 0.25
    assert sum(pauses) >= SETTLED - 1.0
    assert len(pauses) < 300, "nobody is asked all the time"


def test_what_moves_is_tried_again_until_the_deadline() -> None:
    clock = FakeClock()
    with deadline(40.0, clock=clock):
        assert 39.0 <= sum(pauses_of(ShardMovedError(), clock)) <= 40.0
    with deadline(1.0, clock=clock):
        assert sum(pauses_of(ShardMovedError(), clock)) <= 1.0


def test_who_has_waited_for_a_logical_shard_needs_no_credit() -> None:
    """Whoever waits asks hardly anybody; else those that wait longest are given up first."""
    clock, asked = FakeClock(), list[BaseException]()
    attempts = Attempts(is_transient, asking(asked, grant=False), clock=clock)
    with deadline(60.0, clock=clock):
        for _ in range(5):
            clock.advance(10.0)
            attempts.pause(ShardFencedError())
        assert asked == []
        with pytest.raises(ShardFencedError):
            attempts.pause(ShardFencedError())
    assert len(asked) == 1, "at once, it is one more question"


def test_a_table_that_does_not_exist_is_said_soon() -> None:
    assert sum(pauses_of(from_server("42P01"))) <= MOVES * 0.002


def test_no_credit_is_taken_for_what_is_not_tried_again() -> None:
    asked: list[BaseException] = []
    attempts = Attempts(is_transient, asking(asked, grant=True))
    with pytest.raises(CrossShardWriteError):
        attempts.pause(CrossShardWriteError())
    assert asked == []


def test_no_attempt_begins_without_time_for_it() -> None:
    clock = FakeClock()
    asked: list[BaseException] = []
    attempts = Attempts(is_transient, asking(asked, grant=True))
    with deadline(1.0, clock=clock):
        clock.advance(1.0)
        with pytest.raises(EndpointUnavailableError):
            attempts.pause(GONE)
    assert asked == []
