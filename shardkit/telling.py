"""Tells pybreaker's listeners what happened, in order and with no lock held.

A breaker notes under its lock what there is to tell, and says it after the lock is free. One
thread tells at a time; whatever happens meanwhile, in other threads or in a listener, it tells
next.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from typing import Any, Final

from pybreaker import CircuitBreaker, CircuitBreakerListener

from shardkit.forks import ForkSafeLock

__all__ = ["Teller"]

_LOG: Final = logging.getLogger(__name__)


class Teller:
    """The listeners of one breaker, and what they have not heard yet. Thread-safe.

    Args:
        breaker: what listeners get as their first argument.
        lock: the breaker's.

    Attributes:
        listeners: those who are told, in the order in which they were added.
        hears_successes: whether one of them has a `success` of its own.
    """

    def __init__(self, breaker: CircuitBreaker, lock: ForkSafeLock) -> None:
        self._breaker = breaker
        self._guard = lock
        self.listeners: tuple[CircuitBreakerListener, ...] = ()
        self.hears_successes = False
        self._noted: deque[tuple[str, tuple[Any, ...]]] = deque()
        self._telling_in: int | None = None

    def add(self, listener: CircuitBreakerListener) -> None:
        """Tell a listener from now on."""
        with self._guard.lock:
            self._replace((*self.listeners, listener))

    def remove(self, listener: CircuitBreakerListener) -> None:
        """Tell a listener no longer; ValueError if it was not told before."""
        with self._guard.lock:
            left = list(self.listeners)
            left.remove(listener)
            self._replace(tuple(left))

    def note(self, callback: str, *arguments: Any) -> None:
        """Note what is to be told: the name of pybreaker's callback and what follows `cb`."""
        if self.listeners:
            self._noted.append((callback, arguments))

    def tell(self) -> None:
        """Tell what was noted, or leave it to the thread that is already telling."""
        process = os.getpid()  # a forked child waits for no thread of its parent
        while self._noted:
            with self._guard.lock:
                if self._telling_in == process:
                    return
                self._telling_in = process
            try:
                while self._noted:
                    callback, arguments = self._noted.popleft()
                    for listener in self.listeners:
                        self._tell(listener, callback, arguments)
            finally:
                self._telling_in = None

    def _tell(
        self, listener: CircuitBreakerListener, callback: str, arguments: tuple[Any, ...]
    ) -> None:
        try:
            getattr(listener, callback)(self._breaker, *arguments)
        except Exception:  # noqa: BLE001 - a call never fails for those who watch it
            _LOG.exception("a listener failed on %s of %s", callback, self._breaker.name)

    def _replace(self, listeners: tuple[CircuitBreakerListener, ...]) -> None:
        self.listeners = listeners
        self.hears_successes = any(
            getattr(type(each), "success", None) is not CircuitBreakerListener.success
            for each in listeners
        )
