"""Hazards of holding others up: a table is scanned, or an index built, under a lock on it.

They count where the table is large. Lock levels are those of the PostgreSQL manual, "Explicit
Locking", and ALTER TABLE's notes.
"""

from __future__ import annotations

from shardkit.ops.backfills import backfill_of
from shardkit.ops.safety.rules import Found, Scene, commands, rule
from shardkit.ops.sqltree import Node, Statement, name_of, named, relation

__all__: list[str] = []


def _constraints(statement: Statement, kind: str) -> Found:
    """Return the table of every constraint of a kind that is added and checked at once."""
    for table, command in commands(statement, "AT_AddConstraint"):
        constraint: Node = command["def"]["constraint"]
        if (
            constraint.get("contype") == kind
            and not constraint.get("skip_validation")
            and not constraint.get("indexname")
        ):
            yield table
    if kind == "CONSTR_NOTNULL":
        return  # a column without a default that may not be null is `required-column`
    for table, command in commands(statement, "AT_AddColumn"):
        for item in command["def"]["column_def"].get("constraints", ()):
            if item["constraint"].get("contype") == kind:
                yield table


@rule(
    "adds a CHECK constraint and scans the table under ACCESS EXCLUSIVE",
    "ADD CONSTRAINT … CHECK (…) NOT VALID, then ALTER TABLE … VALIDATE CONSTRAINT …: the runner "
    "puts the second into a transaction of its own",
    "large",
    squawk=("constraint-missing-not-valid",),
    strong=("add_check_constraint", "validate_check_constraint"),
)
def check_without_not_valid(statement: Statement, _scene: Scene) -> Found:
    """Refuse ADD CHECK without NOT VALID."""
    yield from _constraints(statement, "CONSTR_CHECK")


@rule(
    "adds a foreign key and scans the table while writes to both tables wait",
    "ADD CONSTRAINT … FOREIGN KEY … NOT VALID, then VALIDATE CONSTRAINT; of a new column: add the "
    "column first, without REFERENCES",
    "large",
    squawk=("adding-foreign-key-constraint", "constraint-missing-not-valid"),
    strong=("add_foreign_key", "add_reference", "validate_foreign_key"),
)
def foreign_key_without_not_valid(statement: Statement, _scene: Scene) -> Found:
    """Refuse ADD FOREIGN KEY without NOT VALID."""
    yield from _constraints(statement, "CONSTR_FOREIGN")


@rule(
    "makes a column NOT NULL and scans the table under ACCESS EXCLUSIVE",
    "ADD CONSTRAINT c CHECK (column IS NOT NULL) NOT VALID, VALIDATE CONSTRAINT c, SET NOT NULL, "
    "which then needs no scan, DROP CONSTRAINT c: in one revision",
    "large",
    squawk=("adding-not-nullable-field",),
    strong=("change_column_null",),
)
def set_not_null(statement: Statement, scene: Scene) -> Found:
    """Refuse SET NOT NULL that nothing has proved."""
    for table, command in commands(statement, "AT_SetNotNull"):
        if (table, command.get("name", "")) not in scene.proved:
            yield table
    yield from _constraints(statement, "CONSTR_NOTNULL")


@rule(
    "adds a UNIQUE constraint and builds its index under ACCESS EXCLUSIVE",
    "CREATE UNIQUE INDEX CONCURRENTLY i ON …, then ADD CONSTRAINT … UNIQUE USING INDEX i",
    "large",
    squawk=("disallowed-unique-constraint",),
    strong=("add_unique_constraint",),
)
def unique_without_index(statement: Statement, _scene: Scene) -> Found:
    """Refuse ADD UNIQUE that builds its index."""
    yield from _constraints(statement, "CONSTR_UNIQUE")


@rule(
    "adds a PRIMARY KEY and builds its index under ACCESS EXCLUSIVE",
    "CREATE UNIQUE INDEX CONCURRENTLY i ON …, make the columns NOT NULL by a validated check, then "
    "ADD CONSTRAINT … PRIMARY KEY USING INDEX i",
    "large",
    squawk=("adding-primary-key-constraint",),
)
def primary_key_without_index(statement: Statement, _scene: Scene) -> Found:
    """Refuse ADD PRIMARY KEY that builds its index."""
    yield from _constraints(statement, "CONSTR_PRIMARY")


