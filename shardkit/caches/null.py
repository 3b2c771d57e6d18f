"""No cache at all: nothing is ever found, nothing kept, and nothing waits for it."""

from __future__ import annotations

from collections.abc import Sequence

from shardkit.caches.backend import Answered, Place
from shardkit.caching.operations import UNKNOWN, Answer, Op, Outcome, Request

__all__ = ["AsyncNullCache", "NullCache"]

_DONE = Answer(Outcome.DONE)
_NOTHING = Answer(Outcome.NOTHING)
_DIFFERS = Answer(Outcome.DIFFERS)
_ANSWERS = {
    Op.LEASE: UNKNOWN,  # so that readers load and do not fill
    Op.READ: _NOTHING,
    Op.PUT: UNKNOWN,
    Op.STORE: _DIFFERS,
    Op.REMOVE: _DIFFERS,
    Op.DELETE: _DONE,
}


class NullCache:
    """A server that is always empty, and clean."""

    has_gutter = False
    dirty: frozenset[str] = frozenset()
    must_flush: frozenset[str] = frozenset()

    def run(self, requests: Sequence[Request], *, place: Place = Place.USUAL) -> list[Answer]:
        """Answer as an empty server that keeps nothing."""
        return [_ANSWERS[request.op] for request in requests]

    def start(self, requests: Sequence[Request]) -> Answered:
        """Carry requests out at once."""
        return Answered(self.run(requests))

    def home(self, key: str) -> str:
        """Return `null`."""
        return "null"

    def readmit(self, name: str) -> bool:
        """Do nothing."""
        return True

    def flush(self, name: str) -> bool:
        """Do nothing: it is empty."""
        return True

    def close(self) -> None:
        """Do nothing: there are no connections."""


class AsyncNullCache:
    """The same for asyncio."""

    has_gutter = False
    dirty: frozenset[str] = frozenset()
    must_flush: frozenset[str] = frozenset()

    async def run(self, requests: Sequence[Request], *, place: Place = Place.USUAL) -> list[Answer]:
        """Answer as an empty server that keeps nothing."""
        return [_ANSWERS[request.op] for request in requests]

    def home(self, key: str) -> str:
        """Return `null`."""
        return "null"

    def readmit(self, name: str) -> bool:
        """Do nothing."""
        return True

    async def flush(self, name: str) -> bool:
        """Do nothing: it is empty."""
        return True

    async def close(self) -> None:
        """Do nothing: there are no connections."""
