"""Drift: what an administrator's hand leaves behind is found, and nothing else."""

from __future__ import annotations

import json

import pytest
from sqlalchemy import BigInteger, Column, MetaData, Table, Text

from shardkit.ops.drift import drift
from tests.fixtures.site import ALPHA, BETA, Site

pytestmark = pytest.mark.integration

# Where, what, the object it concerns, and how that should be.
HANDS = [
    (0, "ALTER TABLE t ADD b int", ("column", "t.b"), None),
    (1, "ALTER TABLE t ALTER a TYPE int", ("column", "t.a"), "bigint NOT NULL"),
    (2, "ALTER TABLE t ALTER a SET DEFAULT 5", ("column", "t.a"), "bigint NOT NULL"),
    (0, "CREATE INDEX i ON t (a)", ("index", "i"), None),
    (
        3,
        "ALTER TABLE t DROP CONSTRAINT t_pkey",
        ("index", "t_pkey"),
        "CREATE UNIQUE INDEX t_pkey ON t USING btree (a)",
    ),
    (4, "ALTER TABLE t ADD CONSTRAINT c CHECK (a > 0)", ("constraint", "t.c"), None),
    (0, "CREATE TABLE u ()", ("table", "u"), None),
    (5, "DROP TABLE t", ("column", "t.a"), "bigint NOT NULL"),
    (0, "CREATE TYPE e AS ENUM ('x')", ("type", "e"), None),
    (1, "CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'", ("function", "f()"), None),
    (1, "CREATE VIEW v AS SELECT a FROM t", ("table", "v"), None),
    (2, "CREATE SEQUENCE s", ("sequence", "s"), None),
    (2, "CREATE POLICY p ON t USING (a > 0)", ("policy", "t.p"), None),
    (3, "GRANT SELECT ON t TO PUBLIC", ("grant", "t to public"), None),
    (
        4,
        "REVOKE DELETE ON t FROM shardkit_app",
        ("grant", "t to shardkit_app"),
        "DELETE INSERT SELECT UPDATE",
    ),
    (
        6,
        "CREATE TRIGGER g BEFORE UPDATE ON t FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()",
        ("trigger", "t.g"),
        None,
    ),
    (6, "ALTER TABLE t ENABLE ROW LEVEL SECURITY", ("table", "t"), None),
    (7, "DROP TABLE shardkit_directory", ("table", "shardkit_directory"), None),
]


def test_a_migrated_cluster_has_no_drift(site: Site) -> None:
    site.apply()
    found = drift(site.topology, site.revisions())
    assert found.differences == ()
    assert not found.errors
    digests = [*found.fingerprints["alpha"], *found.fingerprints["beta"]]
    assert len(set(digests)) == 1, "every logical shard is the same"
    assert found.fingerprints["beta"][digests[0]] == BETA
    with site.admin("alpha") as connection:
        row = connection.execute("SELECT to_regnamespace('shard_9999')").fetchone()
        assert row == (None,), "nothing is left of the comparison"


def test_every_hand_made_change_is_found_where_it_is(site: Site) -> None:
    site.apply()
    for number, statement, _, _ in HANDS:
        with site.admin("alpha" if number in ALPHA else "beta") as connection:
            connection.execute(f"SET search_path = shard_{number:04d}".encode())
            connection.execute(statement.encode())
    found = drift(site.topology, site.revisions()).differences
    for number, statement, (kind, name), expected in HANDS:
        hits = [d for d in found if (d.kind, d.name) == (kind, name) and number in d.logical_shards]
        assert hits, statement
        assert hits[0].physical == ("alpha" if number in ALPHA else "beta")
        assert hits[0].expected == expected or expected is None
        assert hits[0].expected != hits[0].found


def test_a_logical_shard_that_is_behind_is_compared_with_what_it_has(site: Site) -> None:
    site.apply()
    site.write("r2", 'op.add_column("t", sa.Column("b", sa.Text))', "r1")
    found = drift(site.topology, site.revisions())
    assert found.differences == ()


def test_models_that_say_something_else_are_named(site: Site) -> None:
    site.apply()
    metadata = MetaData()
    Table(
        "t",
        metadata,
        Column("a", BigInteger, primary_key=True, autoincrement=False),
        Column("b", Text),
    )
    found = drift(site.topology, site.revisions(), metadata=metadata)
    [difference] = found.differences
    assert (difference.physical, difference.kind, difference.name) == ("models", "column", "t.b")
    assert (difference.expected, difference.found) == ("text", None)


def test_the_command_prints_a_diff_and_ends_with_one(site: Site) -> None:
    site.apply()
    code, output, errors = site.run("drift")
    assert (code, errors) == (0, "")
    assert "8 logical shards, 1 fingerprints, 0 differences" in output
    with site.admin("alpha") as connection:
        for n in ALPHA[1:3]:
            connection.execute(f'ALTER TABLE shard_{n:04d}.t ADD "\x1b[31m" int'.encode())
    code, output, _ = site.run("drift")
    assert code == 1
    assert "alpha logical shards 1-2: column t." in output
    assert "\x1b" not in output
    code, output, _ = site.run("drift", "--json")
    assert code == 1
    assert json.loads(output)["differences"][0]["logical_shards"] == [1, 2]
