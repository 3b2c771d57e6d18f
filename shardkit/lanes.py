"""A lane: work on keys that one server needs, in a thread of its own, one round after the other.

Whoever asks waits for a moment only. What was done later is remembered until it is asked for again.
So a server that hangs keeps nobody waiting but those who want something of it. Knows nothing of
caches; `shardkit.cacherepairs` has one for each server.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Final

from shardkit.clock import Clock

__all__ = ["MOST_WAITING", "Lane"]

MOST_WAITING: Final = 20_000
"""Keys that wait, and keys that are remembered as done; beyond, whoever asks has to ask again."""

_ROUND: Final = 500
"""Keys of one round, a few milliseconds' worth."""

_LOG: Final = logging.getLogger("shardkit.relay")


class Lane:
    """Does work on keys at versions. Thread-safe; its thread begins with the first request.

    *Invariant:* a key is remembered as done at a version only after work on it at that version, or
    a later one, has ended well.

    Args:
        work: given keys and versions, returns the keys that are done; what it raises is logged,
            and nothing is done then.
        clock: source of monotonic time.
    """

    def __init__(self, work: Callable[[Mapping[str, int]], set[str]], *, clock: Clock) -> None:
        self._work = work
        self._clock = clock
        self._changed = threading.Condition()
        self._waiting: dict[str, int] = {}
        self._under_way: dict[str, int] = {}
        self._done: dict[str, int] = {}
        self._is_asked = False
        self._is_late = False
        self._is_closed = False
        self._thread: threading.Thread | None = None

    def ask(self, wanted: Mapping[str, int]) -> None:
        """Have work begun on what is neither done nor under way; for no keys, on nothing."""
        with self._changed:
            for key, version in wanted.items():
                if max(self._done.get(key, -1), self._under_way.get(key, -1)) >= version:
                    continue
                if key in self._waiting or len(self._waiting) < MOST_WAITING:
                    self._waiting[key] = max(version, self._waiting.get(key, version))
            self._is_asked = True
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="shardkit repairs", daemon=True
                )
                self._thread.start()
            self._changed.notify_all()

    def owed(self, wanted: Mapping[str, int], until: float) -> set[str]:
        """Return the keys that are not done.

        Args:
            wanted: what was asked for.
            until: monotonic time until which to wait for work that goes on. Nobody waits for work
                for which somebody has waited in vain.
        """
        with self._changed:
            while not self._is_late and any(self._goes_on(each) for each in wanted.items()):
                left = until - self._clock.monotonic()
                if left <= 0:
                    self._is_late = True
                    break
                self._changed.wait(left)
            return {key for key, version in wanted.items() if self._done.get(key, -1) < version}

    def forget(self, wanted: Mapping[str, int]) -> None:
        """Forget what is done: nobody will ask for it again."""
        with self._changed:
            for key, version in wanted.items():
                if self._done.get(key, version + 1) <= version:
                    del self._done[key]

    def close(self) -> None:
        """End its thread after what is under way; what waits is dropped."""
        with self._changed:
            self._is_closed = True
            self._waiting.clear()
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _goes_on(self, wanted: tuple[str, int]) -> bool:
        key, version = wanted
        return key in self._waiting or self._under_way.get(key, -1) >= version

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_asked or self._is_closed)
                if self._is_closed:
                    return
                some = dict(islice(self._waiting.items(), _ROUND))
                for key in some:
                    del self._waiting[key]
                self._is_asked = bool(self._waiting)
                self._under_way = some
            try:
                done = self._work(some)
            except Exception:  # noqa: BLE001 - the lane goes on; who asked is told that it is not done
                _LOG.exception("repairs of a cache server fail")
                done = set()
            with self._changed:
                self._under_way = {}
                self._is_late = False
                if len(self._done) + len(done) > MOST_WAITING:
                    self._done.clear()
                for key in done:
                    self._done[key] = max(some[key], self._done.get(key, -1))
                self._changed.notify_all()
