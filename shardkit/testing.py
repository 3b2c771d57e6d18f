"""Helpers for tests of programs that use shardkit.

`wait_until` waits for a fact instead of for a time, so that a test is as quick as the system and
fails with a sentence. Never used by the library itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from shardkit.clock import SYSTEM, Clock

__all__ = ["wait_until"]

_POLL = 0.02


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
