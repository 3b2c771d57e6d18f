"""When a failed unit of work may run again: the errors, the budget, the pauses.

The first attempt runs bare. What follows is tenacity's: how long to wait (full jitter), when to
stop. It also stops when the deadline leaves no time for another attempt, and when the budget of
the server that failed is spent: then the error of the last attempt is raised, as if nobody had
tried again. One layer only: what runs inside `Cluster.run` is tried again by nobody else.

Source: Google, "Site Reliability Engineering", chapter 22, retry budgets; Finagle's RetryBudget;
Brooker, "Exponential Backoff And Jitter" (full jitter); docs/architecture.md, decision 19.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Final, cast

import tenacity
from sqlalchemy.exc import DBAPIError, OperationalError

from shardkit import deadlines
from shardkit.clock import SYSTEM, Clock
from shardkit.errors import (
    DeadlineExceededError,
    EndpointUnavailableError,
    GatherError,
    OutcomeUnknownError,
    PoolTimeoutError,
    ShardFencedError,
    ShardkitError,
    ShardMovedError,
)

__all__ = [
    "MOVED", "READ_ONLY", "Attempts", "RetryBudget", "is_away", "is_moving", "is_transient",
]  # fmt: skip

WINDOW: Final = 10
"""Seconds over which a budget counts."""

SHARE: Final = 0.1
"""Attempts after the first, for each success in the window."""

ALWAYS: Final = 1.0
"""Attempts after the first that each second of the window may have without any success."""

ATTEMPTS: Final = 3
"""Attempts of one unit of work, the first included. With more, one call that cannot succeed would
use the budget of many that could."""

MOVES: Final = 10
"""Attempts while logical shards move under it: each first waits until it can be used, so that they
are few, and another move may begin meanwhile."""

SETTLED: Final = 10.0
"""Seconds from the first of them before they are counted: who owns a logical shard and who is the
primary there may change together, and for a while a server, or a pooler that leads to the one
before it, says what is no more. As long as a primary is waited for (`[failover] wait`)."""

_WAITED: Final = 1.0
"""Seconds after which an attempt that met a closed logical shard has waited for it, and asked
hardly anybody: it takes no credit, or who waits for the longest would be the first to give up."""

_FIRST_PAUSE: Final = 0.02
_LONGEST_PAUSE: Final = 1.0

READ_ONLY: Final = "25006"

MOVED: Final = frozenset({"42501", "42P01", "3F000", READ_ONLY})
"""No privilege, no table, no schema, read only: how a server says that a logical shard has moved.

Source: PostgreSQL manual, appendix A; docs/architecture.md, decision 7.
"""

_SHUT: Final = frozenset({"57P01", "57P02", "57P03", READ_ONLY})
"""Shutdowns, and a primary that takes no writes any more: a switchover begins."""

_AGAIN: Final = frozenset({"40001", "40P01"}) | _SHUT
"""Serialization failure, deadlock, shutdowns; and class 08, lost connections."""

_UNPUBLISHED: Final = ("XX000", "cache lookup failed for publication")
"""What PostgreSQL says to who reads a table's description while a move drops its publication.

