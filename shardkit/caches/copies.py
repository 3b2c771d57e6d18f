"""Copies of hot rows in this process, for some hundredths of a second; only of tables that ask.

    cache = CopiedCache(Memcached([...]), {"users": 0.05})

A copy cannot know that its row was written. The promise that a read which begins after a write
was acknowledged is shown nothing older is kept by the writer: it acknowledges `wait` later than it
would. Whatever a copy holds was asked for before the writer was done, or is new; and it ends its
life counted from *before* it was asked for. So at the acknowledgement no process has an older one.
The price is that wait, after COMMIT and without locks, in every write to such a table.

Source: Gray and Cheriton, "Leases: an efficient fault-tolerant mechanism for distributed file
cache consistency" (1989).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from shardkit.caches.backend import AsyncBackend, Backend, Place, Underway, is_change
from shardkit.caching.operations import UNKNOWN, Answer, Kind, Op, Outcome, Request
from shardkit.clock import SYSTEM, Clock

__all__ = ["MOST_COPIES", "AsyncCopiedCache", "CopiedCache", "Copies"]

MOST_COPIES: Final = 10_000
"""Copies a process keeps; the oldest goes first."""

_UNEVEN: Final = 1.05
"""Clocks of two machines may run so differently; quartz is a thousand times better."""


class Copies:
    """What a process has copied. Thread-safe: each step is one of a dictionary's.

    Args:
        lives: seconds that copies of a table's rows live, by its name; others are not copied,
            nor rows whose names were hashed.
        clock: source of time.
        most: copies that are kept.
    """

    def __init__(
        self, lives: Mapping[str, float], *, clock: Clock = SYSTEM, most: int = MOST_COPIES
    ) -> None:
        self._lives = dict(lives)
        self._now = clock.monotonic
        self._most = most
        self._held: dict[str, tuple[Answer, float]] = {}

    def __len__(self) -> int:
        return len(self._held)

    def wait(self, keys: Iterable[str]) -> float:
        """Return how many seconds a writer of these entries waits before it acknowledges."""
        return max((self._life(key) for key in keys), default=0.0) * _UNEVEN

    def split(self, requests: Sequence[Request]) -> tuple[list[Answer], list[int], float]:
        """Return answers from copies, the places of what has to be asked, and the time."""
        now = self._now()
        answers = [UNKNOWN] * len(requests)
        rest = []
        for index, request in enumerate(requests):
            if request.op is Op.LEASE:
                answer, expires = self._held.get(request.key, (UNKNOWN, 0.0))
                if now < expires:
                    answers[index] = answer
                    continue
            elif is_change(request):
                self._held.pop(request.key, None)
            rest.append(index)
        return answers, rest, now

    def keep(self, request: Request, answer: Answer, asked: float) -> None:
        """Copy what a server has shown, if its table asks for that.

        Args:
            request: that was sent.
            answer: to it.
            asked: time before it was sent.
        """
        is_shown = answer.outcome is Outcome.FOUND and answer.kind in {Kind.VALUE, Kind.ABSENCE}
        if request.op is not Op.LEASE or not is_shown:
            return
        if life := self._life(request.key):
            self._held.pop(request.key, None)
            self._held[request.key] = (answer, asked + life)
            while len(self._held) > self._most:
                self._held.pop(next(iter(self._held)), None)

    def forget(self) -> None:
        """Have no copies."""
        self._held.clear()

    def _life(self, key: str) -> float:
        parts = key.split(":", 4)  # see `cache_key`
        return self._lives.get(parts[3], 0.0) if len(parts) == 5 else 0.0


class CopiedCache:
    """A backend that answers from copies where there are any.

    Args:
        backend: whose servers are asked otherwise.
        lives: see `Copies`.
        clock: source of time.

    Attributes:
        copies: of this process. Writers wait `copies.wait` before they acknowledge.
    """

    def __init__(
        self, backend: Backend, lives: Mapping[str, float], *, clock: Clock = SYSTEM
    ) -> None:
        self._backend = backend
        self.copies = Copies(lives, clock=clock)

    def run(self, requests: Sequence[Request], *, place: Place = Place.USUAL) -> list[Answer]:
        """Carry out requests on different keys; answer them in their order."""
        answers, rest, asked = self.copies.split(requests)
        if place is not Place.USUAL:  # a relay wants to know what the server has
            return self._backend.run(requests, place=place)
        if rest:
            found = self._backend.run([requests[n] for n in rest])
            for n, answer in zip(rest, found, strict=True):
                answers[n] = answer
                self.copies.keep(requests[n], answer, asked)
        return answers

    def start(self, requests: Sequence[Request]) -> Underway:
        """Send requests on different keys, whose answers are wanted later: a writer's."""
        self.copies.split(requests)
        return self._backend.start(requests)

    @property
    def has_gutter(self) -> bool:
        """Whether there is a gutter to repair, too."""
        return self._backend.has_gutter

    @property
    def dirty(self) -> frozenset[str]:
        """Names of the servers that this process does not read for now."""
        return self._backend.dirty

    @property
    def must_flush(self) -> frozenset[str]:
        """Names of those that only `flush` makes clean."""
        return self._backend.must_flush

    def home(self, key: str) -> str:
        """Return the name of the server that a key belongs to."""
        return self._backend.home(key)

    def readmit(self, name: str) -> bool:
        """Read a server again: everything it missed has been repaired there."""
        return self._backend.readmit(name)

    def flush(self, name: str) -> bool:
        """Empty a server and read it again; return whether it answered."""
        self.copies.forget()
        return self._backend.flush(name)

    def close(self) -> None:
        """Close every connection; later calls open new ones."""
        self.copies.forget()
        self._backend.close()


class AsyncCopiedCache:
    """The same for asyncio."""

    def __init__(
        self, backend: AsyncBackend, lives: Mapping[str, float], *, clock: Clock = SYSTEM
    ) -> None:
        self._backend = backend
        self.copies = Copies(lives, clock=clock)

    async def run(self, requests: Sequence[Request], *, place: Place = Place.USUAL) -> list[Answer]:
        """Carry out requests on different keys; answer them in their order."""
        answers, rest, asked = self.copies.split(requests)
        if place is not Place.USUAL:
            return await self._backend.run(requests, place=place)
        if rest:
            found = await self._backend.run([requests[n] for n in rest])
            for n, answer in zip(rest, found, strict=True):
                answers[n] = answer
                self.copies.keep(requests[n], answer, asked)
        return answers

    @property
    def has_gutter(self) -> bool:
        """Whether there is a gutter to repair, too."""
        return self._backend.has_gutter

    @property
    def dirty(self) -> frozenset[str]:
        """Names of the servers that this process does not read for now."""
        return self._backend.dirty

    @property
    def must_flush(self) -> frozenset[str]:
        """Names of those that only `flush` makes clean."""
        return self._backend.must_flush

    def home(self, key: str) -> str:
        """Return the name of the server that a key belongs to."""
        return self._backend.home(key)

    def readmit(self, name: str) -> bool:
        """Read a server again: everything it missed has been repaired there."""
        return self._backend.readmit(name)

    async def flush(self, name: str) -> bool:
        """Empty a server and read it again; return whether it answered."""
        self.copies.forget()
        return await self._backend.flush(name)

    async def close(self) -> None:
        """Close every connection of this event loop; later calls open new ones."""
        self.copies.forget()
        await self._backend.close()
