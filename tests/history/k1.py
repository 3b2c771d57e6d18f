"""K1: what transactions on lists saw and wrote can be put in an order that their level allows.

Before any graph, reads that no order can explain: values that nobody wrote, or whose transaction
failed (G1a), or that were overwritten within it (G1b), values twice, lists that contradict each
other, acknowledged values that are gone or that a later reader was not shown. Then cycles.

Source: Adya, "Weak Consistency", MIT 1999 (G0 to G2); Kingsbury & Alvaro, "Elle", VLDB 2020, 4.3
(the anomalies that are no cycles); docs/testing.md, "What is allowed".
"""

from __future__ import annotations

from tests.history.appends import FAIL, FOREVER, OK, REPLICA, SERIALIZABLE, Appends, Key
from tests.history.cycles import CLASSES, Class, Cycle, components, shortest
from tests.history.findings import Verdict
from tests.history.graph import Edge, Graph, Kind

__all__ = ["judge_appends"]


def judge_appends(appends: Appends, *, has_one_clock: bool) -> Verdict:
    """Judge all transactions on lists.

    Args:
        appends: the transactions.
        has_one_clock: whether times of different processes can be compared.
    """
    verdict = Verdict("K1", "transactions on lists have an order that their level allows")
    verdict.is_concerned = bool(len(appends))
    for t, text in appends.internal:
        verdict.found("internal", f"{_name(appends, t)} {text}", [appends.ref(t)])
    for key in appends.keys.values():
        _values(verdict, appends, key)
        _orders(verdict, appends, key)
        if has_one_clock:
            _recency(verdict, appends, key)
    graph = Graph(appends, has_one_clock=has_one_clock)
    out = graph.neighbours()
    for component in components(out):
        _component(verdict, graph, component)
    verdict.counts = {
        "reads": appends.n_reads,
        "transactions": len(appends),
        "appends": appends.n_appends,
        "lists": len(appends.keys),
        "of unknown outcome": sum(not f & (OK | FAIL) for f in appends.flags),
        **{f"{kind.name.lower()} edges": n for kind, n in graph.n_edges.items() if n},
    }
    if not has_one_clock:
        verdict.unchecked.append("real time: files have different clocks")
    return verdict


def _name(appends: Appends, t: int) -> str:
    process, n = appends.ref(t)
    return f"{process} #{n}"


def _short(values: list[object]) -> str:
    """Write a list so that its end can be read."""
    if len(values) <= 12:
        return f"[{', '.join(map(str, values))}]"
    return f"[… {len(values) - 8} more, {', '.join(map(str, values[-8:]))}]"


def _values(verdict: Verdict, appends: Appends, key: Key) -> None:
    """Look at each value that was read: who wrote it, and how often is it there."""
    lists = [(key.reader, key.order), *key.odd]
    told: set[object] = set()
    for reader, values in lists:
        if len(set(values)) != len(values):
            twice = sorted({v for v in values if values.count(v) > 1}, key=str)
            writers = [key.writers[v] for v in twice[:5] if v in key.writers]
            verdict.found(
                "duplicate write",
                f"{key.name} has {', '.join(map(str, twice[:5]))} more than once, "
                f"as {_name(appends, reader)} read it",
                [appends.ref(t) for t in (*writers, reader)],
                [f"read {_short(values)}"],
            )
        for at, value in enumerate(values):
            writer = key.writers.get(value)
            if value in told:
                continue
            told.add(value)
            if writer is None:
                text = f"{_name(appends, reader)} read {value} of {key.name}, which nobody wrote"
                verdict.found("phantom value", text, [appends.ref(reader)])
            elif appends.flags[writer] & FAIL:
                verdict.found(
                    "G1a",
                    f"aborted read: {_name(appends, reader)} read {value} of {key.name}, and "
                    f"{_name(appends, writer)} that wrote it had failed",
                    [appends.ref(writer), appends.ref(reader)],
                )
            elif value in key.passing:
                _passing(verdict, appends, key, values, at)


def _passing(verdict: Verdict, appends: Appends, key: Key, values: list[object], at: int) -> None:
    """Tell of a value that was overwritten in its transaction and yet was the last one read."""
    value = values[at]
    writer = key.writers[value]
    if values is not key.order or at >= key.agreed():
        return
    for reader, length in zip(key.readers, key.lengths, strict=True):
        if length == at + 1 and reader != writer:
            verdict.found(
                "G1b",
                f"intermediate read: {_name(appends, reader)} read {key.name} as of {value}, after "
                f"which {_name(appends, writer)} wrote another in the same transaction",
                [appends.ref(writer), appends.ref(reader)],
                [f"read {_short(values[: at + 1])}"],
            )


def _orders(verdict: Verdict, appends: Appends, key: Key) -> None:
    """Tell of lists that contradict each other."""
    for reader, values in key.odd:
        n = 0
        while n < min(len(values), len(key.order)) and values[n] == key.order[n]:
            n += 1
        verdict.found(
            "incompatible order",
            f"{key.name} was read with two histories: {_name(appends, reader)} and "
            f"{_name(appends, key.reader)} agree on {n} values only",
            [appends.ref(reader), appends.ref(key.reader)],
            [
                f"{_name(appends, reader)} read {_short(values)}",
                f"{_name(appends, key.reader)} read {_short(key.order)}",
                f"first difference after {_short(values[:n])}",
            ],
        )


