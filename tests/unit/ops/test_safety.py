"""The rules on migration SQL, from both sides."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardkit.ops.safety import check, examine, rules

REFUSED = [
    ("COMMIT", "transaction"),
    ("SELECT 1; commit", "transaction"),
    ("begin", "transaction"),
    ("PREPARE TRANSACTION 'x'", "transaction"),
    ("CREATE INDEX CONCURRENTLY ON t (a)", "without a name"),
    ("DROP INDEX CONCURRENTLY i, j", "CONCURRENTLY"),
    ("ALTER TABLE t DETACH PARTITION u CONCURRENTLY", "CONCURRENTLY"),
    ("CREATE EXTENSION hstore", "cannot run"),
    ("ALTER TABLE t SET SCHEMA x", "schema"),
    ("CREATE TABL t ()", "not SQL"),
    (f"CREATE TABLE {'a' * 64} ()", "cuts off"),
    (f'CREATE INDEX "{"é" * 32}" ON t (a)', "cuts off"),
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
    "CREATE INDEX CONCURRENTLY i ON t (a)",
    "create unique index\n  concurrently i on t (a)",
    "DROP INDEX CONCURRENTLY i",
    f"INSERT INTO t VALUES ('{'x' * 64}')",
    f"-- {'x' * 64}\nSELECT 1",
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


RULES = {
    # locks
    "check-without-not-valid": (
        ["ALTER TABLE t ADD CONSTRAINT c CHECK (a > 0)", "ALTER TABLE t ADD b int CHECK (b > 0)"],
        ["ALTER TABLE t ADD CONSTRAINT c CHECK (a > 0) NOT VALID; ALTER TABLE t VALIDATE CONSTRAINT c"],
    ),
    "foreign-key-without-not-valid": (
        ["ALTER TABLE t ADD FOREIGN KEY (a) REFERENCES u (a)", "ALTER TABLE t ADD b int REFERENCES u"],
        ["ALTER TABLE t ADD FOREIGN KEY (a) REFERENCES u (a) NOT VALID"],
    ),
    "set-not-null": (
        ["ALTER TABLE t ALTER a SET NOT NULL",
         "ALTER TABLE t ADD CONSTRAINT c CHECK (a IS NOT NULL) NOT VALID; ALTER TABLE t ALTER a SET NOT NULL",
         "ALTER TABLE t ADD CONSTRAINT c NOT NULL a"],
        ["ALTER TABLE t ADD CONSTRAINT c CHECK (a IS NOT NULL) NOT VALID; ALTER TABLE t VALIDATE CONSTRAINT c; ALTER TABLE t ALTER a SET NOT NULL",
         "ALTER TABLE t ADD CONSTRAINT c NOT NULL a NOT VALID"],
    ),
    "unique-without-index": (
        ["ALTER TABLE t ADD UNIQUE (a)", "ALTER TABLE t ADD b int UNIQUE"],
        ["ALTER TABLE t ADD CONSTRAINT c UNIQUE USING INDEX i"],
    ),
    "primary-key-without-index": (
        ["ALTER TABLE t ADD PRIMARY KEY (a)"],
        ["ALTER TABLE t ADD CONSTRAINT c PRIMARY KEY USING INDEX i", "CREATE TABLE u (a bigint PRIMARY KEY)"],
    ),
    "exclusion": (["ALTER TABLE t ADD EXCLUDE USING gist (a WITH &&)"], []),
    "index-not-concurrently": (
        ["CREATE INDEX i ON t (a)"],
        ["CREATE INDEX CONCURRENTLY i ON t (a)", "CREATE TABLE u (a bigint); CREATE INDEX i ON u (a)"],
    ),
    "drop-index-not-concurrently": (["DROP INDEX i"], ["DROP INDEX CONCURRENTLY i"]),
    "reindex": (["REINDEX TABLE t"], []),
    "refresh-not-concurrently": (
        ["REFRESH MATERIALIZED VIEW v"], ["REFRESH MATERIALIZED VIEW CONCURRENTLY v"],
    ),
    "attach-partition": (
        ["ALTER TABLE t ATTACH PARTITION u FOR VALUES IN (1)"],
        ["CREATE TABLE u (a bigint); ALTER TABLE t ATTACH PARTITION u FOR VALUES IN (1)"],
    ),
    "detach-partition": (["ALTER TABLE t DETACH PARTITION u"], []),
    "lock-table": (["LOCK TABLE t"], ["SELECT 1"]),
    "backfill-at-once": (
        ["UPDATE t SET a = 1", "DELETE FROM t WHERE a = 1"],
        ["CREATE TABLE u (a bigint); UPDATE u SET a = 1", "INSERT INTO t VALUES (1)"],
    ),
    # rewrites
    "change-type": (["ALTER TABLE t ALTER a TYPE bigint"], ["ALTER TABLE t ADD b bigint"]),
    "volatile-default": (
        ["ALTER TABLE t ADD b float DEFAULT random()", "ALTER TABLE t ADD b timestamptz DEFAULT clock_timestamp()"],
        ["ALTER TABLE t ADD b int DEFAULT 1", "ALTER TABLE t ADD b timestamptz DEFAULT now()",
         "ALTER TABLE t ADD b float; ALTER TABLE t ALTER b SET DEFAULT random()"],
    ),
    "stored-generated-column": (
        ["ALTER TABLE t ADD b int GENERATED ALWAYS AS (a + 1) STORED"],
        ["ALTER TABLE t ADD b int GENERATED ALWAYS AS (a + 1) VIRTUAL"],
    ),
    "serial-column": (
        ["ALTER TABLE t ADD b bigserial", "ALTER TABLE t ADD b bigint GENERATED ALWAYS AS IDENTITY"],
        ["ALTER TABLE t ADD b bigint"],
    ),
    "storage-rewrite": (
        ["CLUSTER t", "ALTER TABLE t SET UNLOGGED", "ALTER TABLE t SET TABLESPACE x",
         "ALTER TABLE t SET ACCESS METHOD heap"],
        ["ALTER TABLE t SET (fillfactor = 70)"],
    ),
    "alter-domain-constraint": (["ALTER DOMAIN d ADD CHECK (VALUE > 0)"], ["ALTER DOMAIN d DROP DEFAULT"]),
    # compatibility
    "rename-column": (["ALTER TABLE t RENAME a TO b"], ["ALTER TABLE t RENAME CONSTRAINT a TO b"]),
    "rename-table": (["ALTER TABLE t RENAME TO u"], ["ALTER INDEX i RENAME TO j"]),
    "rename-object": (["ALTER VIEW v RENAME TO w", "ALTER SEQUENCE s RENAME TO r"], ["ALTER INDEX i RENAME TO j"]),
    "drop-column": (["ALTER TABLE t DROP COLUMN a"], ["CREATE TABLE u (a int, b int); ALTER TABLE u DROP COLUMN a"]),
    "drop-table": (["DROP TABLE t"], ["CREATE TABLE u (a int); DROP TABLE u"]),
    "drop-object": (["DROP VIEW v", "DROP TYPE y", "DROP FUNCTION f()", "DROP TRIGGER r ON t", "DROP SEQUENCE s"], []),
    "required-column": (
        ["ALTER TABLE t ADD b int NOT NULL"],
        ["ALTER TABLE t ADD b int NOT NULL DEFAULT 0", "ALTER TABLE t ADD b int"],
    ),
    "truncate": (["TRUNCATE t", "TRUNCATE t CASCADE"], ["CREATE TABLE u (); TRUNCATE u"]),
    "rename-enum-value": (["ALTER TYPE e RENAME VALUE 'a' TO 'b'"], ["ALTER TYPE e ADD VALUE 'c' AFTER 'a'"]),
    "disable-trigger": (["ALTER TABLE t DISABLE TRIGGER ALL"], ["ALTER TABLE t ENABLE TRIGGER r"]),
    "replica-identity": (["ALTER TABLE t REPLICA IDENTITY FULL"], []),
    "rights": (
        ["REVOKE SELECT ON t FROM x", "ALTER TABLE t OWNER TO x",
         "ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO x"],
        ["GRANT SELECT ON t TO x"],
    ),
    "replace-object": (["CREATE OR REPLACE VIEW v AS SELECT 1"], ["CREATE VIEW v AS SELECT 1"]),
    # advice
    "char-column": (["CREATE TABLE u (a char(3))"], ["CREATE TABLE u (a text)"]),
    "varchar-column": (["CREATE TABLE u (a varchar(3))"], ["CREATE TABLE u (a varchar)"]),
    "naive-timestamp": (["ALTER TABLE t ADD b timestamp"], ["ALTER TABLE t ADD b timestamptz"]),
    "narrow-integer": (["CREATE TABLE u (a int)"], ["CREATE TABLE u (a bigint)"]),
    "serial-type": (["CREATE TABLE u (a bigserial)"], ["CREATE TABLE u (a bigint)"]),
    "json-column": (["CREATE TABLE u (a json)"], ["CREATE TABLE u (a jsonb)"]),
    "domain-with-constraint": (["CREATE DOMAIN d AS int CHECK (VALUE > 0)"], ["CREATE DOMAIN d AS int"]),
    "drop-not-null": (["ALTER TABLE t ALTER a DROP NOT NULL"], []),
    "change-default": (["ALTER TABLE t ALTER a SET DEFAULT 1", "ALTER TABLE t ALTER a DROP DEFAULT"], []),
    "drop-constraint": (["ALTER TABLE t DROP CONSTRAINT c"], []),
    "enum-value-order": (["ALTER TYPE e ADD VALUE 'c'"], ["ALTER TYPE e ADD VALUE 'c' BEFORE 'a'"]),
    "wide-index": (["CREATE INDEX i ON t (a, b, c, d)"], ["CREATE UNIQUE INDEX i ON t (a, b, c, d)"]),
    "opaque-program": (["DO $$ BEGIN END $$"], ["SELECT 1"]),
    "new-restriction": (["ALTER TABLE t ENABLE ROW LEVEL SECURITY", "CREATE POLICY p ON t"], []),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_a_hazard_is_found_where_it_is_and_nowhere_else(name: str) -> None:
    dangerous, safe = RULES[name]
    [rule] = [each for each in rules() if each.name == name]
    for text in dangerous:
        assert check(text) is None
        found = [finding for finding in examine([text]) if finding.rule == name]
        assert found, text
        assert found[0].when == rule.when
        assert found[0].remedy
    for text in safe:
        assert name not in {finding.rule for finding in examine([text])}, text


def test_every_rule_has_its_cases_and_its_line_in_the_table() -> None:
    hazards = {rule.name for rule in rules() if rule.when != "promise"}
    assert hazards == set(RULES)
    page = Path("docs/migrations.md").read_text()
    for rule in rules():
        assert f"| `{rule.name}` |" in page
        for name in (*rule.squawk, *rule.strong):
            assert f"`{name}`" in page, name


@pytest.mark.parametrize("text", ["ALTER TABLE t DROP COLUMN a", "DROP TABLE t", "DROP VIEW v"])
def test_what_old_code_needs_may_go_once_it_is_gone(text: str) -> None:
    assert examine([text], phase="pre")
    assert not examine([text], phase="post")
