"""Which server is asked, and which is left alone: breakers, dirty servers, the gutter.

Shared by all backends with servers; opens nothing. A call is planned into batches, one for each
server, each of which holds that breaker's leave; then every batch is told how it ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol

from shardkit.caches.backend import GUTTER_LIFE, Place, is_change
from shardkit.caches.node import RETURN_HOLD, Batch, Node
from shardkit.caches.ring import Ring
from shardkit.caching.operations import UNKNOWN, Answer, Op, Outcome, Request
from shardkit.clock import SYSTEM, Clock
from shardkit.errors import BreakerOpenError
from shardkit.windows import BreakerRules

__all__ = ["CACHE_RULES", "Nodes", "Owners"]

CACHE_RULES: Final = BreakerRules(slow_after=0.04, open_time=0.5, longest_open=1.0, probe_time=1.0)
"""A cache is left alone sooner than a database, and tried again sooner: nobody needs it."""

_NOBODYS: Final = Request(Op.READ, "shardkit:nobody")
"""Asked of a dirty server, to hear whether it answers."""


class Owners(Protocol):
    """Says which server a key belongs to, as its place among the servers."""

    def owner(self, key: str) -> int:
        """Return the place."""


class Nodes:
    """The servers of one cache and their gutter.

    Args:
        names: the servers, as `host:port`; a list that all processes share and nobody shortens.
        gutter: servers that stand in for those that are left alone; may be empty.
        owners: which key belongs to which; None for consistent hashing. With owners given,
            servers may be added to `homes` later.
        rules: of the breakers.
        clock: source of time.
        hold: seconds that a server answers again before it is read; see `node`.
        on_dirty: called with the name of a server that has become dirty.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        gutter: Sequence[str] = (),
        owners: Owners | None = None,
        rules: BreakerRules = CACHE_RULES,
        clock: Clock = SYSTEM,
        hold: float = RETURN_HOLD,
        on_dirty: Callable[[str], None] | None = None,
    ) -> None:
        self._rules, self._clock, self._hold = rules, clock, hold
        self.homes = [self.made(name) for name in names]
        self.gutter = [Node(name, rules=rules, clock=clock, is_gutter=True) for name in gutter]
        self._owners: Owners = Ring(names) if owners is None else owners
        self._gutter_ring = Ring(gutter)
        self._now = clock.monotonic
        self._on_dirty = on_dirty
        self._single = self.homes[0] if len(self.homes) == 1 and owners is None else None

    def made(self, name: str) -> Node:
        """Return a new server that is nobody's home yet."""
        return Node(name, rules=self._rules, clock=self._clock, hold=self._hold)

    @property
    def dirty(self) -> frozenset[str]:
        """Names of the servers that nobody reads for now."""
        return frozenset(node.name for node in self.homes if node.is_dirty)

    @property
    def must_flush(self) -> frozenset[str]:
        """Names of the servers that have to be emptied before anybody reads them."""
        return frozenset(node.name for node in self.homes if node.must_flush)

    def home(self, key: str) -> Node:
        """Return the server that a key belongs to."""
        return self._single or self.homes[self._owners.owner(key)]

    def stand_in(self, key: str) -> Node:
        """Return the server of the gutter that a key belongs to; there has to be one."""
        return self.gutter[self._gutter_ring.owner(key)]

    def named(self, name: str) -> Node:
        """Return a server; KeyError when there is none of that name."""
        return {node.name: node for node in (*self.gutter, *self.homes)}[name]

    def missed(self, node: Node, key: str) -> None:
        """Note that a server missed a change of an entry."""
        if not node.is_gutter and node.has_missed(key):  # a gutter forgets in seconds
            self._tell(node)

    def came_back(self, node: Node) -> None:
        """Note that a server holds the data of an earlier moment."""
        if not node.is_gutter and not node.must_flush:
            node.must_flush = True
            if node.left_alone():
                self._tell(node)

    def readmit(self, name: str) -> bool:
        """Read a server again, unless it has to be emptied first; return whether it is read."""
        return self.named(name).readmitted()

    def flushed(self, name: str) -> None:
        """Read a server again that was emptied."""
        self.named(name).flushed()

    def plan(
        self, requests: Sequence[Request], place: Place = Place.USUAL
    ) -> tuple[list[Batch], list[Answer]]:
        """Return what goes where, and the answers so far: `UNKNOWN` for all.

        There may be one answer too many, the last: what a dirty server says is for nobody.
        """
        if len(requests) == 1 and place is Place.USUAL:
            key = requests[0].key
            node = self._single or self.homes[self._owners.owner(key)]
            if not node.is_dirty and node.breaker.is_closed:  # as nearly always: nothing to decide
                return [Batch(node, None, self._now(), [0], list(requests))], [UNKNOWN]
        batches: dict[Node, Batch | None] = {}
        sweeps: list[Batch] = []
        single = self._single if place is not Place.GUTTER else None
        for index, request in enumerate(requests):
            key = request.key
            if place is not Place.GUTTER:
                node = single or self.homes[self._owners.owner(key)]
                if node in batches:
                    batch = batches[node]
                else:
                    batch = batches[node] = self._admitted(node, place, sweeps, len(requests))
                if batch is not None:
                    batch.at.append(index)
                    batch.requests.append(request)
                    continue
                if is_change(request):
                    self.missed(node, key)
                if place is Place.HOME:
                    continue
            if not self.gutter:
                continue
            node = self.stand_in(key)
            if node in batches:
                batch = batches[node]
            else:
                batch = batches[node] = self._admit(node)
            if batch is not None:
                batch.at.append(index)
                shorter = request.ttl > GUTTER_LIFE
                batch.requests.append(request._replace(ttl=GUTTER_LIFE) if shorter else request)
        spare = [UNKNOWN] * (len(requests) + 1)
        return [*sweeps, *(batch for batch in batches.values() if batch)], spare

    def planned_at(self, node: Node, requests: Sequence[Request]) -> list[Batch]:
        """Return what goes to one server, of which another said that it has the keys."""
        batch = None if node.is_dirty else self._admit(node)
        if batch is None:
            for request in requests:
                if is_change(request):
                    self.missed(node, request.key)
            return []
        batch.at.extend(range(len(requests)))
        batch.requests.extend(requests)
        return [batch]

    def _admit(self, node: Node) -> Batch | None:
        try:
            return Batch(node, node.breaker.admit(), self._now(), [], [])
        except BreakerOpenError:
            return None

    def _admitted(self, node: Node, place: Place, sweeps: list[Batch], spare: int) -> Batch | None:
        """Return the batch for a home, or None when it is not to be used.

        A dirty one is given a batch of its own, once: what it missed is deleted there.
        """
        if not node.breaker.is_closed and node.left_alone():
            self._tell(node)
        if node.is_dirty:
            now = self._now()
            keys = node.to_sweep(now, at_once=place is Place.HOME)
            if keys is not None:
                try:
                    probe = node.breaker.admit()
                except BreakerOpenError:
                    node.unswept(keys)
                    return None
                deletes = [Request(Op.DELETE, key) for key in keys]
                sweep = Batch(node, probe, now, [], [_NOBODYS, *deletes])
                sweep.swept = keys
                sweep.at.extend([spare] * len(sweep.requests))
                if place is Place.HOME:
                    return sweep
                sweeps.append(sweep)
            if place is not Place.HOME:
                return None
        return self._admit(node)

    def _tell(self, node: Node) -> None:
        if self._on_dirty is not None:
            self._on_dirty(node.name)

    def succeeded(self, batch: Batch, answers: Sequence[Answer]) -> None:
        """Note that a server answered."""
        now = self._now()
        batch.node.breaker.succeeded(now - batch.began, batch.probe)
        if batch.swept is not None:
            said = zip(batch.swept, answers[1:], strict=False)
            batch.node.swept(now)
            for key in [key for key, answer in said if answer.outcome is not Outcome.DONE]:
                self.missed(self.home(key), key)  # of a cluster it may be another's by now

    def failed(self, batch: Batch, error: BaseException) -> None:
        """Note that a server did not answer."""
        batch.node.breaker.failed(error, self._now() - batch.began, batch.probe)
        self._unheard(batch)

    def abandoned(self, batch: Batch) -> None:
        """Note that nobody waits for its answer any more."""
        batch.node.breaker.abandoned(batch.probe)
        self._unheard(batch)

    def _unheard(self, batch: Batch) -> None:
        if batch.swept is not None:
            batch.node.unswept(batch.swept)
        for request in batch.requests:
            if request.op is Op.DELETE:  # a machine's last word: nothing comes after it
                self.missed(batch.node, request.key)
