"""Components and shortest cycles, against brute force on small graphs."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.history.cycles import CLASSES, components, shortest
from tests.history.graph import Edge, Kind

GRAPHS = st.lists(
    st.tuples(st.integers(0, 7), st.integers(0, 7), st.sampled_from([Kind.WW, Kind.WR, Kind.RW])),
    max_size=22,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(GRAPHS)
def test_components_are_those_of_reachability(edges: list[tuple[int, int, Kind]]) -> None:
    out: list[list[int] | None] = [None] * 8
    for source, target, _ in edges:
        out[source] = [*(out[source] or []), target]
    reach = [{i} for i in range(8)]
    for _ in range(8):
        for source, target, _ in edges:
            reach[source] |= reach[target]
    expected = {frozenset(j for j in range(8) if i in reach[j] and j in reach[i]) for i in range(8)}
    found = {frozenset(component) for component in components(out)}
    assert found == {each for each in expected if len(each) > 1}


@settings(max_examples=100, deadline=None, derandomize=True)
@given(GRAPHS)
def test_a_cycle_is_of_the_worst_class_and_the_shortest_of_it(
    edges: list[tuple[int, int, Kind]],
) -> None:
    """Against all closed walks of up to eight edges."""
    out: dict[int, list[Edge]] = {i: [] for i in range(8)}
    for source, target, kind in edges:
        if source != target:
            out[source].append(Edge(kind, target))
    lengths = _closed_walks(out)
    for form in CLASSES[:4]:
        found = shortest(out, form, is_barrier=lambda _: False)
        expected = lengths.get(form.name)
        assert (len(found) if found else None) == expected
        if found:
            assert _class([edge.kind for _, edge in found]) == form.name
            return


def _class(kinds: list[Kind]) -> str | None:
    n = sum(kind is Kind.RW for kind in kinds)
    if n == 0:
        return "G1c" if Kind.WR in kinds else "G0"
    if n == 1:
        return "G-single"
    pairs = zip(kinds, [*kinds[1:], kinds[0]], strict=True)
    return None if any(a is b is Kind.RW for a, b in pairs) else "G-nonadjacent"


def _closed_walks(out: dict[int, list[Edge]]) -> dict[str, int]:
    """Return the length of the shortest closed walk of each class, by brute force."""
    lengths: dict[str, int] = {}
    # State: start, node, first kind, last kind, number of rw up to 2, whether wr was there.
    states: set[Any] = {(i, i, None, None, 0, False) for i in out}
    for length in range(1, 17):
        following: set[Any] = set()
        for start, node, first, last, n, has_wr in states:
            for edge in out[node]:
                if edge.kind is Kind.RW and last is Kind.RW:
                    continue
                m = min(2, n + (edge.kind is Kind.RW))
                wr = has_wr or edge.kind is Kind.WR
                begun = first if first is not None else edge.kind
                following.add((start, edge.target, begun, edge.kind, m, wr))
                if edge.target == start:
                    if begun is Kind.RW and edge.kind is Kind.RW and length > 1:
                        continue
                    name = ("G1c" if wr else "G0", "G-single", "G-nonadjacent")[m]
                    lengths.setdefault(name, length)
        states = following
    return lengths
