"""Which steps of which revisions share a transaction."""

from __future__ import annotations

from pathlib import Path

from shardkit.ops.backfills import tagged
from shardkit.ops.parts import Parts
from shardkit.ops.plan import PhysicalPlan, ShardWork
from shardkit.ops.revisions import Revision
from shardkit.topology import RoleNames


def revision(name: str, *statements: str) -> Revision:
    return Revision(name, "", Path("x.py"), statements, f"sum of {name}")


MAKE = revision("r1", "CREATE TABLE u (a bigint PRIMARY KEY)")
CHANGE = revision("r2", "ALTER TABLE u ADD b int", "CREATE INDEX i ON u (b)")
LIVE = revision("r3", "ALTER TABLE t ADD b int")
REFER = revision("r4", "CREATE TABLE v (a bigint REFERENCES t)")
FILL = revision("r5", tagged("UPDATE t SET b = 1", rows=10))
ROLES = RoleNames.of(app="app", admin="admin")

AGAIN = revision("r6", "ALTER TABLE u ADD c int")


def transactions(*revisions: Revision, done: int = 0) -> list[list[str]]:
    """Return the revisions of each transaction, of a logical shard that exists."""
    work = ShardWork(7, False, False, revisions, done)
    plan = PhysicalPlan("alpha", work=(work,), order=revisions)
    return [[each.id for each in part.revisions] for part in Parts(plan, ROLES).of(work, 0)]


def test_steps_on_tables_that_are_made_in_the_run_share_a_transaction() -> None:
    assert transactions(MAKE, CHANGE) == [["r1", "r2"]]
    assert transactions(MAKE, LIVE, CHANGE) == [["r1"], ["r3"], ["r2"]], (
        "t is live, and so is u then"
    )
    assert transactions(CHANGE, MAKE) == [["r2"], ["r1"]], "u is live"
    assert transactions(MAKE, REFER) == [["r1"], ["r4"]], "t is locked too"


def test_a_backfill_stands_alone_and_the_ledger_follows_it() -> None:
    assert transactions(LIVE, FILL, AGAIN) == [["r3"], ["r5"], ["r6"]]
    assert transactions(LIVE, FILL) == [["r3"], ["r5"], []], "the last one says that all is done"


def test_each_transaction_carries_its_ledger_rows_and_its_schema() -> None:
    work = ShardWork(7, False, False, (MAKE, CHANGE))
    plan = PhysicalPlan("alpha", work=(work,), order=(MAKE, CHANGE))
    [part] = Parts(plan, ROLES).of(work, 0)
    assert "('r1', 'sum of r1', NULL), ('r2', 'sum of r2', NULL)" in part.script
    assert 'ALTER TABLE "shard_0007".u ADD b int' in part.script
    assert 'COMMENT ON SCHEMA "shard_0007"' in part.script
    assert part.tables == frozenset({"u"})


def test_tables_that_are_locked_are_named_for_those_who_look_first() -> None:
    work = ShardWork(7, False, False, (LIVE,))
    [part] = Parts(PhysicalPlan("alpha", work=(work,), order=(LIVE,)), ROLES).of(work, 0)
    assert part.tables == frozenset({"t"})
