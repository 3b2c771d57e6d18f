"""Roll-outs, phases, steps and dangers of migrations, on real servers."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import psycopg
import pytest

from shardkit.errors import MigrationError, RefusedError, TryAgainError
from shardkit.local import LocalCluster
from shardkit.ops.migrate import plan, status
from shardkit.testing import wait_until
from tests.fixtures.site import ALPHA, BETA, QUICK, Site

pytestmark = pytest.mark.integration

COLUMN = 'op.add_column("t", sa.Column("b", sa.Text))'
WAVES = (0.0, 25.0, 50.0, 100.0)


def done(site: Site, revision: str) -> set[int]:
    both = site.ledger("alpha") | site.ledger("beta")
    return {n for n, has in both.items() if revision in has}


def filled(site: Site, rows: int = 1) -> None:
    for physical, shards in (("alpha", ALPHA), ("beta", BETA)):
        with site.admin(physical) as connection:
            for n in shards:
                connection.execute(
                    f"INSERT INTO shard_{n:04d}.t SELECT generate_series(1, {rows})".encode()
                )


def test_a_roll_out_reaches_one_logical_shard_first_and_all_in_the_end(site: Site) -> None:
    site.apply()
    site.write("r2", COLUMN, "r1")
    seen: list[tuple[str, set[int]]] = []
    outcome = site.apply(
        waves=WAVES, on_wave=lambda wave: seen.append((wave.name, done(site, "r2")))
    )
    assert outcome.error is None
    names = [name for name, _ in seen]
    assert names == ["canary", "25 %", "50 %", "100 %"]
    assert [len(before) for _, before in seen] == [0, 1, 2, 4]
    assert done(site, "r2") == {*ALPHA, *BETA}


def test_a_roll_out_halts_where_data_does_not_fit_and_goes_on_once_it_does(site: Site) -> None:
    site.apply()
    with site.admin("alpha") as connection:
        connection.execute("INSERT INTO shard_0001.t VALUES (-1)")
    site.write("r2", 'op.create_check_constraint("c", "t", "a > 0")', "r1")
    outcome = site.apply(waves=WAVES)
    assert isinstance(outcome.error, MigrationError)
    assert outcome.halted is not None
    assert "wave 50 %" in outcome.halted
    assert set(outcome.laggards) == {1}
    assert 3 not in done(site, "r2"), "the last wave did not begin"
    with site.admin("alpha") as connection:
        connection.execute("DELETE FROM shard_0001.t")
    assert site.apply(waves=WAVES).error is None
    assert status(site.topology, site.revisions()).is_current


def test_a_roll_out_halts_where_a_lock_is_held(site: Site) -> None:
    site.apply()
    site.write("r2", COLUMN, "r1")
    with site.admin("alpha") as holder, holder.transaction():
        holder.execute("SELECT * FROM shard_0000.t")
        outcome = site.apply(waves=WAVES)
    assert isinstance(outcome.error, TryAgainError)
    assert "wave canary" in (outcome.halted or "")
    assert done(site, "r2") == set()


def test_a_run_waits_for_replicas_and_halts_when_they_stay_behind(
    site: Site, local_cluster: LocalCluster
) -> None:
    site.apply()
    site.write("r2", COLUMN, "r1")
    replica = local_cluster.replicas("alpha")[0]
    dsn = local_cluster.superuser_dsn(replica.name, "postgres")
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("SELECT pg_wal_replay_pause()")
        try:
            filled(site, 100)
            limits = replace(QUICK, max_lag_bytes=0, lag_patience=0.2)
            outcome = site.apply(limits, waves=WAVES)
            assert isinstance(outcome.error, TryAgainError)
            assert "bytes of log behind" in (outcome.halted or "")
            assert not done(site, "r2") & {*ALPHA}
        finally:
            connection.execute("SELECT pg_wal_replay_resume()")
    assert site.apply().error is None


def test_a_batch_of_new_logical_shards_goes_on_beside_the_one_that_fails(site: Site) -> None:
    with site.admin("alpha") as holder, holder.transaction(force_rollback=True):
        holder.execute("CREATE SCHEMA shard_0001")
        outcome = site.apply(replace(QUICK, connections=1))
        assert set(outcome.laggards) == {1}
    assert outcome.done == {"alpha": (0, 2, 3), "beta": BETA}
    assert site.apply().done == {"alpha": (1,), "beta": ()}


def test_a_phase_stops_before_what_old_code_needs(site: Site) -> None:
    site.apply()
    site.write("r2", COLUMN, "r1")
    site.write("r3_post_drop", 'op.drop_column("t", "b")', "r2")
    site.write("r4", 'op.add_column("t", sa.Column("c", sa.Text))', "r3_post_drop")
    assert site.apply(phase="pre").error is None
    assert done(site, "r2") == {*ALPHA, *BETA}
    assert done(site, "r3_post_drop") == done(site, "r4") == set()
    assert site.apply(phase="pre").done == {"alpha": (), "beta": ()}
    assert not status(site.topology, site.revisions()).is_current
    filled(site)
    assert site.apply(phase="post").error is None
    assert status(site.topology, site.revisions()).is_current


def test_what_hurts_is_refused_where_there_are_rows_and_kept_with_its_reason(site: Site) -> None:
    site.apply()
    filled(site)
    body = 'op.drop_column("t", "a")'
    site.write("r2", body, "r1")
    with pytest.raises(RefusedError, match="drops a column") as caught:
        site.apply()
    assert "phase post" in str(caught.value)
    [danger] = plan(site.topology, site.revisions()).dangers
    assert (danger.finding.rule, danger.reason) == ("drop-column", None)
    code, _, errors = site.run("apply")
    assert code == 3
    assert "drop-column" in errors
    why = "nobody has read it since 2020"
    site.write("r2", f'{body}\n\n\nallow = {{"drop-column": "{why}"}}', "r1")
    assert site.apply().error is None
    with site.admin("beta") as connection:
        row = connection.execute(
            "SELECT overrides ->> 'drop-column' FROM shard_0005.shardkit_version "
            "WHERE revision = 'r2'"
        ).fetchone()
    assert row == (why,)


def test_a_large_table_is_not_indexed_while_writes_wait(site: Site) -> None:
    site.apply()
    filled(site, 10)
    site.write("r2", 'op.create_index("i", "t", ["a"])', "r1")
    with pytest.raises(RefusedError, match="builds an index"):
        site.apply(replace(QUICK, small_bytes=0))
    assert site.apply().error is None


def test_an_index_is_built_concurrently_beside_a_writer(site: Site) -> None:
    site.apply()
    filled(site, 10)
    site.write(
        "r2",
        f'{COLUMN}\n    op.create_index("i", "t", ["b"], postgresql_concurrently=True)\n'
        '    op.add_column("t", sa.Column("c", sa.Text))',
        "r1",
    )
    assert site.apply(replace(QUICK, small_bytes=0)).error is None
    with site.admin("alpha") as connection:
        rows = connection.execute(
            "SELECT bool_and(indisvalid), count(*) FROM pg_index AS i "
            "JOIN pg_class AS c ON c.oid = i.indexrelid WHERE c.relname = 'i'"
        ).fetchone()
        assert rows == (True, 4)
        left = connection.execute(
            "SELECT step, building FROM shard_0000.shardkit_version WHERE revision = 'r2'"
        ).fetchone()
        assert left == (None, None)
    assert site.apply().plan.n_work == 0


def test_an_index_that_failed_leaves_nothing_and_is_built_again(site: Site) -> None:
    site.apply()
    site.write("r2", COLUMN, "r1")
    assert site.apply().error is None
    with site.admin("beta") as connection:
        connection.execute("INSERT INTO shard_0006.t VALUES (1, 'x'), (2, 'x')")
    unique = 'op.create_index("i", "t", ["b"], unique=True, postgresql_concurrently=True)'
    site.write("r3", unique, "r2")
    outcome = site.apply()
    assert set(outcome.laggards) == {6}
    with site.admin("beta") as connection:
        assert connection.execute("SELECT to_regclass('shard_0006.i')").fetchone() == (None,)
        # As a crash leaves it: begun, and invalid.
        with suppress(psycopg.errors.UniqueViolation):
            connection.execute("CREATE UNIQUE INDEX CONCURRENTLY i ON shard_0006.t (b)")
        connection.execute("DELETE FROM shard_0006.t")
    assert site.apply().error is None
    with site.admin("beta") as connection:
        valid = connection.execute(
            "SELECT indisvalid FROM pg_index WHERE indexrelid = 'shard_0006.i'::regclass"
        ).fetchone()
        assert valid == (True,)


def test_a_revision_of_several_steps_goes_on_where_it_stopped(site: Site) -> None:
    site.write(
        "r1",
        'op.create_table("t", sa.Column("a", sa.BigInteger, primary_key=True))\n'
        '    op.create_table("u", sa.Column("a", sa.BigInteger, primary_key=True))',
    )
    site.apply()
    site.write(
        "r2",
        f'{COLUMN}\n    op.add_column("u", sa.Column("b", sa.Text))',
        "r1",
    )
    with site.admin("alpha") as holder, holder.transaction():
        holder.execute("SELECT * FROM shard_0002.u")
        outcome = site.apply()
        assert set(outcome.laggards) == {2}
    with site.admin("alpha") as connection:
        step = connection.execute(
            "SELECT step FROM shard_0002.shardkit_version WHERE revision = 'r2'"
        ).fetchone()
        assert step == (1,)
    assert status(site.topology, site.revisions()).physical[0].laggards == (2,)
    assert site.apply().error is None
    assert status(site.topology, site.revisions()).is_current


UNDO = """

