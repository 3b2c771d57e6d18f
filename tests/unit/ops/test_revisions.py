"""Alembic revisions rendered to SQL, once, without a connection."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from shardkit.errors import ConfigurationError, MigrationError
from shardkit.ops.revisions import checksum, load, locate

Write = Callable[..., None]

TABLE = 'op.create_table("t", sa.Column("a", sa.Integer, server_default="5%% or %"))'


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a revision file: id, body of upgrade(), the revision before it."""

    def _write(id: str, body: str, down: str | None = None) -> None:  # noqa: A002
        tmp_path.joinpath(f"{id}.py").write_text(
            f'"""Revision {id}."""\nimport sqlalchemy as sa\nfrom alembic import op\n'
            f"revision = {id!r}\ndown_revision = {down!r}\n\n\ndef upgrade():\n    {body}\n"
        )

    return _write


def test_revisions_come_oldest_first_as_plain_sql(tmp_path: Path, write: Write) -> None:
    write("r2", 'op.add_column("t", sa.Column("b", sa.Text))', "r1")
    write("r1", TABLE)
    first, second = load(tmp_path)
    assert (first.id, second.id) == ("r1", "r2")
    assert first.summary == "Revision r1."
    assert first.statements[0].startswith("CREATE TABLE t (")
    assert "'5%% or %'" in first.statements[0]
    assert second.statements == ("ALTER TABLE t ADD COLUMN b TEXT",)


def test_the_versions_folder_of_alembic_is_found(tmp_path: Path, write: Write) -> None:
    write("r1", "pass")
    versions = tmp_path / "versions"
    versions.mkdir()
    (tmp_path / "r1.py").rename(versions / "r1.py")
    assert [revision.id for revision in load(tmp_path)] == ["r1"]


def test_an_empty_folder_has_no_revisions(tmp_path: Path) -> None:
    assert load(tmp_path) == ()


def test_the_checksum_ignores_layout_but_not_meaning(tmp_path: Path, write: Write) -> None:
    assert checksum(["CREATE TABLE t (\n  a int)"]) == checksum(["CREATE TABLE t ( a int);"])
    assert checksum(["SELECT 1"]) != checksum(["SELECT 2"])
    write("r1", 'op.execute("SELECT 1")')
    before = load(tmp_path)[0].checksum
    write("r1", 'op.execute("SELECT 2")')
    assert load(tmp_path)[0].checksum != before


@pytest.mark.parametrize(
    "body",
    [
        'op.get_bind().execute(sa.text("SELECT 1")).scalar()',
        'op.get_bind().execute(sa.text("SELECT :a"), {"a": 1})',
        "sa.inspect(op.get_bind()).get_table_names()",
        "raise RuntimeError",
        'op.execute("COMMIT")',
        'op.execute("SET search_path = public")',
        'op.execute("CREATE INDEX CONCURRENTLY ON t (a)")',
        'op.execute("CREATE TABL t ()")',
        'with op.get_context().autocommit_block(): op.execute("SELECT 1")',
        'op.create_table("t", sa.Column("a", sa.Integer), schema="shard_0001")',
    ],
)
def test_what_cannot_run_on_every_logical_shard_is_refused_by_name(
    tmp_path: Path, write: Write, body: str
) -> None:
    write("r1", body)
    with pytest.raises(MigrationError, match="revision r1") as caught:
        load(tmp_path)
    assert caught.value.hint


def test_an_edit_within_the_same_second_is_seen(
    tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    checksums = set()
    for number in (1, 2):
        write("r1", f'op.execute("SELECT {number}")')
        os.utime(tmp_path / "r1.py", (1_800_000_000, 1_800_000_000))
        checksums.add(load(tmp_path)[0].checksum)
    assert len(checksums) == 2
    assert not (tmp_path / "__pycache__").exists()


def test_several_heads_are_refused(tmp_path: Path, write: Write) -> None:
    write("r1", "pass")
    write("r2", "pass", "r1")
    write("r3", "pass", "r1")
    with pytest.raises(MigrationError, match="2 heads: r2, r3"):
        load(tmp_path)


@pytest.mark.parametrize("text", ["def broken(:", "import there_is_no_such_module", "1 / 0"])
def test_a_file_that_does_not_import_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "r1.py").write_text(text + "\nrevision = 'r1'\ndown_revision = None\n")
    with pytest.raises(MigrationError, match="revisions cannot be loaded"):
        load(tmp_path)


