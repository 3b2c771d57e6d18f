"""One absolute deadline for everything a call waits for.

`with shardkit.deadline(0.5):` bounds every wait of what runs inside, in this thread or task: a
place in a pool, a connection, an answer, the pause before another attempt. Each wait takes what is
left, so waits do not add up. Nested deadlines only shorten. Read by the driver, the pools, sessions
and `shardkit.retry`; never waits itself.

Source: the deadline that a context carries, as in gRPC and in Go's `context`; docs/architecture.md,
decision 18.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, Token
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from shardkit.clock import SYSTEM, Clock
from shardkit.errors import DeadlineExceededError

__all__ = [
    "GRACE",
    "Deadline",
    "DeadlineScope",
    "check",
    "current",
    "deadline",
    "is_over",
    "left",
    "positive",
    "share",
]

GRACE: Final = 0.2
"""Seconds after a deadline in which a query may be cancelled and a connection saved; then it is
closed. With the time to notice, a call ends at most 0.25 s after its deadline."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """A point in time after which nobody waits any more.

    Attributes:
        at: seconds on the monotonic clock.
        clock: which clock.
    """

    at: float
    clock: Clock

    def left(self) -> float:
        """Return the seconds left; negative when it is over."""
        return self.at - self.clock.monotonic()


_CURRENT: ContextVar[Deadline | None] = ContextVar("shardkit_deadline", default=None)


class DeadlineScope:
    """What `deadline` returns: `with` or `async with` starts the time; it can be used again."""

    __slots__ = ("_clock", "_seconds", "_tokens")

    def __init__(self, seconds: float, clock: Clock) -> None:
        self._seconds = seconds
        self._clock = clock
        self._tokens: list[Token[Deadline | None]] = []

    def __enter__(self) -> Deadline:
        outer = _CURRENT.get()
        inner = Deadline(self._clock.monotonic() + self._seconds, self._clock)
        if outer is not None and outer.left() < inner.left():
            inner = outer
        self._tokens.append(_CURRENT.set(inner))
        return inner

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _CURRENT.reset(self._tokens.pop())

    async def __aenter__(self) -> Deadline:
        return self.__enter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.__exit__(kind, error, trace)

    def __copy__(self) -> Self:
        return type(self)(self._seconds, self._clock)


def deadline(seconds: float, *, clock: Clock = SYSTEM) -> DeadlineScope:
    """Bound everything that runs inside, from now on.

    When the time is over the server's query is cancelled and `DeadlineExceededError` raised, at
    most 0.25 s late, also by a server that has stopped answering. COMMIT is not cancelled once it
    is sent: `OutcomeUnknownError` then.

    Args:
        seconds: above 0 and finite. Inside another deadline the earlier one counts.
        clock: where the time comes from.

    Raises:
        ValueError: seconds is zero, negative, infinite or not a number.

    Example:
        >>> with deadline(0.5) as until:
        ...     0.4 < until.left() <= 0.5
        True
    """
    return DeadlineScope(positive(seconds, "deadline"), clock)


def positive(seconds: float, name: str) -> float:
    """Return seconds that are above 0 and finite.

    Raises:
        ValueError: they are not.
    """
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"{name}={seconds!r}: give seconds above 0, and finite")
    return float(seconds)


def share(part: float) -> AbstractContextManager[object]:
    """Bound what runs inside by a part of what is left, so that something else can follow.

    Args:
        part: of the time left, above 0 and at most 1; without a deadline there is no bound.
    """
    found = _CURRENT.get()
    seconds = 0.0 if found is None else found.left() * part
    return nullcontext() if found is None or seconds <= 0 else DeadlineScope(seconds, found.clock)


def current() -> Deadline | None:
    """Return the deadline of the running thread or task, or None."""
    return _CURRENT.get()


def left(cap: float) -> float:
    """Return how many seconds one wait may take: its own cap, or what is left if that is less.

    Args:
        cap: seconds this wait may take without a deadline; `math.inf` for any.

    Returns:
        Seconds, 0 when the deadline is over.
    """
    found = _CURRENT.get()
    return cap if found is None else min(cap, max(0.0, found.left()))


def is_over() -> bool:
    """Tell whether there is a deadline and nothing is left of it."""
    found = _CURRENT.get()
    return found is not None and found.left() <= 0


def check(waiting_for: str, *, needs: float = 0.0, endpoint: str | None = None) -> None:
    """Refuse to begin what there is no time for.

    Args:
        waiting_for: what would begin, for the message.
        needs: seconds it takes at least.
        endpoint: of which server.

    Raises:
        DeadlineExceededError: less than that is left (retryable).
    """
    found = _CURRENT.get()
    if found is not None and found.left() <= needs:
        raise DeadlineExceededError(f"no time left for {waiting_for}", endpoint=endpoint)
