"""How large the next batch of a backfill is, and how long it waits for its turn: pure but for it.

Called by `shardkit.ops.physical`; one `BatchSize` a logical shard, one `Rate` a physical shard.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from shardkit.clock import SYSTEM, Clock

__all__ = ["BatchSize", "Rate"]

FIRST = 100
"""Rows of the first batch: of any table these are written in some milliseconds."""


@dataclass(slots=True)
class BatchSize:
    """Rows of the next batch, so that it takes as long as it should.

    Attributes:
        seconds: that a batch should take; whoever wants one of its rows waits as long.
        most: rows it never exceeds.
        rows: of the next one.
    """

    seconds: float
    most: int
    rows: int = FIRST

    def __post_init__(self) -> None:
        self.rows = min(self.rows, self.most)

    def took(self, seconds: float) -> None:
        """Learn from a batch; at most twice or half the size, so that an odd one is no matter."""
        factor = self.seconds / max(seconds, 1e-6)
        self.rows = max(1, min(self.most, round(self.rows * min(2.0, max(0.5, factor)))))

    def shrink(self) -> None:
        """Learn that a batch met somebody else's lock: half of it meets fewer."""
        self.rows = max(1, self.rows // 2)


@dataclass(slots=True)
class Rate:
    """A bound on the rows of a physical shard that batches go through a second, for all threads.

    Attributes:
        per_second: rows; None for no bound.
    """

    per_second: float | None
    clock: Clock = SYSTEM
    _next: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, rows: int) -> float:
        """Return the seconds to wait before a batch of so many rows."""
        if self.per_second is None:
            return 0.0
        with self._lock:
            now = self.clock.monotonic()
            start = max(self._next, now)
            self._next = start + rows / self.per_second
            return start - now
