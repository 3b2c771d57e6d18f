"""How often the cache had what was asked for."""

from __future__ import annotations

from dataclasses import dataclass, fields

from shardkit.forks import ForkSafeLock

__all__ = ["CacheCounts", "Tally"]


@dataclass(frozen=True, slots=True)
class CacheCounts:
    """What has become of the rows that sessions looked for in the cache.

    Attributes:
        hits: had from it, "no such row" among them.
        misses: had from a database.
        fills: of the misses, those that were stored.
        waits: times a reader asked again because another filled or a writer was about to commit.
        garbage: entries that nobody of us wrote, or that were not of their row; removed.
        unanswered: requests that no server answered in time, or that were not even sent.
    """

    hits: int = 0
    misses: int = 0
    fills: int = 0
    waits: int = 0
    garbage: int = 0
    unanswered: int = 0

    @property
    def hit_rate(self) -> float:
        """Of the rows looked for, the part that the cache had; 0 when none were."""
        looked_for = self.hits + self.misses
        return self.hits / looked_for if looked_for else 0.0

    def __add__(self, other: CacheCounts) -> CacheCounts:
        return CacheCounts(*(getattr(self, name) + getattr(other, name) for name in _NAMES))


_NAMES = tuple(field.name for field in fields(CacheCounts))


class Tally:
    """Counts, from any thread; a forked child begins with its parent's."""

    __slots__ = ("_counts", "_guard", "_hits")

    def __init__(self) -> None:
        self._guard = ForkSafeLock()
        self._counts = CacheCounts()
        self._hits = 0

    def hit(self) -> None:
        """Count one hit and nothing else, as nearly always."""
        with self._guard.lock:
            self._hits += 1

    def add(self, counts: CacheCounts) -> None:
        """Count more."""
        with self._guard.lock:
            self._counts += counts

    @property
    def counts(self) -> CacheCounts:
        """What was counted so far."""
        with self._guard.lock:
            return self._counts + CacheCounts(hits=self._hits)
