"""Wall and monotonic time as a value that is passed in.

Every part that needs the time takes a `Clock`; tests pass a fake from `shardkit.testing`.
No other module reads a clock.
"""

from __future__ import annotations

import time
from typing import Protocol

__all__ = ["SYSTEM", "Clock", "SystemClock"]


class Clock(Protocol):
    """A source of time."""

    def unix_ms(self) -> int:
        """Return wall time in milliseconds since 1970-01-01 UTC; may step backwards."""

    def monotonic(self) -> float:
        """Return seconds from an arbitrary origin; never steps backwards."""

    def sleep(self, seconds: float) -> None:
        """Wait in this thread."""


class SystemClock:
    """The clock of the operating system."""

    def unix_ms(self) -> int:
        """Return wall time in milliseconds since 1970-01-01 UTC."""
        return time.time_ns() // 1_000_000

    # Itself, not a method around it: breakers read it on the way of every call.
    monotonic = staticmethod(time.monotonic)

    def sleep(self, seconds: float) -> None:
        """Wait in this thread."""
        time.sleep(seconds)


SYSTEM: Clock = SystemClock()
