"""Helpers for tests of programs that use shardkit.

`wait_until` waits for a fact instead of for a time, so that a test is as quick as the system and
fails with a sentence. `FakeClock` is a clock that moves when told. Never used by the library
itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from shardkit.clock import SYSTEM, Clock

__all__ = ["FakeClock", "wait_until"]

_POLL = 0.02


class FakeClock:
    """A clock that stands still until a test moves it.

    Wall and monotonic time move together with `advance`; `set_unix_ms` steps the wall alone, as
    an operator or a time server does.
    """

    def __init__(self, *, unix_ms: int = 1_800_000_000_000) -> None:
        self._unix_ms = unix_ms
        self._monotonic = 0.0

    def unix_ms(self) -> int:
        """Return wall time in milliseconds since 1970-01-01 UTC."""
        return self._unix_ms

    def monotonic(self) -> float:
        """Return seconds from an arbitrary origin."""
        return self._monotonic

    def advance(self, seconds: float) -> None:
        """Let time pass.

        Raises:
            ValueError: seconds is negative; only the wall clock can step back.
        """
        if seconds < 0:
            raise ValueError(f"advance({seconds}): time passes forwards; see set_unix_ms")
        self._monotonic += seconds
        self._unix_ms += round(seconds * 1000)

    def set_unix_ms(self, unix_ms: int) -> None:
        """Step the wall clock, in either direction."""
        self._unix_ms = unix_ms


def wait_until(
    predicate: Callable[[], bool], timeout: float, what: str, *, clock: Clock = SYSTEM
) -> None:
    """Wait until a fact holds.

    Args:
        predicate: asked again and again; True ends the wait.
        timeout: seconds to wait at most.
        what: the fact in words, for the failure.
        clock: where the time comes from.

    Raises:
        AssertionError: the fact did not come true in time.
    """
    pause = threading.Event()
    deadline = clock.monotonic() + timeout
    while not predicate():
        if clock.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:g} seconds: {what}")
        pause.wait(_POLL)
