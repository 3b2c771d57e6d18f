"""A cache in this process, for tests: runs the very function that the model checker searches."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from shardkit.caches.backend import Answered, Place
from shardkit.caching.entries import LARGEST_ENTRY
from shardkit.caching.operations import UNKNOWN, Answer, Entry, Op, Request, apply
from shardkit.clock import SYSTEM, Clock
from shardkit.forks import ForkSafeLock

__all__ = ["AsyncMemoryCache", "MemoryCache"]


class MemoryCache:
    """Entries in a dictionary, one lock around each operation.

    Args:
        clock: source of time.
        most: entries that are kept; the oldest written goes first.
    """

    has_gutter = False
    dirty: frozenset[str] = frozenset()
    must_flush: frozenset[str] = frozenset()

    def __init__(self, *, clock: Clock = SYSTEM, most: int = 100_000) -> None:
        self._clock = clock
        self._most = most
        self._guard = ForkSafeLock()
        self._entries: dict[str, tuple[Entry, float]] = {}
        self._numbers = itertools.count(1)

    def run(self, requests: Sequence[Request], *, place: Place = Place.USUAL) -> list[Answer]:
        """Carry out requests on different keys; answer them in their order."""
        if place is Place.GUTTER:
            return [UNKNOWN] * len(requests)
        now = self._clock.monotonic()
        with self._guard.lock:
            return [self._apply(request, now) for request in requests]

    def start(self, requests: Sequence[Request]) -> Answered:
        """Carry requests out at once."""
        return Answered(self.run(requests))

    def home(self, key: str) -> str:
        """Return `memory`."""
        return "memory"

    def readmit(self, name: str) -> bool:
        """Do nothing: it is never left alone."""
        return True

    def flush(self, name: str) -> bool:
        """Forget everything."""
        with self._guard.lock:
            self._entries.clear()
        return True

    def close(self) -> None:
        """Do nothing: there are no connections."""

    def _apply(self, request: Request, now: float) -> Answer:
        if len(request.payload) > LARGEST_ENTRY:
            return UNKNOWN
        entry, expires = self._entries.get(request.key, (None, 0.0))
        if entry is not None and expires <= now:
            entry = None
        after, answer = apply(entry, request, next(self._numbers))
        if after is not entry:
            self._entries.pop(request.key, None)
            if after is not None:
                self._entries[request.key] = (after, now + request.ttl)
                if len(self._entries) > self._most:
                    del self._entries[next(iter(self._entries))]
        elif after is None and request.op is not Op.LEASE:
            self._entries.pop(request.key, None)
        return answer


class AsyncMemoryCache:
    """The same for asyncio; shares the entries of a `MemoryCache`."""

    has_gutter = False
    dirty: frozenset[str] = frozenset()
    must_flush: frozenset[str] = frozenset()

    def __init__(self, cache: MemoryCache | None = None) -> None:
        self._cache = cache or MemoryCache()

    async def run(self, requests: Sequence[Request], *, place: Place = Place.USUAL) -> list[Answer]:
        """Carry out requests on different keys; answer them in their order."""
        return self._cache.run(requests, place=place)

    def home(self, key: str) -> str:
        """Return `memory`."""
        return self._cache.home(key)

    def readmit(self, name: str) -> bool:
        """Do nothing: it is never left alone."""
        return True

    async def flush(self, name: str) -> bool:
        """Forget everything."""
        return self._cache.flush(name)

    async def close(self) -> None:
        """Do nothing: there are no connections."""
