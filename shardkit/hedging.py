"""When a read that takes too long is asked of a second replica as well, and how often.

After as long as 97 of 100 reads take, a second replica is asked the same; the first answer counts,
and the other query is cancelled. At most 5 of 100 are: a replica that stumbles costs its
readers milliseconds, and replicas that are all slow are not asked twice as much. What lies between
the two figures is credit for moments in which many reads are slow at once. Pure: told of durations,
never waits. `shardkit.races` runs the two.

Source: Dean and Barroso, "The Tail at Scale", hedged requests.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Final

__all__ = ["Hedges"]

FLOOR: Final = 0.002
"""Seconds that every read is given: below that a second query costs more than it saves."""

SHARE: Final = 0.05
"""Second queries for each read."""

QUANTILE: Final = 0.97
"""Reads of the last `_KEPT` that take no longer than the delay.

In a model of reads of which 1 of 200 is 150 ms late, p95 spends the credit on a busy machine's own
delays before a late read comes, and p99 asks late: tests/unit/test_hedging.py."""

_CREDIT: Final = 10.0
"""Second queries that may be saved up, for servers that stumble together."""

_KEPT: Final = 400
"""Durations that are remembered."""

_LEAST: Final = 40
"""Durations below which nothing is known of the tail."""

_EVERY: Final = 20
"""Reads after which the delay is computed anew."""


class Hedges:
    """How the reads of one physical shard are hedged. Thread-safe.

    *Invariant:* of any n reads in a row at most `SHARE` * n + `_CREDIT` are asked twice.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._durations: deque[float] = deque(maxlen=_KEPT)
        self._delay: float | None = None
        self._credit = 0.0
        self._n_reads = 0

    @property
    def delay(self) -> float | None:
        """Seconds after which a second replica is asked; None while too little is known."""
        return self._delay

    def answered(self, seconds: float) -> None:
        """Note how long a read took, hedged or not."""
        with self._lock:
            self._durations.append(seconds)
            self._credit = min(_CREDIT, self._credit + SHARE)
            self._n_reads += 1
            if len(self._durations) >= _LEAST and self._n_reads % _EVERY == 0:
                found = sorted(self._durations)
                self._delay = max(FLOOR, found[int(len(found) * QUANTILE)])

    def spend(self) -> bool:
        """Take the right to one second query; return whether there was one."""
        with self._lock:
            if self._credit < 1:
                return False
            self._credit -= 1
            return True
