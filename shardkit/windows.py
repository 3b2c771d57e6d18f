"""When a breaker trips: the calls of the last seconds, and the rules over them.

Pure: told of calls and of the time, decides nothing but whether the numbers are bad.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from shardkit.errors import ConfigurationError

__all__ = ["BreakerRules", "Cause", "Counts", "Window", "open_time", "tripping"]

BUCKETS: Final = 10
"""Of one second each; old calls leave a bucket at a time."""


class Cause(StrEnum):
    """Why a breaker opens."""

    CONSECUTIVE = "consecutive failures"
    RATE = "failure rate"
    SLOW = "slow calls"
    PROBE = "failed probe"
    ORDER = "opened by hand"


@dataclass(frozen=True, slots=True)
class BreakerRules:
    """When a breaker trips, how long it stays open, and what closes it.

    Attributes:
        consecutive: failures in a row that trip it.
        least_calls: calls in the window below which no share is looked at.
        failure_share: share of failures that trips it, above 0 up to 1.
        slow_share: share of slow calls that trips it; failures that took as long count as slow.
        slow_after: seconds from which a call is slow.
        open_time: seconds it stays open the first time; twice as long each time a probe fails.
        longest_open: seconds it never stays open longer than.
        jitter: share by which these times differ, so that processes do not probe together.
        successes: probes in a row that must succeed to close it.
        probe_time: seconds after which a probe that told nothing is given up for another.

    Raises:
        ConfigurationError: a value is out of range, NaN or infinite.

    Source: 5 in a row as in Envoy's outlier detection and pybreaker; 50 % of at least 20 calls in
    10 s as in Hystrix; 80 % slow after resilience4j, which has 100 %.
    """

    consecutive: int = 5
    least_calls: int = 20
    failure_share: float = 0.5
    slow_share: float = 0.8
    slow_after: float = 1.0
    open_time: float = 1.0
    longest_open: float = 60.0
    jitter: float = 0.2
    successes: int = 3
    probe_time: float = 5.0

    def __post_init__(self) -> None:
        for name in ("consecutive", "least_calls", "successes"):
            _refuse_unless(getattr(self, name) >= 1, name, "at least 1")
        for name in ("failure_share", "slow_share"):
            _refuse_unless(0 < getattr(self, name) <= 1, name, "above 0, at most 1")
        for name in ("slow_after", "open_time", "longest_open", "probe_time"):
            _refuse_unless(0 < getattr(self, name) < math.inf, name, "a time above 0 s")
        _refuse_unless(0 <= self.jitter < 1, "jitter", "0 or more, below 1")
        _refuse_unless(self.open_time <= self.longest_open, "open_time", "at most longest_open")


def _refuse_unless(holds: bool, name: str, wanted: str) -> None:  # noqa: FBT001
    if not holds:
        raise ConfigurationError(f"breaker: {name} has to be {wanted}")


@dataclass(frozen=True, slots=True)
class Counts:
    """How many calls ended in a window; a call may be both a failure and slow."""

    calls: int
    failures: int
    slow: int


class Window:
    """Counts the calls of the last ten seconds, in buckets of one. Not thread-safe."""

    __slots__ = ("_buckets",)

    def __init__(self) -> None:
        self._buckets: deque[list[int]] = deque()  # number, calls, failures, slow; oldest first

    def add(self, now: float, calls: int, *, failures: int = 0, slow: int = 0) -> None:
        """Count calls that ended now, or a little earlier than the last that were counted."""
        number = math.floor(now)
        buckets = self._buckets
        if not buckets or buckets[-1][0] < number:
            buckets.append([number, 0, 0, 0])
        newest = buckets[-1]
        newest[1] += calls
        newest[2] += failures
        newest[3] += slow

    def counts(self, now: float) -> Counts:
        """Return the counts of the second that runs and of the nine before it."""
        oldest = math.floor(now) - BUCKETS
        buckets = self._buckets
        while buckets and buckets[0][0] <= oldest:
            buckets.popleft()
        return Counts(
            sum(bucket[1] for bucket in buckets),
            sum(bucket[2] for bucket in buckets),
            sum(bucket[3] for bucket in buckets),
        )

    def clear(self) -> None:
        """Forget every call."""
        self._buckets.clear()


def tripping(rules: BreakerRules, counts: Counts, in_a_row: int) -> Cause | None:
    """Return why a closed breaker should trip, or None.

    Args:
        rules: the limits.
        counts: calls in the window.
        in_a_row: failures since the last success.
    """
    if in_a_row >= rules.consecutive:
        return Cause.CONSECUTIVE
    if counts.calls < rules.least_calls:
        return None
    if counts.failures >= rules.failure_share * counts.calls:
        return Cause.RATE
    if counts.slow >= rules.slow_share * counts.calls:
        return Cause.SLOW
    return None


def open_time(rules: BreakerRules, times: int, jitter: float) -> float:
    """Return the seconds a breaker stays open.

    Args:
        rules: the limits.
        times: how often it opened before, since it was last closed.
        jitter: from -1 to 1, drawn at random.
    """
    longest = rules.longest_open / (1 + rules.jitter)  # jittered even at the cap
    doubled = rules.open_time * 2.0 ** min(times, 64)
    return min(doubled, longest) * (1 + rules.jitter * jitter)
