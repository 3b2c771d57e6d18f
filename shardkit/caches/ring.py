"""Which server a key belongs to: consistent hashing over a list that does not change.

A server that dies keeps its keys. Handing them to others and back would bring old values to
life; see `shardkit.caches.nodes` for what is done instead.
"""

from __future__ import annotations

import hashlib
from bisect import bisect
from collections.abc import Sequence
from typing import Final
from zlib import crc32

__all__ = ["Ring"]

_POINTS: Final = 160
"""Points of each server; shares of the keys then differ by some 8 %.

Source: Karger et al., "Consistent hashing and random trees" (1997); 160 as in libketama.
"""

_MIX: Final = 0x9E3779B97F4A7C15
_MASK: Final = (1 << 64) - 1


class Ring:
    """A fixed set of servers on a circle. Adding one moves only the keys that it takes over."""

    __slots__ = ("_only", "_owners", "_points")

    def __init__(self, names: Sequence[str]) -> None:
        points = sorted(
            (_place(f"{name}-{n}"), index)
            for index, name in enumerate(names)
            for n in range(_POINTS)
        )
        self._points = [point for point, _ in points]
        self._owners = [index for _, index in points]
        self._only = len(names) == 1

    def owner(self, key: str) -> int:
        """Return which server a key belongs to, as its place in the list."""
        if self._only:
            return 0
        # CRC-32 alone is linear: keys that differ in a digit would stay neighbours.
        mixed = (crc32(key.encode()) * _MIX) & _MASK
        at = bisect(self._points, mixed >> 32)
        return self._owners[at if at < len(self._points) else 0]


def _place(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")
