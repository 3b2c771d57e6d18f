"""What a session has written lately, so that no cache shows it anything older.

One per session. After two faults at once the cache may hold an older value until the relay has
run; the session that wrote must not notice.
"""

from __future__ import annotations

import math
import sys
from collections import OrderedDict
from typing import Final

from shardkit.clock import SYSTEM, Clock

__all__ = ["FLOOR_LIFE", "MOST_FLOORS", "SessionFloor"]

FLOOR_LIFE: Final = 60.0
"""Seconds a floor is remembered; the relay is done long before."""

MOST_FLOORS: Final = 10_000
"""Keys a session remembers."""


class SessionFloor:
    """The least version of each key that a session may be shown.

    Args:
        clock: source of time.
        most: keys that are remembered. Of a session that writes more, every read goes to the
            database until what was forgotten would have expired.
        life: seconds each is remembered.
    """

    __slots__ = ("_clock", "_life", "_most", "_none_before", "_versions")

    def __init__(
        self, *, clock: Clock = SYSTEM, most: int = MOST_FLOORS, life: float = FLOOR_LIFE
    ) -> None:
        self._clock = clock
        self._most = most
        self._life = life
        self._versions: OrderedDict[str, tuple[int, float]] = OrderedDict()
        self._none_before = -math.inf

    def __len__(self) -> int:
        return len(self._versions)

    def raise_to(self, key: str, version: int) -> None:
        """Remember that the session wrote a version."""
        now = self._clock.monotonic()
        versions = self._versions
        version = max(version, versions.pop(key, (0, 0.0))[0])
        versions[key] = (version, now + self._life)
        while versions and (len(versions) > self._most or next(iter(versions.values()))[1] <= now):
            _, (_, expires) = versions.popitem(last=False)
            if expires > now:
                self._none_before = max(self._none_before, expires)

    def of(self, key: str) -> int:
        """Return the least version of a key that may be shown; 0 for any."""
        if not self._versions:
            return 0
        now = self._clock.monotonic()
        if now < self._none_before:
            return sys.maxsize
        version, expires = self._versions.get(key, (0, 0.0))
        return version if now < expires else 0
