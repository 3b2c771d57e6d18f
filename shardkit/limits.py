"""How many calls one server may have in flight, found by watching how long it takes.

Asked before a call and told after it, like the breaker, which handles servers that fail; this
handles one that is slow because too much is asked of it. Counts and computes, never waits: above
the limit a call is shed at once, work of the background before that of users.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable
from enum import Enum
from typing import Final

from shardkit.clock import SYSTEM, Clock
from shardkit.errors import ConfigurationError, OverloadedError
from shardkit.forks import ForkSafeLock

__all__ = ["ConcurrencyLimit", "Priority", "next_limit"]

FLOOR: Final = 2
"""The least limit: one call may always follow while another is under way."""

BATCH: Final = 100
"""Samples after which the limit is computed anew.

Source: Netflix concurrency-limits, Gradient2Limit, has a batch by time; Envoy's adaptive
concurrency filter computes with the median of a batch, as here.
"""

TOLERANCE: Final = 1.5
"""How many times its least a call may take before the limit falls. Source: as above."""

PROBE_EVERY: Final = 30.0
"""Seconds after which the least time is measured anew, 20 % more or less."""

PROBE_SAMPLES: Final = 20
"""Samples of which the quickest is the least time."""

PROBE_TIME: Final = 1.0
"""Seconds after which measuring the least time ends with the samples there are."""


class Priority(Enum):
    """For whom a call is made.

    `USER`: somebody waits for it. `BACKGROUND`: fan-out, repair, statistics; it gets at most four
    fifths of the limit, so that it is shed first.
    """

    USER = "user"
    BACKGROUND = "background"


_BACKGROUND_SHARE: Final = 0.8


def next_limit(limit: float, *, least: float, median: float, ceiling: int) -> float:
    """Return the limit for the next batch.

    Args:
        limit: the present one.
        least: seconds a call takes when the server has nothing else to do.
        median: seconds a call took in the last batch.
        ceiling: never more than this.

    Source: limit * clamp(1.5 * least / median, 0.5, 1) + √limit, the gradient of Netflix's
    concurrency-limits; √limit is the queue that is allowed.
    """
    gradient = TOLERANCE * least / median if median > 0 else 1.0
    return min(
        max(limit * min(max(gradient, 0.5), 1.0) + math.sqrt(limit), float(FLOOR)), float(ceiling)
    )


class ConcurrencyLimit:
    """Counts the calls in flight to one server and sheds those above the limit. Thread-safe.

    Each `acquire` that returns is followed by one `release`.

    Args:
        name: the server, as `physical/role@host:port`; stands in errors.
        initial: the first limit.
        ceiling: the highest, for instance the size of the pool.
        clock: source of time.
        uniform: draws from a range; `random.uniform`, which differs between forked children.

    *Invariant:* nothing is admitted while `in_flight` is at `limit`.

    Raises:
        ConfigurationError: the limits are not 2 ≤ initial ≤ ceiling.
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        initial: int = 20,
        ceiling: int = 1000,
        clock: Clock = SYSTEM,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        if not FLOOR <= initial <= ceiling:
            raise ConfigurationError(
                f"a concurrency limit of {initial}, at most {ceiling}: give {FLOOR} or more, "
                "and no more than the highest"
            )
        self._name = name
        self._ceiling = ceiling
        self._clock = clock
        self._uniform = uniform
        self._guard = ForkSafeLock(self._forget_calls)
        self._limit = float(initial)
        self._in_flight = 0
        self._busiest = 0
        self._samples: list[float] = []
        self._least = math.inf
        self._probing = False
        self._probe_at = self._next_probe()
        self._probe_samples: list[float] = []

    @property
    def limit(self) -> int:
        """How many calls may be in flight now; fewer while the least time is measured."""
        return max(FLOOR, int(self._limit / 4 if self._probing else self._limit))

    @property
    def in_flight(self) -> int:
        """Calls that were admitted and have not been released."""
        return self._in_flight

    def acquire(self, priority: Priority = Priority.USER) -> None:
        """Count one more call.

        Raises:
            OverloadedError: the limit is reached, for this priority (retryable).
        """
        with self._guard.lock:
            limit = self.limit
            if priority is Priority.BACKGROUND:
                limit = max(1, int(limit * _BACKGROUND_SHARE))
            if self._in_flight < limit:
                self._in_flight += 1
                self._busiest = max(self._busiest, self._in_flight)
                return
        raise OverloadedError(
            f"{self._in_flight} calls in flight, which is the limit for {priority.value} work",
            endpoint=self._name,
            hint="try again later, or add capacity",
        )

    def release(self, seconds: float | None = None) -> None:
        """Count one call less.

        Args:
            seconds: how long the server took to answer; None when it did not, or not in full:
                a failure that comes at once must not look like a quick server.
        """
        with self._guard.lock:
            # A forked child forgets the calls of its parent, which may yet be released there.
            self._in_flight = max(0, self._in_flight - 1)
            if seconds is not None and 0 <= seconds < math.inf:
                self._sample(seconds)

    def _sample(self, seconds: float) -> None:
        now = self._clock.monotonic()
        if self._probing:
            self._probe_samples.append(seconds)
            if len(self._probe_samples) < PROBE_SAMPLES and now < self._probe_at + PROBE_TIME:
                return
            self._least = min(self._probe_samples)
            self._probing = False
            self._probe_at = self._next_probe()
            self._samples.clear()
            self._busiest = self._in_flight
            return
        self._least = min(self._least, seconds)
        self._samples.append(seconds)
        if len(self._samples) >= BATCH:
            self._renew_limit()
        if now >= self._probe_at:
            self._probing = True
            self._probe_at = now
            self._probe_samples.clear()

    def _renew_limit(self) -> None:
        found = next_limit(
            self._limit,
            least=self._least,
            median=statistics.median(self._samples),
            ceiling=self._ceiling,
        )
        # A limit that is not reached says nothing about whether a higher one would do.
        if found < self._limit or self._busiest * 2 >= self._limit:
            self._limit = found
        self._samples.clear()
        self._busiest = self._in_flight

    def _next_probe(self) -> float:
        return self._clock.monotonic() + PROBE_EVERY * self._uniform(0.8, 1.2)

    def _forget_calls(self) -> None:
        self._in_flight = 0
