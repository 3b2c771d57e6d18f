"""The rules on migration SQL, from both sides."""

from __future__ import annotations

import pytest

from shardkit.ops.safety import check

REFUSED = [
    ("COMMIT", "transaction"),
    ("SELECT 1; commit", "transaction"),
    ("begin", "transaction"),
    ("PREPARE TRANSACTION 'x'", "transaction"),
    ("CREATE INDEX CONCURRENTLY i ON t (a)", "CONCURRENTLY"),
    ("create unique index\n  concurrently i on t (a)", "CONCURRENTLY"),
    ("DROP INDEX CONCURRENTLY i", "CONCURRENTLY"),
    ("REINDEX TABLE CONCURRENTLY t", "CONCURRENTLY"),
    ("SET search_path = public", "setting"),
    ("/* why */ SET LOCAL search_path TO x", "setting"),
    ("SELECT pg_catalog.set_config('search_path', 'x', false)", "setting"),
    ("SET ROLE postgres", "setting"),
    ("SET lock_timeout = 0", "setting"),
    ("RESET ALL", "setting"),
    ("CREATE SCHEMA x", "schema"),
    ("DROP SCHEMA shard_0001 CASCADE", "schema"),
    ("INSERT INTO shard_0042.t VALUES (1)", "one logical shard"),
    ('ALTER TABLE "shard_0042"."t" ADD b int', "one logical shard"),
    ("DELETE FROM shardkit.ownership", "one logical shard"),
    ("VACUUM t", "cannot run"),
    ("CREATE DATABASE x", "cannot run"),
    ("COPY t FROM STDIN", "standard input"),
]

ALLOWED = [
    "CREATE TABLE t (id bigint PRIMARY KEY, committed boolean)",
    "CREATE INDEX i ON t (a)",
    "INSERT INTO t VALUES ('; COMMIT; ')",
    "INSERT INTO t VALUES (E'it\\'s; COMMIT')",
    "COMMENT ON TABLE t IS 'see shard_0042.t'",
    "-- COMMIT\nSELECT 1",
    "/* ; SET search_path = x */ SELECT 1",
    "CREATE FUNCTION f() RETURNS int LANGUAGE plpgsql AS $$ BEGIN RETURN 1; END; $$",
    "CREATE FUNCTION f() RETURNS int LANGUAGE sql SET search_path = pg_catalog AS $a$ SELECT 1 $a$",
    "UPDATE t SET role = 'x', schema = 'y'",
    "ALTER TABLE t ADD COLUMN shard_0042_id int",
    "SELECT shardkit_x.a FROM t AS shardkit_x",
    "",
]


@pytest.mark.parametrize(("statement", "why"), REFUSED)
def test_a_statement_that_breaks_a_promise_is_refused_with_a_remedy(
    statement: str, why: str
) -> None:
    finding = check(statement)
    assert finding is not None
    assert why in finding.problem
    assert finding.remedy


@pytest.mark.parametrize("statement", ALLOWED)
def test_an_honest_statement_passes(statement: str) -> None:
    assert check(statement) is None


def test_a_long_statement_is_shortened_to_one_line() -> None:
    finding = check("CREATE SCHEMA\n" + "x" * 200)
    assert finding is not None
    assert len(finding.statement) == 80
    assert "\n" not in finding.statement