@rule(
    "adds an EXCLUDE constraint and builds its index under ACCESS EXCLUSIVE",
    "there is no way to add one without; make a new table with it, and copy rows in batches",
    "large",
    strong=("add_exclusion_constraint",),
)
def exclusion(statement: Statement, _scene: Scene) -> Found:
    """Refuse ADD EXCLUDE."""
    yield from _constraints(statement, "CONSTR_EXCLUSION")


@rule(
    "builds an index while writes to the table wait",
    "CREATE INDEX CONCURRENTLY: postgresql_concurrently=True; the runner does it outside a "
    "transaction",
    "large",
    squawk=("require-concurrent-index-creation",),
    strong=("add_index",),
)
def index_not_concurrently(statement: Statement, _scene: Scene) -> Found:
    """Refuse CREATE INDEX without CONCURRENTLY."""
    if statement.kind == "index_stmt" and not statement.body.get("concurrent"):
        yield named(statement.body)


@rule(
    "drops an index under ACCESS EXCLUSIVE on its table",
    "DROP INDEX CONCURRENTLY: postgresql_concurrently=True",
    "large",
    squawk=("require-concurrent-index-deletion", "ban-drop-index"),
    strong=("remove_index",),
)
def drop_index_not_concurrently(statement: Statement, _scene: Scene) -> Found:
    """Refuse DROP INDEX without CONCURRENTLY."""
    body = statement.body
    if (
        statement.kind == "drop_stmt"
        and body.get("remove_type") == "OBJECT_INDEX"
        and not body.get("concurrent")
    ):
        for item in body["objects"]:
            yield name_of(item)


@rule(
    "rebuilds an index while writes to the table wait",
    "CREATE INDEX CONCURRENTLY under a new name, then DROP INDEX CONCURRENTLY of the old one",
    "large",
    squawk=("require-concurrent-reindex",),
)
def reindex(statement: Statement, _scene: Scene) -> Found:
    """Refuse REINDEX."""
    if statement.kind == "reindex_stmt":
        yield named(statement.body)


@rule(
    "refreshes a materialized view while its readers wait",
    "REFRESH MATERIALIZED VIEW CONCURRENTLY; the view needs a unique index",
    "large",
    squawk=("require-concurrent-refresh-materialized-view",),
)
def refresh_not_concurrently(statement: Statement, _scene: Scene) -> Found:
    """Refuse REFRESH without CONCURRENTLY."""
    if statement.kind == "refresh_mat_view_stmt" and not statement.body.get("concurrent"):
        yield named(statement.body)


@rule(
    "attaches a partition and scans it under ACCESS EXCLUSIVE",
    "first add a CHECK constraint that implies the partition's bounds, NOT VALID, and VALIDATE it; "
    "then set this rule aside with that as the reason",
    "large",
)
def attach_partition(statement: Statement, _scene: Scene) -> Found:
    """Refuse ATTACH PARTITION of a table with rows."""
    for _, command in commands(statement, "AT_AttachPartition"):
        yield relation(command["def"]["partition_cmd"]["name"])


@rule(
    "detaches a partition under ACCESS EXCLUSIVE on the whole table",
    "DETACH PARTITION … CONCURRENTLY, by hand: it cannot run in a transaction",
    "large",
    squawk=("require-concurrent-partition-detach",),
)
def detach_partition(statement: Statement, _scene: Scene) -> Found:
    """Refuse DETACH PARTITION."""
    for _, command in commands(statement, "AT_DetachPartition"):
        yield relation(command["def"]["partition_cmd"]["name"])


@rule(
    "locks tables by hand",
    "leave LOCK out: each step takes the locks it needs, and only those",
    "always",
)
def lock_table(statement: Statement, _scene: Scene) -> Found:
    """Refuse LOCK TABLE."""
    if statement.kind == "lock_stmt":
        yield None


@rule(
    "writes a whole table in one transaction",
    'write backfill("UPDATE …") instead of op.execute(), from shardkit.migrations: it goes in '
    "batches, each a transaction, and waits for replicas",
    "large",
    strong=("backfilling_data",),
)
def backfill_at_once(statement: Statement, _scene: Scene) -> Found:
    """Refuse UPDATE and DELETE of a large table, with a WHERE or without, unless in batches."""
    written = statement.kind in {"update_stmt", "delete_stmt", "merge_stmt"}
    if written and backfill_of(statement) is None:
        yield named(statement.body)
