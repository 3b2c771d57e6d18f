"""A lock that a forked child finds free.

A child has one thread. A lock that another thread of the parent held when it forked would stay
held in the child for ever.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable

__all__ = ["ForkSafeLock"]


class ForkSafeLock:
    """A reentrant lock, made anew in each forked child.

    Args:
        on_fork: run in the child after that, by the only thread there is. A bound method, held
            weakly.

    Attributes:
        lock: the present one; not to be kept. `with guard.lock:` takes and frees the same one.
    """

    __slots__ = ("__weakref__", "_on_fork", "lock")

    def __init__(self, on_fork: Callable[[], None] | None = None) -> None:
        self.lock = threading.RLock()
        self._on_fork = None if on_fork is None else weakref.WeakMethod(on_fork)
        _LOCKS.add(self)

    def renew(self) -> None:
        """Forget who holds it."""
        self.lock = threading.RLock()
        on_fork = None if self._on_fork is None else self._on_fork()
        if on_fork is not None:
            on_fork()


_LOCKS: weakref.WeakSet[ForkSafeLock] = weakref.WeakSet()


def _renew_all() -> None:
    for lock in list(_LOCKS):
        lock.renew()


os.register_at_fork(after_in_child=_renew_all)
