"""K1 on lists: every anomaly by hand, with the explanation that a human is given."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.history.lines import Script
from tests.history.records import HistoryError, Outcome

TOGETHER: dict[str, Any] = {"at": (1, 90)}
"""Transactions that run at the same time."""


def test_a_serial_history_is_clean_and_counted() -> None:
    script = Script()
    script.txn("a", ("x", 1))
    script.txn("b", ("x", [1]), ("x", 2), ("x", [1, 2]))
    script.txn("a", ("x", [1, 2]), ("y", []))
    verdict = script.judged("appends")
    assert verdict.findings == []
    assert verdict.counts["reads"] == 4
    assert verdict.counts["ww edges"] == 1
    assert verdict.counts["wr edges"] == 3


def test_g0_two_transactions_write_over_each_other() -> None:
    script = Script()
    script.txn("a", ("x", 1), ("y", 1), **TOGETHER)
    script.txn("b", ("x", 2), ("y", 2), **TOGETHER)
    script.txn("c", ("x", [1, 2]), ("y", [2, 1]))
    (finding,) = script.judged("appends").findings
    assert finding.name == "G0"
    assert finding.operations == (("a", 1), ("b", 1))
    assert finding.story == (
        "T1 before T2: T2 appended 2 to x right after what T1 had appended (ww)",
        "T2 before T1: T1 appended 1 to y right after what T2 had appended (ww)",
    )


def test_g1a_a_failed_transaction_is_read() -> None:
    script = Script()
    script.txn("a", ("x", 1), outcome=Outcome.FAIL)
    script.txn("b", ("x", [1]))
    (finding,) = script.judged("appends").findings
    assert finding.name == "G1a"
    assert finding.operations == (("a", 1), ("b", 1))
    assert finding.summary == "aborted read: b #1 read 1 of x, and a #1 that wrote it had failed"


def test_g1b_half_of_a_transaction_is_read() -> None:
    script = Script()
    script.txn("a", ("x", 1), ("x", 2), **TOGETHER)
    script.txn("b", ("x", [1]), at=(2, 80))
    script.txn("c", ("x", [1, 2]))
    assert "G1b" in script.found("appends")


def test_g1c_each_reads_what_the_other_wrote() -> None:
    script = Script()
    script.txn("a", ("x", 1), ("y", [1]), **TOGETHER)
    script.txn("b", ("y", 1), ("x", [1]), **TOGETHER)
    (finding,) = script.judged("appends").findings
    assert finding.name == "G1c"
    assert finding.story[0] == "T1 before T2: T2 read [1] of x, the last by T1 (wr)"


def test_g_single_a_snapshot_that_is_not_one() -> None:
    script = Script()
    script.txn("a", ("x", 1), ("y", 1), **TOGETHER)
    script.txn("b", ("x", []), ("y", [1]), **TOGETHER)
    script.txn("c", ("x", [1]))
    (finding,) = script.judged("appends").findings
    assert finding.name == "G-single"
    assert set(finding.operations) == {("a", 1), ("b", 1)}
    reads = [line.partition(": ")[2][3:] for line in finding.story]
    one, two = sorted(line.replace("T1", "T").replace("T2", "T") for line in reads)
    assert one == "read [1] of y, the last by T (wr)"
    assert two == "read [] of x, to which T appended 1 (rw)"


def test_at_read_committed_two_statements_have_two_snapshots() -> None:
    script = Script()
    script.txn("a", ("x", 1), ("y", 1), **TOGETHER)
    script.txn("b", ("x", []), ("y", [1]), level="read committed", **TOGETHER)
    script.txn("c", ("x", [1]))
    assert script.found("appends") == []


def test_a_lost_update_is_called_by_its_name() -> None:
    script = Script()
    script.txn("a", ("x", []), ("x", 1), **TOGETHER)
    script.txn("b", ("x", []), ("x", 2), **TOGETHER)
    script.txn("c", ("x", [1, 2]))
    (finding,) = script.judged("appends").findings
    assert finding.name == "lost update"
    assert set(finding.operations) == {("a", 1), ("b", 1)}


def _long_fork(script: Script, **more: Any) -> None:
    script.txn("a", ("x", 1), **TOGETHER)
    script.txn("b", ("y", 1), **TOGETHER)
    script.txn("c", ("x", [1]), ("y", []), **TOGETHER)
    script.txn("d", ("x", []), ("y", [1]), **TOGETHER, **more)
    script.txn("e", ("x", [1]), ("y", [1]))


def test_a_long_fork_is_forbidden_on_one_server_and_expected_of_a_replica() -> None:
    script = Script()
    _long_fork(script)
    (finding,) = script.judged("appends").findings
    assert finding.name == "G-nonadjacent"
    assert len(finding.operations) == 4
    other = Script()
    _long_fork(other, role="replica")
    verdict = other.judged("appends")
    assert verdict.violations == 0
    assert verdict.findings[0].is_allowed


@pytest.mark.parametrize(("level", "n"), [("repeatable read", 0), ("serializable", 1)])
def test_write_skew_is_what_snapshots_allow(level: str, n: int) -> None:
    script = Script()
    script.txn("a", ("x", []), ("y", 1), level=level, **TOGETHER)
    script.txn("b", ("y", []), ("x", 1), level=level, **TOGETHER)
    script.txn("c", ("x", [1]), ("y", [1]), level=level)
    verdict = script.judged("appends")
    assert [finding.name for finding in verdict.findings] == ["G2-item"]
    assert verdict.violations == n


def test_real_time_makes_a_cycle() -> None:
    script = Script()
    script.txn("a", ("x", 1))
    script.txn("b", ("y", 1))
    script.txn("c", ("y", [1]), ("x", 2))
    script.txn("d", ("x", [2, 1]))
    (finding,) = script.judged("appends").findings
    assert finding.name == "G0-realtime"
    assert finding.operations == (("a", 1), ("c", 1))
    assert "T1 was acknowledged before T2 began (realtime)" in finding.story[0]


def test_files_of_different_clocks_have_the_order_of_each_process() -> None:
    script = Script()
    script.txn("a", ("x", 1))
    script.txn("a", ("x", 2))
    script.txn("d", ("x", [2, 1]))
    script.records[0] = {"history": 1, "process": "a", "clock": "another"}
    verdict = script.judged("appends")
    assert [finding.name for finding in verdict.findings] == ["G0-process"]
    assert verdict.unchecked


def test_a_stale_read_on_the_primary_and_none_on_a_replica() -> None:
    script = Script()
    script.txn("a", ("x", 1))
    script.txn("b", ("x", []), level="read committed")
    script.txn("c", ("x", [1]))
    assert "stale read" in script.found("appends")
    other = Script()
    other.txn("a", ("x", 1))
    other.txn("b", ("x", []), role="replica")
    other.txn("c", ("x", [1]))
    assert other.found("appends") == []


def test_a_lost_write_is_one_that_was_acknowledged() -> None:
    lost = ["G-single-realtime", "lost write"]
    for outcome, expected in ((Outcome.OK, lost), (Outcome.UNKNOWN, [])):
        script = Script()
        script.txn("a", ("x", 1))
        script.txn("a", ("x", 2), outcome=outcome)
        script.txn("b", ("x", [1]))
        assert script.found("appends") == expected


def test_an_unknown_write_that_was_read_has_happened_at_any_time_after_it_was_begun() -> None:
    script = Script()
    script.txn("a", ("x", 1), outcome=Outcome.UNKNOWN)
    script.txn("b", ("x", []))
    script.txn("c", ("x", [1]))
    assert script.found("appends") == []
    script.txn("d", ("x", []))
    assert script.found("appends") == ["G-single-realtime"]


def test_an_unknown_write_counts_whole() -> None:
    script = Script()
    script.txn("a", ("x", 1), ("y", 1), outcome=Outcome.UNKNOWN, at=(1, None))
    script.txn("b", ("x", [1]), ("y", []), at=(2, 80))
    script.txn("c", ("y", [1]))
    assert script.found("appends") == ["G-single"]


def test_a_write_that_is_there_twice() -> None:
    script = Script()
    script.txn("a", ("x", 1))
    script.txn("b", ("x", [1, 1]))
    (finding,) = script.judged("appends").findings
    assert finding.name == "duplicate write"
    assert finding.operations == (("a", 1), ("b", 1))


def test_two_histories_of_one_list() -> None:
    script = Script()
    script.txn("a", ("x", 1))
    script.txn("b", ("x", 2), **TOGETHER)
    script.txn("c", ("x", 3), **TOGETHER)
    script.txn("d", ("x", [1, 2]), **TOGETHER)
    script.txn("e", ("x", [1, 3]))
    finding = script.judged("appends").findings[0]
    assert finding.name == "incompatible order"
    assert finding.story[-1] == "first difference after [1]"


def test_what_nobody_wrote_and_what_contradicts_itself() -> None:
    script = Script()
    script.txn("a", ("x", [7]))
    assert "phantom value" in script.found("appends")
    other = Script()
    other.txn("a", ("x", 1), ("x", []))
    assert "internal" in other.found("appends")
    third = Script()
    third.txn("a", ("x", 1), **TOGETHER)
    third.txn("b", ("x", []), ("x", [1]), **TOGETHER)
    assert "internal" in third.found("appends")


def test_a_value_may_be_appended_once_only() -> None:
    script = Script()
    script.txn("a", ("x", 1))
    script.txn("b", ("x", 1))
    with pytest.raises(HistoryError, match="before"):
        script.ledger()


def _serial(script: Script, rng: random.Random, n: int, *, prefix: str = "k") -> None:
    lists: dict[str, list[int]] = {}
    for i in range(n):
        steps: list[object] = []
        for _ in range(rng.randint(1, 4)):
            key = f"{prefix}{rng.randrange(6)}"
            if rng.random() < 0.5:
                lists.setdefault(key, []).append(len(script.records) * 10 + len(steps))
                steps.append((key, lists[key][-1]))
            else:
                steps.append((key, list(lists.get(key, []))))
        script.txn(f"p{i % 5}", *steps)


def _circle(script: Script, n: int, during: dict[str, Any]) -> None:
    """A chain of transactions that each read the one before, and the first read the last."""
    for i in range(n):
        steps = (f"c{i}", 1), (f"c{(i - 1) % n}", [1])
        script.txn(f"bad{i}", *steps, level="read committed", **during)


def _plant(name: str, script: Script, during: dict[str, Any]) -> None:
    """Add the transactions of one anomaly, on lists of their own."""
    txn = script.txn
    if name == "G0":
        txn("bad0", ("p", 1), ("q", 1), **during)
        txn("bad1", ("p", 2), ("q", 2), **during)
        txn("eye", ("p", [1, 2]), ("q", [2, 1]))
    elif name == "G1a":
        txn("bad0", ("p", 1), outcome=Outcome.FAIL, **during)
        txn("bad1", ("p", [1]), **during)
    elif name == "G1b":
        txn("bad0", ("p", 1), ("p", 2), **during)
        txn("bad1", ("p", [1]), level="read committed", at=(during["at"][0], script.now))
        txn("eye", ("p", [1, 2]))
    elif name == "G1c":
        _circle(script, 3, during)
    elif name == "G-single":
        txn("bad0", ("p", 1), ("q", 1), **during)
        txn("bad1", ("p", []), ("q", [1]), **during)
        txn("eye", ("p", [1]))
    elif name == "lost update":
        txn("bad0", ("p", []), ("p", 1), **during)
        txn("bad1", ("p", []), ("p", 2), **during)
        txn("eye", ("p", [1, 2]))
    elif name == "G-nonadjacent":
        txn("bad0", ("p", 1), **during)
        txn("bad1", ("q", 1), **during)
        txn("bad2", ("p", [1]), ("q", []), **during)
        txn("bad3", ("p", []), ("q", [1]), **during)
        txn("eye", ("p", [1]), ("q", [1]))
    elif name == "G2-item":
        txn("bad0", ("p", []), ("q", 1), level="serializable", **during)
        txn("bad1", ("q", []), ("p", 1), level="serializable", **during)
        txn("eye", ("p", [1]), ("q", [1]))
    elif name == "duplicate write":
        txn("bad0", ("p", 1), **during)
        txn("bad1", ("p", [1, 1]))
    elif name == "incompatible order":
        txn("bad0", ("p", 1), **during)
        txn("bad1", ("p", 2), **during)
        txn("bad2", ("p", [1]), role="replica", **during)
        txn("bad3", ("p", [2, 1]), role="replica", **during)
    elif name == "stale read":
        txn("bad0", ("p", 1))
        txn("bad1", ("p", []), ("p", []), level="read committed")
        txn("eye", ("p", [1]))
    elif name == "lost write":
        txn("bad0", ("p", 1))
        txn("bad1", ("p", []), ("p", []), level="read committed")


PLANTS = (
    *("G0", "G1a", "G1b", "G1c", "G-single", "lost update", "G-nonadjacent", "G2-item"),
    *("duplicate write", "incompatible order", "stale read", "lost write"),
)


@pytest.mark.parametrize("name", PLANTS)
def test_one_anomaly_among_many_transactions_is_called_by_its_name(name: str) -> None:
    """As goal R3 has it: the class that was put in, nothing else, and whose transactions."""
    for seed in range(15):
        rng, script = random.Random(seed), Script()
        _serial(script, rng, rng.randint(20, 60))
        now = script.now
        _plant(name, script, {"at": (now + 1, now + 50)})
        _serial(script, rng, 30, prefix="later")
        verdict = script.judged("appends")
        assert verdict.totals == {name: 1}, seed
        (finding,) = verdict.findings
        assert {process[:3] for process, _ in finding.operations} <= {"bad", "eye"}


@pytest.mark.parametrize("n", [2, 3, 4, 5, 9])
def test_a_cycle_is_told_whole_and_no_longer(n: int) -> None:
    script = Script()
    _serial(script, random.Random(n), 150)
    _circle(script, n, {"at": (script.now + 1, script.now + 50)})
    (finding,) = script.judged("appends").findings
    assert finding.name == "G1c"
    assert {process for process, _ in finding.operations} == {f"bad{i}" for i in range(n)}
    assert len(finding.operations) == len(finding.story) == n
