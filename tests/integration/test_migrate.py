"""Migrations on real servers: two physical shards, four logical shards each, a database a test."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import psycopg
import pytest

from shardkit.errors import MigrationError, RefusedError, TryAgainError
from shardkit.local import LocalCluster
from shardkit.ops import migrate
from shardkit.ops.migrate import plan, status
from shardkit.testing import wait_until
from tests.fixtures.site import ALPHA, BETA, QUICK, TABLE, Site

pytestmark = pytest.mark.integration

COLUMN = 'op.add_column("t", sa.Column("b", sa.Text))'


def test_a_fresh_cluster_is_made_whole_and_a_rerun_does_nothing(site: Site) -> None:
    outcome = site.apply()
    assert outcome.error is None
    assert outcome.done == {"alpha": ALPHA, "beta": BETA}
    assert site.ledger("alpha") == {n: ["r1"] for n in ALPHA}
    assert site.ledger("beta") == {n: ["r1"] for n in BETA}
    again = site.apply()
    assert again.plan.n_work == 0
    assert not any(part.admin for part in again.plan.physical)
    assert status(site.topology, site.revisions()).is_current


def test_a_later_revision_reaches_every_logical_shard(site: Site) -> None:
    site.apply()
    site.write("r2", COLUMN, "r1")
    found = status(site.topology, site.revisions())
    assert found.head == "r2"
    assert found.physical[0].at == {"r1": 4}
    assert found.physical[0].pending == {"r2": 4}
    assert found.physical[0].laggards == ALPHA
    decided = plan(site.topology, site.revisions())
    assert [revision.id for revision in decided.pending] == ["r2"]
    assert site.ledger("alpha")[0] == ["r1"], "a plan changes nothing"
    assert site.apply().error is None
    with site.app("beta") as connection:
        connection.execute("INSERT INTO shard_0007.t (a, b) VALUES (1, 'x')")


def test_the_application_role_writes_tables_and_never_the_ledger(site: Site) -> None:
    site.apply()
    with site.app("alpha") as connection:
        connection.execute("INSERT INTO shard_0000.t VALUES (1)")
        connection.execute("SELECT revision FROM shard_0000.shardkit_version")
        assert connection.execute("SELECT count(*) FROM shardkit.ownership").fetchone() == (4,)
        for statement in (
            "INSERT INTO shard_0000.shardkit_version (revision, checksum) VALUES ('x', 'x')",
            "UPDATE shard_0000.shardkit_id_state SET state = 0",
            "DELETE FROM shardkit.ownership",
            "DROP TABLE shard_0000.t",
            "CREATE TABLE shard_0000.x ()",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(statement)


def test_an_edited_revision_is_refused_and_changes_nothing(site: Site) -> None:
    site.apply()
    site.write("r1", TABLE.replace('"a"', '"c"'))
    site.write("r2", COLUMN, "r1")
    with pytest.raises(RefusedError, match="r1 was edited"):
        site.apply()
    assert site.ledger("alpha") == {n: ["r1"] for n in ALPHA}


def test_wrong_sql_names_its_revision_and_leaves_no_half_made_shard(site: Site) -> None:
    site.write("r2", 'op.execute("ALTER TABLE no_such_table ADD b int")', "r1")
    site.write("r3", "pass", "r2")
    error = site.apply().error
    assert isinstance(error, MigrationError)
    assert "revision r2" in str(error)
    assert "no_such_table" in str(error)
    assert site.ledger("alpha") == {}
    assert site.ledger("beta") == {}
    site.write("r2", COLUMN, "r1")
    assert site.apply().error is None
    assert site.ledger("beta") == {n: ["r1", "r2", "r3"] for n in BETA}


def test_a_dead_physical_shard_does_not_stop_the_other(
    site: Site, local_cluster: LocalCluster
) -> None:
    site.apply()
    site.write("r2", COLUMN, "r1")
    local_cluster.kill_server("beta_0")
    try:
        outcome = site.apply()
        assert set(outcome.failed) == {"beta"}
        assert outcome.done["alpha"] == ALPHA
        assert isinstance(outcome.error, MigrationError)
        assert "beta" in str(outcome.error)
        found = status(site.topology, site.revisions())
        assert found.physical[0].at == {"r2": 4}
        assert found.physical[1].error is not None
        code, _, errors = site.run("apply")
        assert code == 1
        assert "beta" in errors
        assert "Traceback" not in errors
    finally:
        local_cluster.start_server("beta_0")
    assert site.apply().done == {"alpha": (), "beta": BETA}


def test_a_lock_is_waited_for_briefly_and_again(site: Site) -> None:
    site.apply()
    site.write("r2", COLUMN, "r1")
    with site.admin("alpha") as holder:
        with holder.transaction():
            holder.execute("SELECT * FROM shard_0002.t")
            outcome = site.apply()
        assert isinstance(outcome.error, TryAgainError)
        assert set(outcome.laggards) == {2}
        assert str(holder.info.backend_pid) in str(outcome.laggards[2])
    assert outcome.done == {"alpha": (0, 1, 3), "beta": BETA}
    assert site.apply().done == {"alpha": (2,), "beta": ()}


def test_the_wait_ends_when_the_lock_is_released(site: Site) -> None:
    site.apply()
    site.write("r2", COLUMN, "r1")
    patient = replace(QUICK, lock_attempts=1000)
    outcomes: list[migrate.MigrationOutcome] = []
    with site.admin("alpha") as holder:
        with holder.transaction():
            holder.execute("SELECT * FROM shard_0002.t")
            runner = threading.Thread(target=lambda: outcomes.append(site.apply(patient)))
            runner.start()
            wait_until(
                lambda: len(done(site, "r2")) == 7, 20.0, "every other logical shard is done"
            )
        runner.join(30)
    assert outcomes[0].error is None


def test_a_second_runner_is_refused(site: Site) -> None:
    site.apply()
    site.write("r2", COLUMN, "r1")
    with site.admin("alpha") as holder, holder.transaction():
        holder.execute("SELECT * FROM shard_0000.t")
        first = site.command("apply", "--lock-attempts", "1000", "--lock-timeout", "0.05")
        wait_until(
            lambda: len(done(site, "r2")) == 7, 20.0, "the first runner has done what it can"
        )
        with pytest.raises(RefusedError, match="another"):
            site.apply()
        code, _, errors = site.run("apply")
        assert code == 3
        assert "another" in errors
        assert status(site.topology, site.revisions()).physical[0].laggards == (0,)
    first.communicate(timeout=60)
    assert first.returncode == 0
    assert len(done(site, "r2")) == 8


@pytest.mark.fault
@pytest.mark.parametrize("moment", ["creating", "migrating"])
def test_a_killed_run_is_continued_by_the_next(site: Site, moment: str) -> None:
    if moment == "migrating":
        site.apply()
        site.write("r2", COLUMN, "r1")
        hold, revision = "SELECT * FROM shard_0002.t", "r2"
    else:
        hold, revision = "CREATE SCHEMA shard_0002", "r1"
    with site.admin("alpha") as holder, holder.transaction(force_rollback=True):
        holder.execute(hold)
        run = site.command("apply", "--lock-attempts", "1000", "--connections", "1")
        wait_until(lambda: len(done(site, revision)) == 6, 20.0, "the run has come to the lock")
        run.send_signal(signal.SIGKILL)
        run.communicate(timeout=60)
    outcome = site.apply(replace(QUICK, patience=10.0))
    assert outcome.error is None
    # The server may still finish the transaction the killed run had sent.
    assert outcome.done["alpha"] in {(2, 3), (3,)}
    assert outcome.done["beta"] == ()
    assert len(done(site, revision)) == 8


def test_an_interrupt_finishes_what_is_under_way(site: Site) -> None:
    site.apply()
    site.write("r2", COLUMN, "r1")
    with site.admin("alpha") as holder, holder.transaction():
        holder.execute("SELECT * FROM shard_0002.t")
        run = site.command("apply", "--lock-attempts", "1000", "--connections", "1")
        wait_until(lambda: len(done(site, "r2")) == 6, 20.0, "the run has come to the lock")
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "Traceback" not in errors
    assert "alpha: 2 left" in errors
    assert site.apply().error is None


def test_a_server_of_another_cluster_is_refused(site: Site) -> None:
    site.apply()
    with site.admin("beta") as connection:
        connection.execute("UPDATE shardkit.identity SET cluster = 'other'")
    with pytest.raises(RefusedError, match="'other'"):
        site.apply()


def test_objects_shardkit_owns_are_completed_after_an_upgrade(site: Site) -> None:
    """A shardkit that owns more than the last one did runs its statements again."""
    site.apply()
    with site.admin("alpha") as connection:
        connection.execute("COMMENT ON SCHEMA shardkit IS 'shardkit of old'")
        connection.execute(
            "UPDATE shard_0001.shardkit_version SET checksum = 'old' WHERE revision = 'shardkit'"
        )
    decided = plan(site.topology, site.revisions())
    assert decided.physical[0].admin
    assert [work.logical_shard for work in decided.physical[0].work] == [1]
    assert site.apply().error is None
    assert plan(site.topology, site.revisions()).n_work == 0


def test_the_commands_speak_json_and_end_with_their_codes(site: Site) -> None:
    def run(*arguments: str) -> tuple[int | str, Any]:
        code, output, _ = site.run(*arguments, "--json")
        return code, json.loads(output)

    code, planned = run("apply", "--dry-run")
    assert code == 0
    assert planned["physical"]["alpha"]["create"] == [*ALPHA]
    assert planned == run("plan")[1]
    assert site.ledger("alpha") == {}
    code, outcome = run("apply")
    assert (code, outcome["done"]["beta"]) == (0, [*BETA])
    code, found = run("status")
    assert (code, found["current"], found["head"]) == (0, True, "r1")
    assert found["physical"]["alpha"]["at"] == {"r1": 4}


def done(site: Site, revision: str) -> list[int]:
    """Return the logical shards that have a revision."""
    both: Callable[[str], dict[int, list[str]]] = site.ledger
    return [n for p in ("alpha", "beta") for n, has in both(p).items() if revision in has]


REFERENCE = (
    'op.create_table("kinds", sa.Column("id", sa.Integer, primary_key=True), '
    'sa.Column("name", sa.Text, nullable=False), schema="reference")\n'
    '    op.create_index("kinds_name", "kinds", ["name"], unique=True, schema="reference")\n'
    "    op.execute(\"INSERT INTO reference.kinds VALUES (1, 'one')\")\n"
    '    op.add_column("t", sa.Column("kind", sa.Integer, sa.ForeignKey("reference.kinds.id")))'
)
UNTIE = 'op.drop_column("t", "kind")'
DROP = 'op.drop_table("kinds", schema="reference")'


def test_reference_tables_are_made_once_on_each_server_before_rows_refer_to_them(
    site: Site,
) -> None:
    site.apply()
    site.write("r2", REFERENCE, "r1")
    assert plan(site.topology, site.revisions()).physical[0].reference[0].id == "r2"
    assert status(site.topology, site.revisions()).physical[1].reference == ("r2",)
    assert site.apply().error is None
    assert status(site.topology, site.revisions()).is_current
    for physical, shard in (("alpha", 0), ("beta", 7)):
        with site.app(physical) as connection:
            connection.execute("INSERT INTO reference.kinds VALUES (2, 'two')")
            connection.execute(f"INSERT INTO shard_{shard:04d}.t VALUES (1, 2)".encode())
            with pytest.raises(psycopg.errors.ForeignKeyViolation):
                connection.execute(f"INSERT INTO shard_{shard:04d}.t VALUES (2, 3)".encode())
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute("DELETE FROM shardkit.reference_version")
    assert site.apply().plan.n_work == 0


def test_reference_tables_come_and_go_in_the_order_of_revisions(site: Site) -> None:
    """All of it at once, as on a new server, and as it came."""
    for revision, text, before in (
        ("r2", REFERENCE, "r1"), ("r3", COLUMN, "r2"), ("r4", UNTIE, "r3"), ("r5", DROP, "r4"),
    ):  # fmt: skip
        site.write(revision, text, before)
    outcome = site.apply()
    assert outcome.error is None
    assert outcome.done == {"alpha": ALPHA, "beta": BETA}, "each once"
    assert site.ledger("beta") == {n: ["r1", "r2", "r3", "r4", "r5"] for n in BETA}
    with site.app("beta") as connection:
        found = connection.execute("SELECT to_regclass('reference.kinds')").fetchone()
        assert found == (None,)


def test_a_wrong_reference_revision_is_named_and_an_edited_one_refused(site: Site) -> None:
    site.write("r2", 'op.execute("INSERT INTO reference.nothing VALUES (1)")', "r1")
    error = site.apply().error
    assert isinstance(error, MigrationError)
    assert "revision r2 of reference tables" in str(error)
    # The other server may have failed first, which stops this one where it is.
    assert all(found == ["r1"] for found in site.ledger("alpha").values()), "nothing beyond"
    site.write("r2", REFERENCE, "r1")
    assert site.apply().error is None
    site.write("r2", REFERENCE.replace("'one'", "'two'"), "r1")
    with pytest.raises(RefusedError, match="edited"):
        site.apply()
