"""What every cache backend can do, for sessions and for the relay.

`run` carries out a batch of requests, on different keys, in one round trip per server, in no
more than the backend's deadline, and answers each in its place. A server that is left alone or
does not answer makes its requests `UNKNOWN` and fails nothing else.

A server that was left alone, or missed a delete, is *dirty*: it may hold old values, and this
process does not read it until it has deleted there what it missed and a hold is over (see
`node`), or somebody who knows says `readmit`, or `flush`, which empties it for everybody.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Final, NamedTuple, Protocol, runtime_checkable

from shardkit.caching.operations import Answer, Op, Request

__all__ = [
    "DEADLINE",
    "GUTTER_LIFE",
    "Answered",
    "AsyncBackend",
    "Backend",
    "Place",
    "Underway",
    "is_change",
]

DEADLINE: Final = 0.05
"""Seconds after which a call goes on without its cache."""

GUTTER_LIFE: Final = 10.0
"""Longest life of what stands in the gutter, in seconds."""


class Place(Enum):
    """Where a key is looked for.

    `USUAL`: on its server, or in the gutter while that one is left alone. The relay repairs at
    `HOME`, its server even if dirty, and in the `GUTTER`.
    """

    USUAL = "usual"
    HOME = "home"
    GUTTER = "gutter"


def is_change(request: Request) -> bool:
    """Tell whether a server that misses a request may be left with something old."""
    return request.op is not Op.LEASE and request.op is not Op.READ


class Underway(Protocol):
    """Requests that were sent."""

    def answers(self) -> list[Answer]:
        """Return the answers, in the order of the requests; to be called once."""


class Answered(NamedTuple):
    """Requests that were answered at once.

    Attributes:
        found: the answers.
    """

    found: list[Answer]

    def answers(self) -> list[Answer]:
        """Return the answers, in the order of the requests."""
        return self.found


@runtime_checkable
class Backend(Protocol):
    """Cache servers, called from threads. Fork-safe and thread-safe."""

    def run(self, requests: Sequence[Request], *, place: Place = Place.USUAL) -> list[Answer]:
        """Carry out requests on different keys; answer them in their order."""

    def start(self, requests: Sequence[Request]) -> Underway:
        """Send requests on different keys, whose answers are wanted later: by the same thread."""

    @property
    def has_gutter(self) -> bool:
        """Whether there is a gutter to repair, too."""

    @property
    def dirty(self) -> frozenset[str]:
        """Names of the servers that this process does not read for now."""

    @property
    def must_flush(self) -> frozenset[str]:
        """Names of those that only `flush` makes clean.

        They hold the data of an earlier moment, or missed more than was remembered.
        """

    def home(self, key: str) -> str:
        """Return the name of the server that a key belongs to."""

    def readmit(self, name: str) -> bool:
        """Read a server again: everything it missed has been repaired there.

        Returns:
            Whether it is read now; False for one that has to be emptied (`flush`).
        """

    def flush(self, name: str) -> bool:
        """Empty a server and read it again; return whether it answered."""

    def close(self) -> None:
        """Close every connection; later calls open new ones."""


@runtime_checkable
class AsyncBackend(Protocol):
    """The same for asyncio; one object may serve several event loops."""

    async def run(self, requests: Sequence[Request], *, place: Place = Place.USUAL) -> list[Answer]:
        """Carry out requests on different keys; answer them in their order."""

    @property
    def has_gutter(self) -> bool:
        """Whether there is a gutter to repair, too."""

    @property
    def dirty(self) -> frozenset[str]:
        """Names of the servers that this process does not read for now."""

    @property
    def must_flush(self) -> frozenset[str]:
        """Names of those that only `flush` makes clean.

        They hold the data of an earlier moment, or missed more than was remembered.
        """

    def home(self, key: str) -> str:
        """Return the name of the server that a key belongs to."""

    def readmit(self, name: str) -> bool:
        """Read a server again: everything it missed has been repaired there.

        Returns:
            Whether it is read now; False for one that has to be emptied (`flush`).
        """

    async def flush(self, name: str) -> bool:
        """Empty a server and read it again; return whether it answered."""

    async def close(self) -> None:
        """Close every connection of this event loop; later calls open new ones."""
