"""One cache server as a process knows it: its breaker, what it missed, and when it is read again.

A server that does not answer keeps what it holds, and comes back with it. What this process
wrote meanwhile it knows itself (`missed`), and deletes there before it reads there again. What
others wrote it does not know: so a server that was left alone is also not read for
`RETURN_HOLD` after its first answer, in which time the relays, which know every change, delete
what the server missed from anybody. One that has been emptied since needs no hold.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable
from itertools import islice
from typing import Final

from shardkit.breaker import Breaker, Probe
from shardkit.caching.operations import Request
from shardkit.clock import Clock
from shardkit.forks import ForkSafeLock
from shardkit.windows import BreakerRules

__all__ = ["MOST_MISSED", "RETURN_HOLD", "SWEEP", "Batch", "Node"]

RETURN_HOLD: Final = 2.0
"""Seconds that a server which was left alone answers before it is read: much longer than a relay
leaves it alone (`serving.RELAY_OPTIONS`), for the relay has to have been there before."""

MOST_MISSED: Final = 100_000
"""Keys that a server may have missed; beyond, it has to be emptied."""

SWEEP: Final = 1000
"""Keys that are deleted in one round trip, a few milliseconds' worth."""


class Node:
    """One server.

    Attributes:
        name: `host:port`.
        breaker: told how its calls end.
        is_dirty: whether nobody reads it for now.
        must_flush: whether it holds something old that no repair finds: the data of an earlier
            moment, or more misses than were remembered.
        is_gutter: whether it stands in for others, for a short time.
        term: grows whenever it may hold other data than before; connections ask again then.
    """

    __slots__ = (
        "_guard", "_held_until", "_hold", "_is_sweeping", "_life", "_missed", "_was_emptied",
        "breaker", "is_dirty", "is_gutter", "must_flush", "name", "term",
    )  # fmt: skip

    def __init__(
        self,
        name: str,
        *,
        rules: BreakerRules,
        clock: Clock,
        is_gutter: bool = False,
        hold: float = RETURN_HOLD,
    ) -> None:
        self.name = name
        self.breaker = Breaker(f"cache@{name}", rules=rules, clock=clock)
        self.is_dirty = False
        self.must_flush = False
        self.is_gutter = is_gutter
        self.term = 0
        self._guard = ForkSafeLock()
        self._hold = hold
        self._held_until: float | None = 0.0  # None: until its first answer, and the hold
        self._life: Hashable = None
        self._missed: set[str] = set()
        self._was_emptied = False
        self._is_sweeping = False

    @property
    def n_missed(self) -> int:
        """How many keys this process will delete there."""
        return len(self._missed)

    def left_alone(self) -> bool:
        """Note that its breaker is open; return whether it has become dirty by that."""
        with self._guard.lock:
            became = not self.is_dirty
            self.is_dirty = True
            self._held_until = None
            return became

    def has_missed(self, key: str) -> bool:
        """Note that it missed a change of an entry; return whether it has become dirty by that."""
        with self._guard.lock:
            became = not self.is_dirty
            self.is_dirty = True
            if len(self._missed) < MOST_MISSED:
                self._missed.add(key)
            else:
                self.must_flush = True
            return became

    def met(self, life: Hashable) -> None:
        """Note which life of the server a new connection found: another one began empty."""
        with self._guard.lock:
            if self._life not in {None, life}:
                self._was_emptied = True
            self._life = life

    def to_sweep(self, now: float, *, at_once: bool) -> list[str] | None:
        """Return keys to delete there now, perhaps none, or None to leave it in peace.

        Exactly one caller at a time is given a list, and says `swept` or `unswept` to it.

        Args:
            now: monotonic time.
            at_once: whether to delete before the hold is over: by who does not read, as relays.
        """
        with self._guard.lock:
            if self._is_sweeping or self.must_flush:
                return None
            waits = self._is_held(now) and self._held_until is not None
            if waits and not at_once and self.breaker.is_closed:
                return None
            self._is_sweeping = True
            keys = list(islice(self._missed, SWEEP))
            self._missed.difference_update(keys)
            return keys

    def swept(self, now: float) -> None:
        """Note that the server answered."""
        with self._guard.lock:
            self._is_sweeping = False
            if self._held_until is None:
                self._held_until = now + self._hold
            is_good = self.breaker.is_closed and not self.must_flush
            if is_good and not self._missed and not self._is_held(now):
                self._clean()

    def unswept(self, keys: Collection[str]) -> None:
        """Note that the server did not answer."""
        with self._guard.lock:
            self._is_sweeping = False
            self._missed.update(keys)

    def readmitted(self) -> bool:
        """Note that everything it missed has been repaired; return whether it is read now."""
        with self._guard.lock:
            if not self.must_flush:
                self._clean()
            return not self.is_dirty

    def forgotten(self) -> frozenset[str]:
        """Note that it has no keys any more; return what it missed."""
        with self._guard.lock:
            missed = frozenset(self._missed)
            self.must_flush = False
            self._clean()
            return missed

    def flushed(self) -> None:
        """Note that it has been emptied."""
        with self._guard.lock:
            self.must_flush = False
            self._clean()
            self._was_emptied = not self.breaker.is_closed  # nor held when that closes

    def _is_held(self, now: float) -> bool:
        return not self._was_emptied and (self._held_until is None or now < self._held_until)

    def _clean(self) -> None:
        self.is_dirty = self._was_emptied = False
        self._held_until = 0.0
        self._missed.clear()


class Batch:
    """The requests of one call that go to one server.

    Attributes:
        node: the server.
        at: place of each in the call.
        requests: the requests.
        probe: the breaker's leave.
        began: monotonic time.
        swept: keys that the first requests delete; None when the server is not dirty.
    """

    __slots__ = ("at", "began", "node", "probe", "requests", "swept")

    def __init__(
        self,
        node: Node,
        probe: Probe | None,
        began: float,
        at: list[int],
        requests: list[Request],
    ) -> None:
        self.node = node
        self.probe = probe
        self.began = began
        self.at = at
        self.requests = requests
        self.swept: list[str] | None = None