def _recency(verdict: Verdict, appends: Appends, key: Key) -> None:
    """Tell of acknowledged values that later readers on the primary were not shown.

    For each length of a list, when the earliest of the values behind it was acknowledged: a read
    of that length must have begun before.
    """
    order, flags, answered = key.order, appends.flags, appends.answered
    seen = set(order)
    gone = [
        (answered[t], t, value)
        for value, t in key.writers.items()
        if value not in seen and flags[t] & OK
    ]
    earliest = min(gone)[:2] if gone else (FOREVER, -1)
    behind = [earliest]
    for value in reversed(order):
        t = key.writers.get(value, -1)
        if t >= 0 and flags[t] & OK and (answered[t], t) < earliest:
            earliest = answered[t], t
        behind.append(earliest)
    behind.reverse()
    lost: dict[object, int] = {}
    agreed, told = key.agreed(), -1
    for reader, length in zip(key.readers, key.lengths, strict=True):
        if length >= len(behind) or flags[reader] & REPLICA:
            continue
        when, writer = behind[length]
        if when >= appends.invoked[reader] or writer == reader:
            continue
        missed = [value for known, _, value in gone if known < appends.invoked[reader]]
        for value in missed:
            lost.setdefault(value, reader)
        if not missed and length <= agreed and reader != told:
            told = reader
            verdict.found(
                "stale read",
                f"{_name(appends, reader)} read {length} values of {key.name}, "
                f"{_ms(appends.invoked[reader] - when)} after {_name(appends, writer)} was told "
                "that its value is there",
                [appends.ref(writer), appends.ref(reader)],
                [f"read {_short(order[:length])} of {_short(order)}"],
            )
    for value, reader in lost.items():
        writer = key.writers[value]
        verdict.found(
            "lost write",
            f"{value} of {key.name} is gone: {_name(appends, writer)} was told that it is there, "
            f"{_ms(appends.invoked[reader] - answered[writer])} before {_name(appends, reader)} "
            "read",
            [appends.ref(writer), appends.ref(reader)],
            [f"the longest list is {_short(order)}"],
        )


def _ms(nanoseconds: int) -> str:
    return f"{nanoseconds / 1e6:.3f} ms"


def _component(verdict: Verdict, graph: Graph, component: list[int]) -> None:
    """Tell of the worst cycle of a component, and of nothing else in it."""
    out = graph.within(set(component))
    n = len(graph.appends)
    for form in CLASSES:
        cycle = shortest(out, form, is_barrier=lambda node: node >= n)
        if cycle is not None:
            _cycle(verdict, graph.appends, form, cycle)
            return


def _cycle(verdict: Verdict, appends: Appends, form: Class, cycle: Cycle) -> None:
    n = len(appends)
    steps: list[tuple[int, Edge]] = []
    for node, edge in cycle:
        if node < n:
            steps.append((node, edge))
    names = {node: f"T{i}" for i, (node, _) in enumerate(steps, start=1)}
    story = []
    for i, (node, edge) in enumerate(steps):
        target = steps[(i + 1) % len(steps)][0]
        story.append(f"{names[node]} before {names[target]}: {_why(names, node, target, edge)}")
    name = form.name
    if name == "G-single" and _is_lost_update(steps):
        name = "lost update"
    refs = [appends.ref(node) for node, _ in steps]
    who = ", ".join(f"T{i} is {p} #{k}" for i, (p, k) in enumerate(refs, start=1))
    flags = [appends.flags[node] for node, _ in steps]
    is_allowed = (form.n_rw == 3 and not all(f & SERIALIZABLE for f in flags)) or (
        form.n_rw == 2 and any(f & REPLICA for f in flags)
    )
    summary = f"{len(steps)} transactions are each before the next, in a circle: {who}"
    verdict.found(name, summary, refs, story, is_allowed=is_allowed)


def _is_lost_update(steps: list[tuple[int, Edge]]) -> bool:
    """Tell whether two transactions read one version of a list and both wrote the next."""
    if len(steps) != 2:
        return False
    kinds = {edge.kind: edge.key for _, edge in steps}
    return kinds.keys() == {Kind.RW, Kind.WW} and kinds[Kind.RW] is kinds[Kind.WW]


def _why(names: dict[int, str], node: int, target: int, edge: Edge) -> str:
    one, two, key = names[node], names[target], edge.key
    if edge.kind is Kind.PROCESS:
        return f"the same process ran {one} and then {two} (process)"
    if key is None:
        return f"{one} was acknowledged before {two} began (realtime)"
    if edge.kind is Kind.WR:
        return (
            f"{two} read {_short(key.order[: edge.length])} of {key.name}, the last by {one} (wr)"
        )
    following = [value for value, t in key.writers.items() if t == target]
    if edge.length < len(key.order):
        following = [key.order[edge.length]]
    what = ", ".join(map(str, following))
    if edge.kind is Kind.RW:
        shown = _short(key.order[: edge.length])
        return f"{one} read {shown} of {key.name}, to which {two} appended {what} (rw)"
    return f"{two} appended {what} to {key.name} right after what {one} had appended (ww)"
