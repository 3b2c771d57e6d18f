"""Backfills on real servers: in batches, once each whatever ends the run, and behind replicas."""

from __future__ import annotations

import json
import signal
from dataclasses import replace

import psycopg
import pytest

from shardkit.errors import MigrationError, RefusedError, TryAgainError
from shardkit.local import LocalCluster
from shardkit.ops.migrate import plan, status
from shardkit.testing import wait_until
from tests.fixtures.site import ALPHA, BETA, QUICK, Site

pytestmark = pytest.mark.integration

TABLE = (
    'op.create_table("p", sa.Column("a", sa.Text, primary_key=True), '
    'sa.Column("b", sa.BigInteger, primary_key=True), '
    'sa.Column("n", sa.Integer, server_default="0"))'
)
# Twice on one row would show.
FILL = 'from shardkit.migrations import backfill; backfill("UPDATE p SET n = n + 1 WHERE b > 10")'
ROWS = 2000


@pytest.fixture
def filled(site: Site) -> Site:
    """Two thousand rows in each logical shard of the first server, and a revision to come."""
    site.write("r1", TABLE)
    assert site.apply().error is None
    with site.admin("alpha") as connection:
        for n in ALPHA:
            connection.execute(
                f"INSERT INTO shard_{n:04d}.p SELECT 'é''' || i % 7, i "
                f"FROM generate_series(1, {ROWS}) AS i".encode()
            )
    site.write("r2", FILL, "r1")
    return site


def counts(site: Site, number: int) -> list[tuple[int, int]]:
    """Return how many rows have been written how often."""
    with site.admin("alpha") as connection:
        return connection.execute(
            f"SELECT n, count(*) FROM shard_{number:04d}.p GROUP BY 1 ORDER BY 1".encode()
        ).fetchall()


def walked(site: Site) -> int:
    """Return how many rows the ledgers say that the backfill has gone through."""
    total = 0
    with site.admin("alpha") as connection:
        for n in ALPHA:
            row = connection.execute(
                f"SELECT position ->> 'walked' FROM shard_{n:04d}.shardkit_version "
                "WHERE revision = 'r2'".encode()
            ).fetchone()
            total += int(row[0] or 0) if row else 0
    return total


ALL = [(0, 10), (1, ROWS - 10)]


def test_a_backfill_reaches_every_row_once_in_batches(filled: Site) -> None:
    batches: list[tuple[str, str, int]] = []
    outcome = filled.apply(on_rows=lambda *each: batches.append(each))
    assert outcome.error is None
    assert all(counts(filled, n) == ALL for n in ALPHA)
    assert outcome.filled["alpha"] == {"r2": 4 * (ROWS - 10)}
    assert len([each for each in batches if each[0] == "alpha"]) > 8, "several a logical shard"
    assert max(rows for _, _, rows in batches) <= ROWS // 2
    assert status(filled.topology, filled.revisions()).is_current
    assert walked(filled) == 0, "nothing is left of it in the ledger"
    assert filled.apply().plan.n_work == 0


def test_a_killed_backfill_goes_on_where_it_was(filled: Site) -> None:
    run = filled.command("apply", "--backfill-rate", "500")
    wait_until(lambda: walked(filled) > 0, 30.0, "some batches are done")
    run.send_signal(signal.SIGKILL)
    run.communicate(timeout=60)
    before = walked(filled)
    assert 0 < before < 4 * ROWS
    outcome = filled.apply(replace(QUICK, patience=30.0))
    assert outcome.error is None
    assert all(counts(filled, n) == ALL for n in ALPHA), "each row once"
    assert 0 < outcome.filled["alpha"]["r2"] < 4 * (ROWS - 10), "and not from the start"


def test_an_interrupted_backfill_says_what_is_left(filled: Site) -> None:
    run = filled.command("apply", "--backfill-rate", "500", "--json")
    wait_until(lambda: walked(filled) > 0, 30.0, "some batches are done")
    run.send_signal(signal.SIGINT)
    output, errors = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "Traceback" not in errors
    found = json.loads(output)
    assert found["interrupted"]
    assert found["left"]["alpha"] > 0
    [begun, _] = [entry.begun for entry in status(filled.topology, filled.revisions()).physical]
    assert begun
    assert 1 <= begun["r2"] <= len(ALPHA)
    assert filled.apply(replace(QUICK, patience=30.0)).error is None
    assert all(counts(filled, n) == ALL for n in ALPHA)


def test_a_backfill_waits_for_replicas_and_keeps_what_it_has(
    filled: Site, local_cluster: LocalCluster
) -> None:
    replica = local_cluster.superuser_dsn("alpha_1")
    with psycopg.connect(replica, autocommit=True) as connection:
        connection.execute("SELECT pg_wal_replay_pause()")
        try:
            limits = replace(QUICK, max_lag_bytes=50_000, lag_patience=0.2)
            outcome = filled.apply(limits)
            assert isinstance(outcome.error, TryAgainError)
            assert "bytes of log behind" in (outcome.halted or "")
            assert len(ALPHA) * ALL[1][1] > sum(outcome.filled.get("alpha", {}).values())
        finally:
            connection.execute("SELECT pg_wal_replay_resume()")
    assert filled.apply().error is None
    assert all(counts(filled, n) == ALL for n in ALPHA)


def test_a_row_that_somebody_holds_is_waited_for_briefly(filled: Site) -> None:
    with filled.admin("alpha") as holder, holder.transaction():
        holder.execute("SELECT * FROM shard_0001.p WHERE b = 1999 FOR UPDATE")
        outcome = filled.apply()
        assert isinstance(outcome.error, TryAgainError)
        assert set(outcome.laggards) == {1}
    assert filled.apply().done == {"alpha": (1,), "beta": ()}
    assert counts(filled, 1) == ALL


def test_a_table_without_a_key_is_named_and_another_statement_refused(filled: Site) -> None:
    with filled.admin("alpha") as connection:
        connection.execute("ALTER TABLE shard_0000.p DROP CONSTRAINT p_pkey")
    outcome = filled.apply()
    assert isinstance(outcome.error, MigrationError)
    assert "no primary key" in str(outcome.laggards[0])
    filled.write("r2", FILL.replace("UPDATE p SET n = n + 1 WHERE b > 10", "SELECT 1"), "r1")
    with pytest.raises(MigrationError, match="one UPDATE or one DELETE"):
        filled.revisions()


def test_writing_a_large_table_at_once_is_refused_with_the_way_out(filled: Site) -> None:
    filled.write("r2", 'op.execute("UPDATE p SET n = 1")', "r1")
    with pytest.raises(RefusedError) as caught:
        filled.apply(replace(QUICK, small_bytes=0))
    assert "shardkit.migrations" in str(caught.value)


def test_a_plan_shows_the_statement_and_new_logical_shards_run_it_at_once(site: Site) -> None:
    site.write("r1", TABLE)
    site.write("r2", FILL, "r1")
    [_, revision] = plan(site.topology, site.revisions()).pending
    assert "in batches of at most 10000 rows" in revision.statements[0]
    outcome = site.apply()
    assert outcome.error is None
    assert outcome.done == {"alpha": ALPHA, "beta": BETA}