def test_a_missing_predecessor_is_named(tmp_path: Path, write: Write) -> None:
    write("r2", "pass", "r1")
    with pytest.raises(MigrationError, match="r1"):
        load(tmp_path)


def test_a_location_is_a_package_folder_or_a_path(tmp_path: Path) -> None:
    assert locate("shardkit:ops", folder=tmp_path).name == "ops"
    (tmp_path / "here").mkdir()
    assert locate("here", folder=tmp_path) == tmp_path / "here"


@pytest.mark.parametrize("location", ["nowhere", "no_such_package:x", "shardkit:nowhere", ":x"])
def test_a_location_that_leads_nowhere_is_a_configuration_error(
    tmp_path: Path, location: str
) -> None:
    with pytest.raises(ConfigurationError, match=r"migrations\.location"):
        locate(location, folder=tmp_path)


@pytest.mark.parametrize(
    ("statement", "is_about"),
    [
        ("CREATE TABLE reference.kinds (id int)", True),
        ('CREATE TABLE IF NOT EXISTS "reference".kinds (id int)', True),
        ("CREATE UNIQUE INDEX kinds_name ON reference.kinds (name)", True),
        ("-- why\nALTER TABLE ONLY reference.kinds ADD name text", True),
        ("COMMENT ON COLUMN reference.kinds.name IS 'x'", True),
        ("INSERT INTO reference.kinds VALUES (1)", True),
        ("DROP INDEX reference.kinds_name", True),
        ("CREATE TABLE t (kind int REFERENCES reference.kinds (id))", False),
        ("ALTER TABLE t ADD FOREIGN KEY(kind) REFERENCES reference.kinds (id)", False),
        ("INSERT INTO t SELECT id FROM reference.kinds", False),
        ("CREATE INDEX i ON t (kind)", False),
        ("UPDATE t SET a = 'reference.kinds'", False),
    ],
)
def test_statements_about_reference_tables_are_kept_apart(
    tmp_path: Path, statement: str, is_about: bool
) -> None:
    (tmp_path / "r1.py").write_text(
        f"from alembic import op\nrevision = 'r1'\ndown_revision = None\n"
        f"def upgrade():\n    op.execute({statement!r})\n"
    )
    (tmp_path / "script.py.mako").write_text("")
    [revision] = load(tmp_path)
    assert (bool(revision.reference), bool(revision.statements)) == (is_about, not is_about)


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ('phase = "later"', "phase"),
        ("allow = ['drop-column']", "dictionary"),
        ('allow = {"no-such-rule": "because it is so"}', "no rule"),
        ('allow = {"schema-change": "because it is so"}', "no rule"),
        ('allow = {"drop-column": ""}', "no reason"),
        ('allow = {"rename-table": "because it is so"}', "nothing in the revision"),
    ],
)
def test_an_override_names_a_broken_rule_and_a_reason(
    tmp_path: Path, write: Write, lines: str, why: str
) -> None:
    write("r1", f'op.drop_column("t", "a")\n\n\n{lines}')
    with pytest.raises(MigrationError, match=why):
        load(tmp_path)


def test_a_revision_keeps_its_phase_its_hazards_and_what_it_sets_aside(
    tmp_path: Path, write: Write
) -> None:
    why = "nobody has read it since 2020"
    write("r1", f'op.drop_column("t", "a")\n\n\nallow = {{"drop-column": "{why}"}}')
    write("r2_post_x", 'op.drop_column("t", "b")', "r1")
    first, second = load(tmp_path)
    assert (first.phase, second.phase) == ("pre", "post")
    assert first.allowed == {"drop-column": why}
    assert [finding.rule for finding in first.hazards] == ["drop-column"]
    assert not second.hazards
