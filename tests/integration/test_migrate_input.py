"""Bad input to `shardkit migrate`: an exit code as fixed, a line that says what to do, no traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from app.tables import Base
from shardkit.cli import main
from shardkit.ops.drift import drift
from shardkit.ops.migrate import load_revisions, plan
from shardkit.testing import wait_until
from tests.fixtures.site import Site

pytestmark = pytest.mark.integration

COLUMN = 'op.add_column("t", sa.Column("b", sa.Text))'


def ended(run: subprocess.Popen[str]) -> tuple[int, str]:
    _, errors = run.communicate(timeout=90)
    assert "Traceback" not in errors
    return run.returncode, errors


def n_done(site: Site) -> int:
    both = site.ledger("alpha") | site.ledger("beta")
    return sum("r2" in has for has in both.values())


@pytest.mark.parametrize(
    ("body", "code", "why"),
    [
        ('op.execute("COMMIT")', 1, "controls the transaction"),
        ('op.execute("SET search_path = public")', 1, "search_path"),
        ('op.execute("CREATE TABLE shard_0001.x ()")', 1, "one logical shard"),
        ('op.execute("CREATE TABL x ()")', 1, "not SQL"),
        ("1 / 0", 1, "cannot be written as plain SQL"),
    ],
)
def test_a_revision_that_cannot_run_is_named(
    site: Site, capsys: pytest.CaptureFixture[str], body: str, code: int, why: str
) -> None:
    site.write("r2", body, "r1")
    found, _, errors = here(capsys, site, "apply")
    assert found == code
    assert "r2" in errors
    assert why in errors
    assert site.ledger("alpha") == {}


def test_two_heads_a_missing_file_and_one_that_is_no_text(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.write("r2", "pass", "r1")
    site.write("r3", "pass", "r1")
    code, _, errors = here(capsys, site, "plan")
    assert (code, "2 heads" in errors) == (1, True)
    (site.folder / "r3.py").unlink()
    (site.folder / "r1.py").unlink()
    code, _, errors = here(capsys, site, "plan")
    assert (code, "r1" in errors) == (1, True)
    (site.folder / "r1.py").write_bytes(b"\xff\xfe\x00")
    code, _, errors = here(capsys, site, "plan")
    assert (code, "cannot be loaded" in errors) == (1, True)


def test_hostile_text_does_not_steer_the_terminal(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.write("r2", "op.execute(\"COMMENT ON TABLE t IS '\\x1b[2J\\u202e'\")", "r1")
    code, output, errors = here(capsys, site, "plan")
    assert code == 0, errors
    assert "\x1b" not in output
    assert "\u202e" not in output


def test_a_reader_that_went_away_is_no_fault(site: Site) -> None:
    site.apply()
    ends = os.pipe()
    os.close(ends[0])
    for command in ("plan", "status", "drift"):
        run = subprocess.Popen(
            [
                *(sys.executable, "-m", "shardkit", "migrate", command),
                *("--config", str(site.config), "--migrations", str(site.folder)),
            ],
            stdout=ends[1],
            stderr=subprocess.PIPE,
            text=True,
        )
        site.started.append(run)
        _, errors = run.communicate(timeout=60)
        assert "Traceback" not in errors
        assert "Exception" not in errors
    os.close(ends[1])


def test_an_interrupt_and_another_one_end_cleanly(site: Site) -> None:
    site.apply()
    site.write("r2", COLUMN, "r1")
    with site.admin("alpha") as holder, holder.transaction():
        holder.execute("SELECT * FROM shard_0002.t")
        run = site.command("apply", "--lock-attempts", "1000", "--connections", "1")
        wait_until(lambda: n_done(site) >= 6, 30.0, "it waits for the lock")
        run.send_signal(signal.SIGINT)
        run.send_signal(signal.SIGINT)
        code, _ = ended(run)
    assert code in {130, -signal.SIGINT}
    assert site.apply().error is None


def test_the_application_and_its_revisions_agree(site: Site) -> None:
    revisions = load_revisions("app:migrations", folder=Path())
    decided = plan(site.topology, revisions)
    assert not decided.dangers
    assert decided.pending == revisions
    site.folder.joinpath("r1.py").unlink()
    for revision in revisions:
        source = revision.path.read_text()
        (site.folder / revision.path.name).write_text(source)
    assert site.apply().error is None
    found = drift(site.topology, site.revisions(), metadata=Base.metadata)
    assert not found.errors
    assert [(d.kind, d.name, d.expected, d.found) for d in found.differences] == []


def here(capsys: pytest.CaptureFixture[str], site: Site, command: str, *given: str) -> Ended:
    """Run a command in this process: its exit code, standard output and standard error."""
    options = ["--config", str(site.config), "--migrations", str(site.folder)]
    code: object = 0
    try:
        # What is given twice counts the last time.
        main(["migrate", command, *options, *given])
    except SystemExit as ending:
        code = ending.code
    output, errors = capsys.readouterr()
    assert "Traceback" not in errors
    return code, output, errors


Ended = tuple[object, str, str]


def test_an_edited_revision_and_an_older_command_are_refused(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.apply()
    original = (site.folder / "r1.py").read_text()
    site.write("r1", 'op.create_table("t", sa.Column("other", sa.BigInteger))')
    code, _, errors = here(capsys, site, "apply")
    assert (code, "r1 was edited" in errors, "hint:" in errors) == (3, True, True)
    (site.folder / "r1.py").unlink()
    code, _, errors = here(capsys, site, "apply")
    assert (code, "unknown here" in errors) == (3, True)
    (site.folder / "r1.py").write_text(original)
    with site.admin("beta") as connection:
        connection.execute("COMMENT ON SCHEMA shardkit IS 'shardkit format 999 x'")
    code, _, errors = here(capsys, site, "apply")
    assert (code, "newer shardkit" in errors) == (3, True)


EARLY = {
    "no configuration": (["plan", "--config", "/nowhere/shardkit.toml"], 2),
    "no revisions": (["apply", "--migrations", "/nowhere"], 2),
    "no such option": (["apply", "--nonsense"], 2),
    "a wrong wave": (["apply", "--wave", "9,1"], 2),
    "no such revision": (["downgrade", "nothing"], 3),
    "a revision that cannot run": (["drift"], 1),
}


@pytest.mark.parametrize("case", EARLY)
def test_json_is_one_document_whatever_goes_wrong(
    site: Site, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, code = EARLY[case]
    if code == 1:
        site.write("r2", 'op.execute("COMMIT")', "r1")
    found, output, _ = here(capsys, site, arguments[0], *arguments[1:], "--json")
    assert found == code
    document = json.loads(output)
    assert document["exit_code"] == code
    assert document["error"]["message"]


def test_hostile_names_are_shown_as_what_they_are(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    site.apply()
    with site.admin("alpha") as connection:
        connection.execute('CREATE TABLE shard_0000."\x1b[2Jx\u202e" (a int)')
        connection.execute(
            "INSERT INTO shardkit.ddl_locks VALUES (1, E'\\x1b[31mme', E'\\x1b]0;why')"
        )
    for command in ("drift", "plan", "status", "apply"):
        _, output, errors = here(capsys, site, command)
        assert not set("\x1b\u202e") & set(output + errors), command
    site.write("r2", "pass", "r1")
    text = (site.folder / "r2.py").read_text()
    (site.folder / "r2.py").write_text(text.replace("'r2'", "'r2\\x1b[2J'"))
    code, _, errors = here(capsys, site, "plan")
    assert (code, "cannot be printed" in errors, "\x1b" in errors) == (1, True, False)


def test_a_long_lock_timeout_is_warned_of_and_a_longer_one_refused(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, errors = here(capsys, site, "apply", "--lock-timeout", "5")
    assert (code, "warning: each attempt may hold up" in errors) == (0, True)
    code, _, _ = here(capsys, site, "apply", "--lock-timeout", "60")
    assert code == 2


def test_a_server_that_goes_away_is_a_line(site: Site) -> None:
    """While the run holds its session lock and waits for a table."""
    site.apply()
    site.write("r2", COLUMN, "r1")
    with site.admin("alpha") as holder, holder.transaction():
        holder.execute("SELECT * FROM shard_0000.t")
        run = site.command("apply", "--lock-attempts", "1000")
        wait_until(lambda: n_done(site) >= 7, 60.0, "it waits for the lock")
        with site.admin("alpha") as other:
            other.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE application_name = 'shardkit migrate' AND datname = current_database()"
            )
        code, errors = ended(run)
    assert code == 1
    assert "went away" in errors
    assert site.apply().error is None
