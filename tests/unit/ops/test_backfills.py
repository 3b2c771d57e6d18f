"""Statements in batches: how a revision says so, the text of a batch, its size and its turn."""

from __future__ import annotations

import pytest

from shardkit.ops.backfills import RANGE, backfill_of, tagged, within
from shardkit.ops.pace import BatchSize, Rate
from shardkit.ops.safety import examine
from shardkit.ops.sqltree import parse
from shardkit.ops.steps import steps
from shardkit.testing import FakeClock

STATEMENTS = {
    "UPDATE t SET a = 1": f"UPDATE t SET a = 1\nWHERE {RANGE}",
    "UPDATE t SET a = 1 WHERE b IS NULL OR c;": (
        f"UPDATE t SET a = 1 WHERE (\nb IS NULL OR c\n) AND {RANGE}"
    ),
    "UPDATE t AS x SET a = (SELECT max(c) FROM u WHERE u.b = x.b) -- why": (
        f"UPDATE t AS x SET a = (SELECT max(c) FROM u WHERE u.b = x.b) -- why\nWHERE {RANGE}"
    ),
    "DELETE FROM t USING u WHERE t.a = u.a AND u.b = 'WHERE (' -- é": (
        f"DELETE FROM t USING u WHERE (\nt.a = u.a AND u.b = 'WHERE (' -- é\n) AND {RANGE}"
    ),
    "WITH w AS (SELECT 1 WHERE true) UPDATE t SET a = 1 FROM w WHERE b": (
        f"WITH w AS (SELECT 1 WHERE true) UPDATE t SET a = 1 FROM w WHERE (\nb\n) AND {RANGE}"
    ),
}


@pytest.mark.parametrize("text", STATEMENTS)
def test_the_bounds_of_a_batch_are_one_more_condition(text: str) -> None:
    [statement] = parse(tagged(text, rows=500))
    found = backfill_of(statement)
    assert found is not None
    assert found.text == STATEMENTS[text]
    assert (found.table, found.rows) == ("t", 500)
    assert found.alias == ("x" if " AS x" in text else "t")
    [again] = parse(found.text)
    assert again.kind == statement.kind


@pytest.mark.parametrize(
    "text",
    [
        "INSERT INTO t VALUES (1)", "UPDATE t SET a = 1; UPDATE t SET a = 2", "SELECT 1", "",
        "UPDATE t SET a = 1 RETURNING a", "UPDATE reference.t SET a = 1", "DROP TABLE t", "UPDAT",
    ],
)  # fmt: skip
def test_what_cannot_run_in_batches_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"backfill|syntax"):
        tagged(text, rows=10)


def test_batches_are_a_step_of_their_own_and_no_danger() -> None:
    text = tagged("UPDATE t SET b = 1", rows=10)
    found = steps(("ALTER TABLE t ADD b int", text, "ALTER TABLE t ADD c int"))
    assert [step.backfill is not None for step in found] == [False, True, False]
    assert found[1].is_outside
    assert examine([text], phase="pre") == ()
    assert [each.rule for each in examine(["UPDATE t SET b = 1"], phase="pre")] == [
        "backfill-at-once"
    ]
    # Rows of a table that is made here are few.
    assert len(steps(("CREATE TABLE t (a int, b int)", text))) == 1


def test_bounds_name_the_whole_key_with_its_types() -> None:
    key = (("a", "bigint"), ('B"', "text"))
    assert within("t", key, None, None) == "(true)"
    columns = '("t"."a", "t"."B""")'
    first, last = "('1'::bigint, 'x'''::text)", "('2'::bigint, 'y'::text)"
    found = within("t", key, ("1", "x'"), ("2", "y"))
    assert found == f"({columns} > {first} AND {columns} <= {last})"


def test_batches_grow_and_shrink_to_their_time() -> None:
    size = BatchSize(0.1, 1000)
    seen = []
    for seconds in (0.01, 0.01, 0.01, 0.01, 0.2, 10.0, 0.1):
        seen.append(size.rows)
        size.took(seconds)
    assert seen == [100, 200, 400, 800, 1000, 500, 250]
    size.shrink()
    assert size.rows == 125
    for _ in range(20):
        size.took(60.0)
    assert size.rows == 1, "and never none"


def test_a_rate_spaces_batches_of_all_threads() -> None:
    clock = FakeClock()
    rate = Rate(100.0, clock)
    assert [rate.take(50), rate.take(100), rate.take(1)] == [0.0, 0.5, 1.5]
    clock.advance(10.0)
    assert rate.take(1) == 0.0
    assert Rate(None).take(10**6) == 0.0