Source: `RelationBuildPublicationDesc`, PostgreSQL 18: it reads a list and then each one of it.
"""

_TYPED: Final = (ShardFencedError, ShardMovedError)
"""What is sure to be about a logical shard that moves; a code may be about a missing table."""

_LONGEST_AWAY: Final = 0.25
"""Seconds between two attempts while there is no primary; most cost no round trip."""


class RetryBudget:
    """How many attempts after the first one server may still get. Thread-safe.

    A tenth of the successes of the last ten seconds, and one a second besides. While everything
    works, any failure may be tried again; when everything fails, nearly nothing is.

    Args:
        clock: where the time comes from.

    *Invariant:* over any `WINDOW` seconds at most `SHARE` of the successes plus `ALWAYS` each
    second is granted.
    """

    __slots__ = ("_clock", "_lock", "_second", "_spent", "_successes")

    def __init__(self, *, clock: Clock = SYSTEM) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._second = int(clock.monotonic())
        self._successes = [0] * WINDOW
        self._spent = [0] * WINDOW

    def succeeded(self) -> None:
        """Note that a server answered."""
        second = int(self._clock.monotonic())
        if second != self._second:
            self._forget(second)
        # Threads may lose a count to one another; a share of many can bear it.
        self._successes[second % WINDOW] += 1

    def spend(self) -> bool:
        """Take one credit; return whether there was one."""
        second = int(self._clock.monotonic())
        if second != self._second:
            self._forget(second)
        with self._lock:
            if sum(self._spent) + 1 > SHARE * sum(self._successes) + ALWAYS * WINDOW:
                return False
            self._spent[second % WINDOW] += 1
            return True

    def _forget(self, second: int) -> None:
        with self._lock:
            for past in range(max(self._second + 1, second - WINDOW + 1), second + 1):
                self._successes[past % WINDOW] = self._spent[past % WINDOW] = 0
            self._second = max(self._second, second)


def is_transient(error: BaseException) -> bool:
    """Tell whether a unit of work that failed before COMMIT was sent may succeed when run again.

    Errors of shardkit that say so, lost connections, deadlocks and serialization failures, servers
    that shut down, and logical shards that have moved or whose move is being tidied up after. A
    spent deadline is not: no time is left.
    """
    if isinstance(error, DeadlineExceededError):
        return False
    if isinstance(error, GatherError):
        return not any(isinstance(each, DeadlineExceededError) for each in error.failures.values())
    if isinstance(error, ShardkitError):
        return error.retryable
    if not isinstance(error, DBAPIError):
        return False
    code = getattr(error.orig, "sqlstate", None)
    if code is None:
        return _is_lost(error)
    if code == _UNPUBLISHED[0]:
        return _UNPUBLISHED[1] in str(error.orig)
    return code in MOVED or code in _AGAIN or code.startswith("08")


def _is_lost(error: DBAPIError) -> bool:
    """Tell whether the connection of an error is gone.

    Where a server answers with an error and is gone before the rollback, SQLAlchemy raises what the
    rollback has met, and says nothing of the connection then.
    """
    is_silent = getattr(error.orig, "sqlstate", None) is None
    return error.connection_invalidated or (is_silent and isinstance(error, OperationalError))


def is_moving(error: BaseException) -> bool:
    """Tell whether a logical shard was not where it was looked for, or not open there."""
    if isinstance(error, _TYPED):
        return True
    return isinstance(error, DBAPIError) and getattr(error.orig, "sqlstate", None) in MOVED


def is_away(error: BaseException) -> bool:
    """Tell whether a primary was not there, so that another one may soon be."""
    if isinstance(error, PoolTimeoutError):  # of a pooler that has no server
        return isinstance(error.__cause__, DBAPIError)
    if isinstance(error, EndpointUnavailableError | OutcomeUnknownError):
        return True
    if not isinstance(error, DBAPIError):
        return False
    code = getattr(error.orig, "sqlstate", None)
    return _is_lost(error) or (code is not None and (code in _SHUT or code.startswith("08")))


_MOVING: Final = 0.002
"""Seconds, at most, before a unit is tried again that met a logical shard which is being moved."""

_AT_ONCE: Final = 3
"""Attempts with so short a pause: a move takes one, and another one if it is met twice."""


class Attempts:
    """The attempts of one unit of work, told of each failure.

    Args:
        is_retryable: whether an error may be tried again at all.
        spend: takes a credit for an error from the budget of the server it is about; returns
            whether there was one.
        limit: attempts, the first included.
        waits: tells for how many seconds from now a primary that is away is waited for; asked
            with the error.
        clock: source of monotonic time.

    Example:
        >>> attempts = Attempts(is_transient, lambda _: True)
        >>> 0 <= attempts.pause(ShardkitError()) <= 0.02
        Traceback (most recent call last):
        shardkit.errors.ShardkitError: A shardkit operation failed.
    """

    def __init__(
        self,
        is_retryable: Callable[[BaseException], bool],
        spend: Callable[[BaseException], bool],
        *,
        limit: int = ATTEMPTS,
        waits: Callable[[BaseException], float] = lambda _error: 0.0,
        clock: Clock = SYSTEM,
    ) -> None:
        self._is_retryable = is_retryable
        self._spend = spend
        self._limit = limit
        self._waits = waits
        self._clock = clock
        self._waits_until: float | None = None
        self._moves_until: float | None = None
        self._begun = clock.monotonic()
        self._state: tenacity.RetryCallState | None = None

    def pause(self, error: BaseException) -> float:
        """Return how many seconds to wait before the next attempt.

        Raises:
            BaseException: the error itself: it is not to be tried again, or no longer.
        """
        if self._state is None:  # most units succeed at once, and pay nothing for this
            retrying = tenacity.Retrying(
                retry=tenacity.retry_if_exception(self._is_retryable),
                stop=self._is_over,
                wait=tenacity.wait_random_exponential(multiplier=_FIRST_PAUSE, max=_LONGEST_PAUSE),
                reraise=True,
            )
            retrying.begin()
            self._state = tenacity.RetryCallState(retrying, None, (), {})
        state = self._state
        state.set_exception((type(error), error, error.__traceback__))
        found: Any = cast("tenacity.Retrying", state.retry_object).iter(state)
        state.prepare_for_next_attempt()
        seconds = float(found)
        if is_moving(error) and not is_away(error):
            # Whoever waits for a move is told of its end: `shardkit.owners`.
            is_soon = state.attempt_number <= _AT_ONCE + 1 or not isinstance(error, _TYPED)
            seconds = min(seconds, _MOVING if is_soon else _LONGEST_AWAY)
        self._begun = self._clock.monotonic() + seconds
        return seconds

    def _is_over(self, state: tenacity.RetryCallState) -> bool:
        """Tell whether this was the last attempt; the credit is asked for last of all."""
        assert state.outcome is not None, "asked after an attempt"
        error = state.outcome.exception()
        assert error is not None, "asked after a failure"
        found = deadlines.current()
        if self._may_wait(error):
            state.upcoming_sleep = min(state.upcoming_sleep, _LONGEST_AWAY)
            return found is not None and found.left() <= state.upcoming_sleep
        limit = MOVES if is_moving(error) else self._limit
        return (
            (state.attempt_number >= limit and not self._may_settle(error))
            or (found is not None and found.left() <= state.upcoming_sleep)
            or not (self._has_waited(error) or self._spend(error))
        )

    def _has_waited(self, error: BaseException) -> bool:
        """Tell whether an attempt did little but wait for a logical shard to be opened."""
        is_long = self._clock.monotonic() - self._begun >= _WAITED
        return is_long and isinstance(error, ShardFencedError) and self._may_settle(error)

    def _may_settle(self, error: BaseException) -> bool:
        """Tell whether who owns a logical shard may not have been settled yet.

        Not of what only looks so: a table that does not exist stays away.
        """
        if not isinstance(error, _TYPED):
            return False
        if deadlines.current() is not None:
            return True
        now = self._clock.monotonic()
        if self._moves_until is None:
            self._moves_until = now + SETTLED
        return now < self._moves_until

    def _may_wait(self, error: BaseException) -> bool:
        """Tell whether a primary that is away is still waited for: no attempts are counted then."""
        if not is_away(error):
            return False
        seconds = self._waits(error)
        if seconds <= 0:
            return False
        now = self._clock.monotonic()
        if self._waits_until is None:
            self._waits_until = now + seconds
        return now < self._waits_until
