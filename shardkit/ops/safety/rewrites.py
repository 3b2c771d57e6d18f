"""Hazards of writing a table anew under ACCESS EXCLUSIVE: nobody reads meanwhile.

They count where the table is large. Source: the PostgreSQL manual, ALTER TABLE, "Notes".
"""

from __future__ import annotations

from collections.abc import Iterator

from shardkit.ops.safety.rules import Found, Scene, commands, rule, typed
from shardkit.ops.sqltree import Node, Statement, named, nodes

__all__: list[str] = []

_STEADY = {"now", "statement_timestamp", "transaction_timestamp", "current_setting", "lower"}
"""Functions that PostgreSQL evaluates once for a whole ADD COLUMN: they are not volatile."""

_SERIALS = {"serial", "bigserial", "smallserial", "serial2", "serial4", "serial8"}


def _added(statement: Statement, kind: str) -> Iterator[tuple[str, Node]]:
    for table, command in commands(statement, "AT_AddColumn"):
        for item in command["def"]["column_def"].get("constraints", ()):
            if item["constraint"].get("contype") == kind:
                yield table, item["constraint"]


@rule(
    "changes the type of a column, which may write the table and its indexes anew",
    "add a column of the new type (pre), write both, copy in batches, read the new one, drop the "
    "old one (post). Where PostgreSQL only changes its catalogue, as from varchar to text, set "
    "this rule aside with that as the reason",
    "large",
    squawk=("changing-column-type",),
    strong=("change_column",),
)
def change_type(statement: Statement, _scene: Scene) -> Found:
    """Refuse ALTER COLUMN TYPE."""
    for table, _ in commands(statement, "AT_AlterColumnType"):
        yield table


@rule(
    "adds a column with a volatile default, which writes the table anew",
    "add the column without a default, SET DEFAULT in a second statement, and fill old rows in "
    "batches",
    "large",
    squawk=("adding-field-with-default",),
    strong=("add_column_default", "add_column_default_callable"),
)
def volatile_default(statement: Statement, _scene: Scene) -> Found:
    """Refuse ADD COLUMN … DEFAULT random()."""
    for table, constraint in _added(statement, "CONSTR_DEFAULT"):
        for call in nodes(constraint.get("raw_expr", {}), "func_call"):
            if call["funcname"][-1]["string"]["sval"] not in _STEADY:
                yield table
                break


@rule(
    "adds a stored generated column, which writes the table anew",
    "make it VIRTUAL, or add a plain column that a trigger fills",
    "large",
    squawk=("adding-field-with-default",),
    strong=("add_column_generated_stored",),
)
def stored_generated_column(statement: Statement, _scene: Scene) -> Found:
    """Refuse ADD COLUMN … GENERATED … STORED."""
    for table, constraint in _added(statement, "CONSTR_GENERATED"):
        if constraint.get("generated_kind", "s") == "s":
            yield table


@rule(
    "adds a column that counts up by itself, which writes the table anew",
    "ids come from shardkit (docs/ids.md); else add a plain column, fill it in batches, and then "
    "give it a default",
    "large",
    squawk=("adding-serial-primary-key-field",),
    strong=("add_column_auto_incrementing",),
)
def serial_column(statement: Statement, _scene: Scene) -> Found:
    """Refuse ADD COLUMN … serial, and GENERATED AS IDENTITY."""
    for table, command in commands(statement, "AT_AddColumn"):
        if typed(command["def"]["column_def"]) in _SERIALS:
            yield table
    for table, _ in _added(statement, "CONSTR_IDENTITY"):
        yield table


@rule(
    "writes the whole table anew",
    "let autovacuum reuse the space; move the logical shard, which copies it as well",
    "large",
    squawk=("prefer-repack",),
)
def storage_rewrite(statement: Statement, _scene: Scene) -> Found:
    """Refuse CLUSTER, SET LOGGED, SET TABLESPACE and SET ACCESS METHOD."""
    subtypes = ("AT_SetLogged", "AT_SetUnLogged", "AT_SetTableSpace", "AT_SetAccessMethod")
    for table, _ in commands(statement, *subtypes):
        yield table
    if statement.kind == "cluster_stmt":
        yield named(statement.body)


@rule(
    "constrains a domain, which scans every table that uses it under a lock",
    "constrain the columns: ADD CONSTRAINT … CHECK … NOT VALID, then VALIDATE",
    "always",
    squawk=("ban-alter-domain-with-add-constraint",),
)
def alter_domain_constraint(statement: Statement, _scene: Scene) -> Found:
    """Refuse ALTER DOMAIN ADD CONSTRAINT and SET NOT NULL."""
    kinds = {"AD_AddConstraint", "AD_SetNotNull", "C", "O"}
    if statement.kind == "alter_domain_stmt" and statement.body.get("subtype") in kinds:
        yield None
