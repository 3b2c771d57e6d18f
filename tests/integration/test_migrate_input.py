"""Bad input to `shardkit migrate`: an exit code as fixed, a line that says what to do, no traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from app.tables import Base
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
def test_a_revision_that_cannot_run_is_named(site: Site, body: str, code: int, why: str) -> None:
    site.write("r2", body, "r1")
    found, errors = ended(site.command("apply"))
    assert found == code
    assert "r2" in errors
    assert why in errors
    assert site.ledger("alpha") == {}


def test_two_heads_a_missing_file_and_one_that_is_no_text(site: Site) -> None:
    site.write("r2", "pass", "r1")
    site.write("r3", "pass", "r1")
    code, errors = ended(site.command("plan"))
    assert (code, "2 heads" in errors) == (1, True)
    (site.folder / "r3.py").unlink()
    (site.folder / "r1.py").unlink()
    code, errors = ended(site.command("plan"))
    assert (code, "r1" in errors) == (1, True)
    (site.folder / "r1.py").write_bytes(b"\xff\xfe\x00")
    code, errors = ended(site.command("plan"))
    assert (code, "cannot be loaded" in errors) == (1, True)


def test_hostile_text_does_not_steer_the_terminal(site: Site) -> None:
    site.write("r2", "op.execute(\"COMMENT ON TABLE t IS '\\x1b[2J\\u202e'\")", "r1")
    run = site.command("plan")
    output, errors = run.communicate(timeout=60)
    assert run.returncode == 0, errors
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
