"""A revision cut into transactions, and its tables named for a logical shard."""

from __future__ import annotations

import pytest

from shardkit.ops.sqltree import parse, pieces
from shardkit.ops.steps import at_once, render, split, steps

ONE = [
    ["CREATE TABLE u (a bigint)", "CREATE INDEX i ON u (a)", "INSERT INTO u VALUES (1)"],
    ["ALTER TABLE t ADD b int", "ALTER TABLE t ADD c int"],
    ["CREATE TABLE u (a bigint REFERENCES t)", "ALTER TABLE t ADD b int"],
    ["CREATE TABLE u (a bigint); ALTER TABLE u ADD b int; ALTER TABLE t ADD b int"],
    [],
]

SEVERAL = [
    (["ALTER TABLE t ADD b int", "ALTER TABLE u ADD b int", "ALTER TABLE u ADD c int"], [1, 3]),
    (["ALTER TABLE t ADD b int", "UPDATE t SET b = 1", "ALTER TABLE t ADD c int"], [1, 2, 3]),
    (
        ["ALTER TABLE t ADD b int; CREATE INDEX CONCURRENTLY i ON t (b); ALTER TABLE t ADD c int"],
        [1, 2, 3],
    ),
    (
        [
            "ALTER TABLE t ADD CONSTRAINT c CHECK (a > 0) NOT VALID",
            "ALTER TABLE t VALIDATE CONSTRAINT c",
        ],
        [1, 2],
    ),
]


@pytest.mark.parametrize("texts", ONE)
def test_what_locks_one_live_table_is_one_transaction(texts: list[str]) -> None:
    [step] = steps(tuple(texts))
    assert step.is_last
    assert step.end == len(split(texts))


@pytest.mark.parametrize(("texts", "ends"), SEVERAL)
def test_what_locks_two_or_touches_rows_is_cut(texts: list[str], ends: list[int]) -> None:
    found = steps(tuple(texts))
    assert [step.end for step in found] == ends
    assert [step.is_last for step in found] == [False] * (len(ends) - 1) + [True]


@pytest.mark.parametrize(("texts", "ends"), SEVERAL)
def test_what_is_done_is_left_out(texts: list[str], ends: list[int]) -> None:
    for done in ends[:-1]:
        left = steps(tuple(texts), done)
        assert [step.end for step in left] == [end for end in ends if end > done]


def test_an_index_is_built_alone_and_on_an_unused_schema_with_the_rest() -> None:
    texts = (
        "ALTER TABLE t ADD b int",
        "CREATE UNIQUE INDEX CONCURRENTLY i ON t (b)",
        "DROP INDEX CONCURRENTLY j",
    )
    _, build, drop = steps(texts)
    assert (build.index, build.is_drop) == ("i", False)
    assert (drop.index, drop.is_drop) == ("j", True)
    assert render(drop.statements[0], 42) == 'DROP INDEX CONCURRENTLY "shard_0042"."j"'
    assert not any("CONCURRENTLY" in text for text in at_once(texts))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ALTER TABLE t ADD b int", 'ALTER TABLE "shard_0042".t ADD b int'),
        (
            "ALTER TABLE ONLY t ADD b int REFERENCES u",
            'ALTER TABLE ONLY "shard_0042".t ADD b int REFERENCES "shard_0042".u',
        ),
        (
            "CREATE INDEX CONCURRENTLY i ON t (a)",
            'CREATE INDEX CONCURRENTLY i ON "shard_0042".t (a)',
        ),
        (
            "INSERT INTO t SELECT * FROM reference.r",
            'INSERT INTO "shard_0042".t SELECT * FROM reference.r',
        ),
        (
            "WITH x AS (SELECT a FROM t) SELECT * FROM x, u",
            'WITH x AS (SELECT a FROM "shard_0042".t) SELECT * FROM x, "shard_0042".u',
        ),
        ("UPDATE t SET a = t.b", 'UPDATE "shard_0042".t SET a = t.b'),
        ("SELECT 'é' FROM t", "SELECT 'é' FROM \"shard_0042\".t"),
        ("SELECT relname FROM pg_class", "SELECT relname FROM pg_class"),
        ("CREATE TEMP TABLE x (a int)", "CREATE TEMP TABLE x (a int)"),
    ],
)
def test_tables_are_named_with_the_schema_of_the_logical_shard(text: str, expected: str) -> None:
    found = '"shard_0042".'.join(pieces(text))
    assert found == expected
    assert parse(found)


def test_a_temporary_table_stays_one() -> None:
    texts = ("CREATE TEMP TABLE x (a int)", "INSERT INTO x SELECT a FROM t")
    assert render(at_once(texts)[1], 42) == 'INSERT INTO x SELECT a FROM "shard_0042".t'
