"""Which transaction must be before which: the serialization graph of appends.

    ww   the second wrote the next version of a list
    wr   the second read what the first wrote
    rw   the first read a version, and the second wrote the next one
    process, realtime   the first was known to be done before the second began

Levels are mixed as Adya does: an rw edge binds only readers who were promised a snapshot, ww and
wr edges bind everybody. Real time binds transactions on primaries only. Whatever a transaction of
unknown outcome wrote counts if somebody read it, and nothing comes after it in real time.

Real time has as many pairs as there are transactions squared. Between them stand barriers instead,
in a chain: a transaction that is done leads to the barrier of its time, and a barrier to all that
begin after it and before the next, so edges are as many as transactions.

Source: Adya, "Weak Consistency", MIT 1999, 3.1 and 5.5 (mixed levels); Kingsbury & Alvaro, VLDB
2020, 5.1 (session and real-time edges).
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

from tests.history.appends import FAIL, FOREVER, OK, REPLICA, SNAPSHOT, Appends, Key

__all__ = ["Edge", "Graph", "Kind"]


class Kind(IntEnum):
    """Why one transaction is before another."""

    WW = 0
    WR = 1
    RW = 2
    PROCESS = 3
    REALTIME = 4


class Edge(NamedTuple):
    """One transaction before another.

    Attributes:
        kind: why.
        target: the later one.
        key: the list, for ww, wr and rw.
        length: of the version that is read or was there before.
    """

    kind: Kind
    target: int
    key: Key | None = None
    length: int = 0


class Graph:
    """The edges between the transactions of a history.

    Args:
        appends: the transactions.
        has_one_clock: whether times of different processes can be compared; else the order
            within each process is used instead.

    Attributes:
        counted: whether each transaction is known to have committed.
        n_edges: how many of each kind; barriers count as one edge each.
        n_nodes: transactions, then barriers.
    """

    def __init__(self, appends: Appends, *, has_one_clock: bool) -> None:
        self.appends = appends
        self.has_one_clock = has_one_clock
        self.counted = bytearray(flags & OK for flags in appends.flags)
        for key in appends.keys.values():
            for value in key.order:
                t = key.writers.get(value)
                if t is not None and not appends.flags[t] & FAIL:
                    self.counted[t] = 1
        self.n_edges = dict.fromkeys(Kind, 0)
        self.n_nodes = len(appends)
        # One object for each number: lists of neighbours share them.
        self._numbers = list(range(len(appends)))

    def neighbours(self) -> list[list[int] | None]:
        """Return what each node leads to."""
        n, numbers = len(self.appends), self._numbers
        out: list[list[int] | None] = [None] * n
        counts = [0] * len(Kind)
        for key in self.appends.keys.values():
            for source, kind, target, _ in self.edges_of(key):
                counts[kind] += 1
                after = out[source]
                if after is None:
                    out[source] = [numbers[target]]
                else:
                    after.append(numbers[target])
        time = Kind.REALTIME if self.has_one_clock else Kind.PROCESS
        for source, target in self.timed() if self.has_one_clock else self.in_process():
            counts[time] += 1
            while max(source, target) >= len(out):
                out.append(None)
            after = out[source]
            if after is None:
                out[source] = [target]
            else:
                after.append(target)
        self.n_nodes = len(out)
        self.n_edges = dict(zip(Kind, counts, strict=True))
        return out

    def edges_of(self, key: Key) -> Iterator[tuple[int, Kind, int, int]]:
        """Yield source, kind, target and length of version of the edges that a list makes."""
        flags, counted = self.appends.flags, self.counted
        writers = [key.writers.get(value, -1) for value in key.order]
        writers = [w if w >= 0 and counted[w] else -1 for w in writers]
        if key.odd:  # there is one order only as far as all agree
            writers = writers[: key.agreed()]
        n = len(writers)
        before = -1
        for i, writer in enumerate(writers):
            if writer >= 0 <= before != writer:
                yield before, Kind.WW, writer, i
            before = writer
        last = [] if key.odd else self._unseen(key)
        if last and before >= 0 and last[0] != before:
            yield before, Kind.WW, last[0], n
        for reader, length in zip(key.readers, key.lengths, strict=True):
            if length > n:
                continue
            if length:
                writer = writers[length - 1]
                if writer >= 0 and writer != reader:
                    yield writer, Kind.WR, reader, length
            if flags[reader] & SNAPSHOT:
                after = writers[length] if length < n else (last[0] if last else -1)
                # Whoever read half of a transaction (G1b) is not before the other half of it.
                if after >= 0 and after != reader and not (length and after == writers[length - 1]):
                    yield reader, Kind.RW, after, length

    def _unseen(self, key: Key) -> list[int]:
        """Return who wrote the version after the last one that was read, if that is certain."""
        if len(key.writers) == len(key.order):
            return []
        seen = set(key.order)
        flags = self.appends.flags
        unseen = [t for value, t in key.writers.items() if value not in seen]
        return unseen if len(unseen) == 1 and flags[unseen[0]] & OK else []

    def timed(self) -> Iterator[tuple[int, int]]:
        """Yield the edges of real time, over barriers."""
        appends, counted = self.appends, self.counted
        invoked, answered, flags = appends.invoked, appends.answered, appends.flags
        bound = [t for t in self._numbers if counted[t] and not flags[t] & REPLICA]
        done = [t for t in bound if answered[t] != FOREVER]
        bound.sort(key=invoked.__getitem__)
        done.sort(key=answered.__getitem__)
        barrier, is_used, at, n_done = -1, True, 0, len(done)
        n_nodes = len(appends)
        for t in bound:
            began = invoked[t]
            while at < n_done and answered[done[at]] < began:
                if is_used:
                    if barrier >= 0:
                        yield barrier, n_nodes
                    barrier, is_used = n_nodes, False
                    n_nodes += 1
                yield done[at], barrier
                at += 1
            if barrier >= 0:
                is_used = True
                yield barrier, t

    def in_process(self) -> Iterator[tuple[int, int]]:
        """Yield the edges between what one process did, one after the other."""
        appends, before = self.appends, dict[int, int]()
        for t in self._numbers:
            if self.counted[t] and not appends.flags[t] & REPLICA:
                process = appends.process_of(t)
                last = before.get(process)
                if last is not None and appends.answered[last] <= appends.invoked[t]:
                    yield last, t
                if appends.answered[t] != FOREVER:
                    before[process] = t

    def within(self, nodes: set[int]) -> dict[int, list[Edge]]:
        """Return all edges between some nodes, with what they are about."""
        out: dict[int, list[Edge]] = {node: [] for node in nodes}
        for key in self.appends.keys.values():
            if any(w in nodes for w in key.writers.values()):
                for source, kind, target, length in self.edges_of(key):
                    if source in nodes and target in nodes:
                        out[source].append(Edge(kind, target, key, length))
        for source, target in self.in_process():
            if source in nodes and target in nodes:
                out[source].append(Edge(Kind.PROCESS, target))
        if self.has_one_clock:
            for source, target in self.timed():
                if source in nodes and target in nodes:
                    out[source].append(Edge(Kind.REALTIME, target))
        return out
