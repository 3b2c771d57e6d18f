"""Cycles in the serialization graph: components, shortest cycles, and what kind they are.

    G0             ww only: two transactions each wrote over the other
    G1c            ww and wr: each saw or overwrote the other
    G-single       one rw: a snapshot that is not one, a lost update
    G-nonadjacent  several rw, no two in a row: snapshots that contradict each other
    G2-item        rw in a row: write skew, which snapshot isolation allows

and each of them `-process` or `-realtime` when the cycle needs such an edge.

Source: Adya, "Weak Consistency", MIT 1999, 4.2, 4.3; Cerone & Gotsman, "Analysing Snapshot
Isolation", PODC 2016 (two rw in a row); Tarjan, "Depth-first search and linear graph algorithms",
1972, here without recursion.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from tests.history.graph import Edge, Kind

__all__ = ["CLASSES", "Class", "Cycle", "components", "shortest"]

_BUDGET: Final = 3_000_000
"""Edges looked at for one class in one component; a cycle may then not be the shortest."""


class Class(NamedTuple):
    """A kind of cycle.

    Attributes:
        name: as in the literature.
        kinds: edges that it may have besides rw.
        n_rw: 0 for none, 1 for one, 2 for several of which no two are in a row, 3 for any.
    """

    name: str
    kinds: frozenset[Kind]
    n_rw: int


Cycle = list[tuple[int, Edge]]
"""Nodes, each with the edge to the next one."""

_FORMS: Final = (
    ("G0", {Kind.WW}, 0),
    ("G1c", {Kind.WW, Kind.WR}, 0),
    ("G-single", {Kind.WW, Kind.WR}, 1),
    ("G-nonadjacent", {Kind.WW, Kind.WR}, 2),
    ("G2-item", {Kind.WW, Kind.WR}, 3),
)
_TIMES: Final[tuple[tuple[str, set[Kind]], ...]] = (
    ("", set()),
    ("-process", {Kind.PROCESS}),
    ("-realtime", {Kind.PROCESS, Kind.REALTIME}),
)
CLASSES: Final = tuple(
    Class(name + suffix, frozenset(kinds | times), n_rw)
    for is_last in (False, True)  # what snapshot isolation allows comes last
    for suffix, times in _TIMES
    for name, kinds, n_rw in _FORMS
    if (n_rw == 3) is is_last
)
"""From what is forbidden at every level to what is allowed at most."""


def components(out: Sequence[Sequence[int] | None]) -> Iterator[list[int]]:
    """Yield the strongly connected components of more than one node."""
    n = len(out)
    index = [0] * n  # order of discovery from 1; 0 is not seen
    low = [0] * n
    is_open = bytearray(n)
    path: list[int] = []
    counter = 0
    empty: tuple[int, ...] = ()
    for root in range(n):
        if index[root]:
            continue
        counter += 1
        index[root] = low[root] = counter
        path.append(root)
        is_open[root] = 1
        calls = [(root, iter(out[root] or empty))]
        while calls:
            node, rest = calls[-1]
            lowest = low[node]
            for after in rest:
                found = index[after]
                if not found:
                    low[node] = lowest
                    counter += 1
                    index[after] = low[after] = counter
                    following = out[after]
                    if following is None:  # leads nowhere: a component of its own
                        continue
                    path.append(after)
                    is_open[after] = 1
                    calls.append((after, iter(following)))
                    break
                if found < lowest and is_open[after]:
                    lowest = found
            else:
                low[node] = lowest
                calls.pop()
                if calls:
                    parent = calls[-1][0]
                    low[parent] = min(low[parent], lowest)
                if lowest == index[node]:
                    component = []
                    while True:
                        member = path.pop()
                        is_open[member] = 0
                        component.append(member)
                        if member == node:
                            break
                    if len(component) > 1:
                        yield component


def shortest(
    out: Mapping[int, list[Edge]], form: Class, *, is_barrier: Callable[[int], bool]
) -> Cycle | None:
    """Return a shortest cycle of one class, or None.

    Barriers of real time count nothing. Beyond three million edges looked at it may be a longer one.

    Args:
        out: the edges of one component.
        form: the class; cycles of the classes before it in `CLASSES` are not there.
        is_barrier: tells them from transactions.
    """
    best: Cycle | None = None
    length, looked = 1 << 30, 0
    for node in sorted(out):
        if is_barrier(node):
            continue
        for edge in out[node]:
            if edge.kind is not Kind.RW if form.n_rw else edge.kind not in form.kinds:
                continue
            if looked > _BUDGET:
                return best
            way, seen = _way(out, node, edge, form, is_barrier, length - 1)
            looked += seen
            if way is not None:
                cycle = [(node, edge), *way]
                best = cycle
                length = sum(not is_barrier(at) for at, _ in cycle)
                if length == 2:
                    return best
    return best


def _way(
    out: Mapping[int, list[Edge]],
    goal: int,
    first: Edge,
    form: Class,
    is_barrier: Callable[[int], bool],
    limit: int,
) -> tuple[Cycle | None, int]:
    """Search from the first edge's target back to the goal; breadth first, barriers for free.

    A state is a node, and whether the edge into it was rw, where that matters.
    """
    start = (first.target, form.n_rw == 2)
    came: dict[tuple[int, bool], tuple[tuple[int, bool], Edge] | None] = {start: None}
    queue = deque([(start, 0 if is_barrier(first.target) else 1)])  # transactions since the goal
    seen = 0
    while queue:
        state, distance = queue.popleft()
        node, was_rw = state
        if node == goal and not was_rw:
            return _back(came, state), seen
        if distance >= limit:
            continue
        for edge in out[node]:
            seen += 1
            if edge.kind is Kind.RW:
                if form.n_rw < 2 or was_rw:
                    continue
            elif edge.kind not in form.kinds:
                continue
            after = (edge.target, form.n_rw == 2 and edge.kind is Kind.RW)
            if after in came:
                continue
            came[after] = (state, edge)
            if is_barrier(edge.target):
                queue.appendleft((after, distance))
            else:
                queue.append((after, distance + 1))
    return None, seen


def _back(
    came: Mapping[tuple[int, bool], tuple[tuple[int, bool], Edge] | None], end: tuple[int, bool]
) -> Cycle:
    way: Cycle = []
    step = came[end]
    while step is not None:
        state, edge = step
        way.append((state[0], edge))
        step = came[state]
    return way[::-1]
