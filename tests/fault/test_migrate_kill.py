"""A migration killed between any two statements: the next run ends clean, and nothing is left.

make migrate-kill kills before every statement, which takes minutes; unasked, every n-th, for as
long as some seconds last.
"""

from __future__ import annotations

import os

import pytest

from shardkit.clock import SYSTEM
from shardkit.ops.drift import drift
from shardkit.ops.migrate import Limits, status
from tests.fixtures.killer import kill_at
from tests.fixtures.site import ALPHA, Site

pytestmark = [pytest.mark.integration, pytest.mark.fault, pytest.mark.slow]

SECONDS = float(os.environ.get("SHARDKIT_KILL_SECONDS", "8"))
"""What the cells of one test may take together."""

STEP = int(os.environ.get("SHARDKIT_KILL_STEP", "11"))
"""Statements from one cell to the next."""

FEWEST = 4
"""Cells that run however slow the machine."""

PATIENT = Limits(lock_timeout=1.0, patience=30.0, connections=1, max_lag_bytes=None)

ALONE = (
    (
        'op.add_column("t", sa.Column("b", sa.Text))\n'
        '    op.create_index("i", "t", ["b"], postgresql_concurrently=True)\n'
        '    op.create_table("u", sa.Column("a", sa.BigInteger, primary_key=True))'
    ),
    (
        'op.add_column("t", sa.Column("c", sa.Text))\n'
        '    op.add_column("u", sa.Column("c", sa.Text))\n'
        '    op.execute("INSERT INTO u (a) VALUES (1)")'
    ),
    (
        'op.drop_index("i", "t", postgresql_concurrently=True)\n'
        '    op.create_check_constraint("k", "t", "a > 0", postgresql_not_valid=True)\n'
        '    op.execute("ALTER TABLE t VALIDATE CONSTRAINT k")\n'
        "    from shardkit.migrations import backfill\n"
        '    backfill("UPDATE t SET c = concat(c, 1)", rows=2)'
    ),
)
"""Steps outside of transactions, and a backfill of two batches and an end, so that each logical shard goes by itself."""

TOGETHER = (
    (
        'op.add_column("t", sa.Column("b", sa.Text))\n'
        '    op.create_table("u", sa.Column("a", sa.BigInteger, primary_key=True))'
    ),
    'op.add_column("t", sa.Column("c", sa.Text))\n    op.add_column("u", sa.Column("c", sa.Text))',
)
"""Transactions only, so that several logical shards share a round trip."""

BACK = """
DROP TABLE IF EXISTS {0}.u; DROP INDEX IF EXISTS {0}.i;
ALTER TABLE {0}.t DROP COLUMN IF EXISTS b, DROP COLUMN IF EXISTS c, DROP CONSTRAINT IF EXISTS k;
DELETE FROM {0}.shardkit_version WHERE revision NOT IN ('shardkit', 'r1');
COMMENT ON SCHEMA {0} IS NULL
"""


@pytest.mark.parametrize("bodies", [ALONE, TOGETHER], ids=["alone", "together"])
def test_a_run_killed_at_any_statement_is_finished_by_the_next(
    site: Site, bodies: tuple[str, ...]
) -> None:
    assert site.apply().error is None
    with site.admin("alpha") as connection:
        for number in ALPHA:
            rows = f"INSERT INTO shard_{number:04d}.t SELECT generate_series(2, 6)"
            connection.execute(rows.encode())
    for n, body in enumerate(bodies, start=2):
        site.write(f"r{n}", body, f"r{n - 1}")
    revisions = site.revisions()
    assert site.apply().error is None
    until = SYSTEM.monotonic() + SECONDS
    n_cells, turn, killed = 0, 1, True
    while killed and (n_cells < FEWEST or SYSTEM.monotonic() < until):
        with site.admin("alpha") as connection:
            for number in ALPHA:
                connection.execute(BACK.format(f"shard_{number:04d}").encode())
        killed = kill_at(site.topology, revisions, PATIENT, turn)
        outcome = site.apply(PATIENT)
        assert outcome.error is None, f"killed before statement {turn}"
        assert status(site.topology, revisions).is_current
        found = drift(site.topology, revisions)
        assert not found.errors
        assert found.differences == (), f"killed before statement {turn}"
        if bodies is ALONE:
            with site.admin("alpha") as connection:
                for number in ALPHA:
                    query = f"SELECT DISTINCT c FROM shard_{number:04d}.t"
                    assert connection.execute(query.encode()).fetchall() == [("1",)], "each once"
        n_cells += killed
        turn += STEP
    assert n_cells >= FEWEST
    print(f"{n_cells} cells, the last before statement {turn - STEP}")
