"""K2 to K11, and registers: what each finds, and what it must not find."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.history.judge import Limits
from tests.history.k6 import scan
from tests.history.lines import Script
from tests.history.records import Operation, Outcome

FINAL: dict[str, Any] = {"final": True}
OPERATIONS = st.lists(
    st.tuples(st.booleans(), st.integers(0, 2), st.integers(1, 12), st.integers(1, 6)), max_size=6
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(OPERATIONS, st.booleans())
def test_registers_are_judged_as_by_trying_every_order(
    drawn: list[tuple[bool, int, int, int]], is_last_unknown: bool
) -> None:
    script, value = Script(), 0
    ops: list[Operation] = []
    for i, (is_write, read, start, length) in enumerate(drawn):
        unknown = is_last_unknown and i == 0
        outcome = Outcome.UNKNOWN if unknown else Outcome.OK
        # Different times for all: a tie says nothing about order.
        at = (start * 10 + i, (start + length) * 10 + i)
        if is_write:
            value += 1
            do, got = ["write", "r", value], None
        else:
            do, got = ["read", "r"], read or None
        ops.append(script.op(f"p{i}", "register", do, got, at=at, outcome=outcome))
    if not any(op.do[0] == "write" for op in ops):
        return
    verdict = script.judged("registers")
    assert (verdict.violations == 0) == _is_linearizable(ops)


def _is_linearizable(ops: list[Operation]) -> bool:
    known = [op for op in ops if op.outcome is Outcome.OK]
    unknown = [op for op in ops if op.outcome is not Outcome.OK and op.do[0] == "write"]
    for some in (known, [*known, *unknown]):
        for order in itertools.permutations(some):
            if _is_legal(order):
                return True
    return False


def _is_legal(order: tuple[Operation, ...]) -> bool:
    now = None
    for i, op in enumerate(order):
        for later in order[i + 1 :]:
            ended = later.answered if later.outcome is Outcome.OK else None
            if ended is not None and ended < op.invoked:
                return False
        if op.do[0] == "write":
            now = op.do[2]
        elif op.got != now:
            return False
    return True


def test_a_register_explains_which_values_it_would_have_to_have() -> None:
    script = Script()
    script.op("a", "register", ["write", "r", 1], at=(1, 2))
    script.op("b", "register", ["write", "r", 2], at=(3, 4))
    script.op("c", "register", ["read", "r"], 2, at=(5, 6))
    script.op("d", "register", ["read", "r"], 1, at=(7, 8))
    (finding,) = script.judged("registers").findings
    assert finding.summary == "r would have to be 1 and 2 at one time"
    assert finding.story == (
        "it was 1 from when a #1 ended until d #1 began",
        "it was 2 from when b #1 ended until c #1 began",
    )


def test_sets() -> None:
    script = Script()
    script.op("a", "set", ["add", "s", 1])
    script.op("a", "set", ["add", "s", 2], outcome=Outcome.FAIL)
    script.op("a", "set", ["add", "s", 3], outcome=Outcome.UNKNOWN)
    script.op("b", "set", ["read", "s"], [1], **FINAL, endpoint="alpha")
    assert script.found("sets") == []
    script.op("b", "set", ["read", "s"], [1, 3], **FINAL, endpoint="beta")
    assert script.found("sets") == ["endpoints differ"]
    script.op("b", "set", ["read", "s"], [1, 1, 2, 9], **FINAL, endpoint="alpha")
    script.op("b", "set", ["read", "s"], [], **FINAL, endpoint="alpha")
    assert script.found("sets") == [
        "aborted read", "duplicate write", "endpoints differ", "lost write", "phantom value",
        "vanished",
    ]  # fmt: skip


def test_a_set_is_read_late_on_the_primary_and_may_be_on_a_replica() -> None:
    script = Script()
    script.op("a", "set", ["add", "s", 1])
    script.op("b", "set", ["read", "s"], [], role="replica")
    assert script.found("sets") == []
    script.op("b", "set", ["read", "s"], [])
    assert script.found("sets") == ["stale read"]


def test_ids_that_are_given_twice() -> None:
    script = Script()
    script.op("a", "set", ["add", "s", 1], ids=[100, 101])
    script.op("b", "call", ["insert"], ids=[101])
    assert script.found("sets") == ["duplicate id"]


def test_the_bank() -> None:
    script = Script()
    script.fact("bank", bank="b", accounts={"x": 10, "y": 10})
    script.op("a", "bank", ["transfer", "b", "x", "y", 3])
    script.op("a", "bank", ["transfer", "b", "x", "y", 2], outcome=Outcome.UNKNOWN)
    for x in (7, 5):  # the unknown one has happened, or not
        script.op("c", "bank", ["read", "b"], {"x": x, "y": 20 - x}, **FINAL)
    assert script.found("bank") == []
    script.op("c", "bank", ["read", "b"], {"x": 7, "y": 10}, **FINAL)
    script.op("c", "bank", ["read", "b"], {"x": 10, "y": 10}, **FINAL)
    assert script.found("bank") == ["lost transfer", "wrong total"]


def test_names() -> None:
    script = Script()
    script.op("a", "name", ["claim", "n", "ann"])
    script.op("b", "name", ["claim", "n", "bob"], outcome=Outcome.FAIL)
    script.op("a", "name", ["release", "n", "ann"])
    script.op("b", "name", ["claim", "n", "bob"])
    script.op("c", "name", ["read", "n"], "bob")
    assert script.found("names") == []
    script.op("d", "name", ["claim", "n", "dora"])
    script.op("c", "name", ["read", "n"], None)
    script.op("c", "name", ["read", "n"], "eve")
    assert script.found("names") == ["lost name", "phantom owner", "two owners"]


def test_a_claim_of_unknown_outcome_wins_or_does_not() -> None:
    for owner in (None, "ann"):
        script = Script()
        script.op("a", "name", ["claim", "n", "ann"], outcome=Outcome.UNKNOWN)
        script.op("c", "name", ["read", "n"], owner)
        assert script.found("names") == []


@pytest.mark.parametrize(
    ("first", "then", "expected"),
    [
        (("write", 5), ("read", 4), ["read your writes"]),
        (("read", 5), ("read", 4), ["monotonic reads"]),
        (("write", 5), ("write", 4), ["monotonic writes"]),
        (("read", 5), ("write", 4), ["writes follow reads"]),
        (("write", 5), ("read", 5), []),
        (("write", 5), ("write", 6), []),
    ],
)
def test_sessions(first: tuple[str, int], then: tuple[str, int], expected: list[str]) -> None:
    script = Script()
    script.op("a", "row", [first[0], "r"], first[1], session="s", role="replica")
    script.op("b", "row", [then[0], "r"], then[1], session="s", role="replica")
    assert script.found("sessions") == expected
    other = Script()  # in another session, or at the same time, nothing is owed
    other.op("a", "row", [first[0], "r"], first[1], session="s", at=(1, 9))
    other.op("b", "row", [then[0], "r"], then[1], session="t", at=(10, 11))
    other.op("c", "row", [then[0], "r"], then[1], session="s", at=(2, 8))
    assert other.found("sessions") == []


def test_sessions_of_lists() -> None:
    script = Script()
    script.txn("a", ("x", 1), session="s")
    script.txn("b", ("x", []), session="s", role="replica")
    script.txn("c", ("x", [1]))
    assert script.found("sessions") == ["read your writes"]


@pytest.mark.parametrize(("read_at", "found"), [(1003, []), (1004, ["stale cache"])])
def test_a_cache_may_be_late_by_its_bound(read_at: int, found: list[str]) -> None:
    script = Script()
    script.op("a", "row", ["write", "r"], 1, at=(1, 2))
    script.op("a", "row", ["write", "r"], 2, at=(2, 3))
    script.op("a", "row", ["write", "r"], 3, at=(900, 901))
    for source in ("database", "cache"):
        do = ["read", "r"]
        script.op("b", "row", do, 1, at=(read_at, read_at + 1), source=source, session=source)
    verdict = script.judged("caches", Limits(bound=1.0))
    assert sorted(verdict.totals) == found
    assert verdict.counts["reads from caches"] == 1


def test_the_outbox() -> None:
    script = Script()
    for event, position in (("e1", 1), ("e2", 2)):
        script.op("a", "emit", ["emit", "k", event], position)
        script.op("r", "deliver", ["deliver", "k", event, position])
    script.op("a", "emit", ["emit", "k", "e3"], outcome=Outcome.UNKNOWN)
    script.op("r", "deliver", ["deliver", "k", "e1", 1])  # again
    script.op("w", "effects", ["effects"], ["e1", "e2"], **FINAL)
    assert script.found("outbox") == []
    script.op("a", "emit", ["emit", "k", "e4"], 4)
    script.op("a", "emit", ["emit", "k", "e5"], 5)
    script.op("a", "emit", ["emit", "k", "e6"], 6)
    script.op("a", "emit", ["emit", "k", "e7"], outcome=Outcome.FAIL)
    script.op("r", "deliver", ["deliver", "k", "e6", 6])
    script.op("r", "deliver", ["deliver", "k", "e5", 5])
    script.op("r", "deliver", ["deliver", "k", "e7", 7])
    script.op("w", "effects", ["effects"], ["e1", "e1", "e2", "e6"], **FINAL)
    names = script.found("outbox")
    assert set(names) == {
        "aborted event", "duplicate effect", "lost effect", "lost event", "order",
    }  # fmt: skip


def test_images() -> None:
    script = Script()
    script.fact("image", move=1, shard=4, side="source", image={"rows": "aa", "sequence": 7})
    script.fact("image", move=1, shard=4, side="target", image={"rows": "aa", "sequence": 0})
    script.fact("image", move=2, shard=5, side="source", image={})
    verdict = script.judged("images")
    assert verdict.totals == {"different copies": 1}
    assert verdict.unchecked == ["move 2 of 5: only the source was looked at"]


def test_owners() -> None:
    script = Script()
    script.op("a", "call", ["w"], shard=4, stamp=("one", 1, 1))
    script.op("a", "call", ["w"], shard=4, stamp=("two", 1, 2))
    script.op("a", "call", ["w"], shard=5, stamp=("one", 1, 1))
    assert script.found("owners") == []
    script.op("b", "call", ["w"], shard=4, stamp=("one", 1, 1))
    assert script.found("owners") == ["epoch went back"]
    script.op("b", "call", ["w"], shard=4, stamp=("one", 2, 2))
    assert script.found("owners") == ["epoch went back", "two owners"]


def test_schemas_leftovers_and_secrets() -> None:
    script = Script()
    script.fact("schemas", known={"f1": "r1"}, between=["f2"])
    for fingerprint in ("f1", "f2", "f3"):
        script.fact("schema", shard=1, fingerprint=fingerprint)
    script.fact("leftovers", where="alpha", moment="before", things={"slots": ["s0"]})
    script.fact("leftovers", where="alpha", moment="after", things={"slots": ["s0", "s1"]})
    script.fact("canaries", planted=["password"])
    script.fact("scanned", what="log", bytes=10, hits={"password": 2})
    assert script.judged("schemas").totals == {"unknown schema": 1}
    assert script.judged("leftovers").totals == {"left behind": 1}
    assert script.judged("secrets").totals == {"secret": 1}


@given(st.integers(0, 40), st.integers(1, 9))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_a_canary_is_found_across_chunks(
    tmp_path_factory: pytest.TempPathFactory, before: int, chunk: int
) -> None:
    from tests.history import k6

    path = tmp_path_factory.getbasetemp() / "canary"
    path.write_bytes(b"." * before + b"hunter2" + b"." * 5 + b"hunter2")
    old, k6._CHUNK = k6._CHUNK, chunk  # type: ignore[misc] # so that a small file has many
    try:
        assert scan(path, {"password": b"hunter2", "other": b"nothing"}) == {
            "password": 2, "other": 0,
        }  # fmt: skip
    finally:
        k6._CHUNK = old  # type: ignore[misc]
        path.unlink()


def test_liveness() -> None:
    script = Script()
    script.fact("fault", name="kill alpha", began=0, healed=100_000_000)
    for i in range(5):
        outcome = Outcome.FAIL if i else Outcome.OK
        script.op("a", "call", ["x"], at=(10 + i, 11 + i), outcome=outcome, deadline=0.5)
    for i in range(1000):
        script.op("a", "call", ["x"], at=(2000 + i, 2001 + i), deadline=0.5)
    limits = Limits(within=1.0)
    assert script.found("liveness", limits) == []
    script.op("b", "call", ["x"], at=(3000, 3751), deadline=0.5)
    assert script.found("liveness", limits) == ["past its deadline"]
    script.op("c", "call", ["x"], at=(3000, None), outcome=Outcome.UNKNOWN)
    script.op("d", "call", ["x"], at=(3000, None), outcome=Outcome.UNKNOWN)
    script.fact("killed", process="d")
    verdict = script.judged("liveness", limits)
    assert verdict.totals == {"past its deadline": 1, "hang": 1, "not recovered": 1}


def test_an_honest_refusal_is_an_answer() -> None:
    script = Script()
    script.op("a", "name", ["claim", "n", "x"], outcome=Outcome.FAIL, is_refused=True)
    assert script.found("liveness") == []
    script.op("a", "name", ["claim", "n", "x"], outcome=Outcome.FAIL)
    assert script.found("liveness") == ["not recovered"]
