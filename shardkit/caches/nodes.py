"""Which server is asked, and which is left alone: breakers, dirty servers, the gutter.

Shared by all backends with servers; opens nothing. A call is planned into batches, one for each
server, each of which holds that breaker's leave; then every batch is told how it ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from shardkit.breaker import Breaker, Probe
from shardkit.caches.backend import GUTTER_LIFE, Place, is_write
from shardkit.caches.ring import Ring
from shardkit.caching.operations import UNKNOWN, Answer, Request
from shardkit.clock import SYSTEM, Clock
from shardkit.errors import BreakerOpenError
from shardkit.windows import BreakerRules

__all__ = ["CACHE_RULES", "Batch", "Node", "Nodes"]

CACHE_RULES: Final = BreakerRules(slow_after=0.04, open_time=0.5, longest_open=10.0, probe_time=1.0)
"""A cache is left alone sooner than a database, and tried again sooner: nobody needs it."""


class Node:
    """One server.

    Attributes:
        name: `host:port`.
        breaker: told how its calls end.
        is_dirty: whether it missed a write while it was left alone.
        must_flush: whether it holds the data of an earlier moment, which no repair finds.
        is_gutter: whether it stands in for others, for a short time.
    """

    __slots__ = ("breaker", "is_dirty", "is_gutter", "must_flush", "name")

    def __init__(
        self, name: str, *, rules: BreakerRules, clock: Clock, is_gutter: bool = False
    ) -> None:
        self.name = name
        self.breaker = Breaker(f"cache@{name}", rules=rules, clock=clock)
        self.is_dirty = False
        self.must_flush = False
        self.is_gutter = is_gutter


class Batch:
    """The requests of one call that go to one server.

    Attributes:
        node: the server.
        at: place of each in the call.
        requests: the requests.
        probe: the breaker's leave.
        began: monotonic time.
    """

    __slots__ = ("at", "began", "node", "probe", "requests")

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


class Nodes:
    """The servers of one cache and their gutter.

    Args:
        names: the servers, as `host:port`; a list that all processes share and nobody shortens.
        gutter: servers that stand in for those that are left alone; may be empty.
        rules: of the breakers.
        clock: source of time.
        on_dirty: called with the name of a server that has become dirty.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        gutter: Sequence[str] = (),
        rules: BreakerRules = CACHE_RULES,
        clock: Clock = SYSTEM,
        on_dirty: Callable[[str], None] | None = None,
    ) -> None:
        self.homes = [Node(name, rules=rules, clock=clock) for name in names]
        self.gutter = [Node(name, rules=rules, clock=clock, is_gutter=True) for name in gutter]
        self._home_ring = Ring(names)
        self._gutter_ring = Ring(gutter)
        self._now = clock.monotonic
        self._on_dirty = on_dirty
        self._single = self.homes[0] if len(self.homes) == 1 else None

    @property
    def dirty(self) -> frozenset[str]:
        """Names of the servers that nobody reads for now."""
        return frozenset(node.name for node in self.homes if node.is_dirty)

    def home(self, key: str) -> Node:
        """Return the server that a key belongs to."""
        return self._single or self.homes[self._home_ring.owner(key)]

    def named(self, name: str) -> Node:
        """Return a server; KeyError when there is none of that name."""
        return {node.name: node for node in (*self.gutter, *self.homes)}[name]

    def soil(self, node: Node) -> None:
        """Note that a server missed something."""
        if not node.is_dirty:
            node.is_dirty = True
            if self._on_dirty is not None:
                self._on_dirty(node.name)

    def readmit(self, name: str) -> bool:
        """Read a server again, unless it has to be emptied first; return whether it is read."""
        node = self.named(name)
        if not node.must_flush:
            node.is_dirty = False
        return not node.is_dirty

    def flushed(self, name: str) -> None:
        """Read a server again that was emptied."""
        node = self.named(name)
        node.is_dirty = node.must_flush = False

    def plan(
        self, requests: Sequence[Request], place: Place = Place.USUAL
    ) -> tuple[list[Batch], list[Answer]]:
        """Return what goes where, and the answers so far: `UNKNOWN` for all."""
        if len(requests) == 1 and place is Place.USUAL:
            key = requests[0].key
            node = self._single or self.homes[self._home_ring.owner(key)]
            if not node.is_dirty and node.breaker.is_closed:  # as nearly always: nothing to decide
                return [Batch(node, None, self._now(), [0], list(requests))], [UNKNOWN]
        batches: dict[Node, Batch | None] = {}
        single = self._single if place is not Place.GUTTER else None
        for index, request in enumerate(requests):
            key = request.key
            if place is not Place.GUTTER:
                node = single or self.homes[self._home_ring.owner(key)]
                batch = batches[node] if node in batches else self._admit(batches, node, place)
                if batch is not None:
                    batch.at.append(index)
                    batch.requests.append(request)
                    continue
                if is_write(request):
                    self.soil(node)
                if place is Place.HOME:
                    continue
            if not self.gutter:
                continue
            node = self.gutter[self._gutter_ring.owner(key)]
            batch = batches[node] if node in batches else self._admit(batches, node, place)
            if batch is not None:
                batch.at.append(index)
                shorter = request.ttl > GUTTER_LIFE
                batch.requests.append(request._replace(ttl=GUTTER_LIFE) if shorter else request)
        return [batch for batch in batches.values() if batch], [UNKNOWN] * len(requests)

    def _admit(self, batches: dict[Node, Batch | None], node: Node, place: Place) -> Batch | None:
        batch = None
        if not node.is_dirty or place is Place.HOME:
            try:
                batch = Batch(node, node.breaker.admit(), self._now(), [], [])
            except BreakerOpenError:
                batch = None
        batches[node] = batch
        return batch

    def succeeded(self, batch: Batch) -> None:
        """Note that a server answered."""
        batch.node.breaker.succeeded(self._now() - batch.began, batch.probe)

    def failed(self, batch: Batch, error: BaseException) -> None:
        """Note that a server did not answer."""
        batch.node.breaker.failed(error, self._now() - batch.began, batch.probe)

    def abandoned(self, batch: Batch) -> None:
        """Note that nobody waits for its answer any more."""
        batch.node.breaker.abandoned(batch.probe)