def downgrade():
    op.drop_index("i", "t", postgresql_concurrently=True)
    op.drop_column("t", "b")
"""


def test_a_downgrade_goes_back_and_an_apply_forward_again(site: Site) -> None:
    site.apply()
    index = 'op.create_index("i", "t", ["b"], postgresql_concurrently=True)'
    site.write("r2", f"{COLUMN}\n    {index}\n{UNDO}", "r1")
    site.write("r3", 'op.execute("SELECT 1")\n\n\ndef downgrade(): pass', "r2")
    assert site.apply().error is None
    with site.admin("alpha") as holder, holder.transaction():
        holder.execute("SELECT * FROM shard_0002.t")
        run = site.command("downgrade", "r1", "--json")
        wait_until(lambda: not done(site, "r2") & {*BETA}, 30.0, "the other server is back")
        run.kill()
        run.communicate(timeout=60)
    code, output, errors = site.run("downgrade", "r1")
    assert code == 0, errors
    assert "undo r2" in output
    assert done(site, "r1") == {*ALPHA, *BETA}
    assert done(site, "r2") == done(site, "r3") == set()
    with site.admin("alpha") as connection:
        left = connection.execute("SELECT to_regclass('shard_0002.i')").fetchone()
        assert left == (None,)
    assert site.apply().error is None
    assert done(site, "r3") == {*ALPHA, *BETA}
    code, _, errors = site.run("downgrade", "nothing")
    assert code == 3
    assert "no revision" in errors


def test_a_newer_format_is_refused(site: Site) -> None:
    site.apply()
    with site.admin("alpha") as connection:
        connection.execute("COMMENT ON SCHEMA shardkit IS 'shardkit format 999 x'")
    with pytest.raises(RefusedError, match="newer shardkit"):
        site.apply()


def test_a_command_that_meets_many_logical_shards_names_its_waves(site: Site) -> None:
    site.apply()
    site.write("r2", COLUMN, "r1")
    code, output, errors = site.run("apply", "--wave", "canary,100", "--json")
    assert code == 0, errors
    assert '"halted": null' in output
    code, _, errors = site.run("apply", "--wave", "1,1")
    assert code == 2
    assert "Traceback" not in errors
    wait_until(lambda: len(done(site, "r2")) == 8, 20.0, "all are migrated")
