"""Hazards of breaking the code that runs: the old version and the new one use the tables at once.

They count where a table holds rows, for then it is in use. What only the old code needs may go in
a revision of the phase `post`.
"""

from __future__ import annotations

from shardkit.ops.safety.rules import Found, Scene, commands, rule
from shardkit.ops.sqltree import Statement, name_of, named

__all__: list[str] = []

_POST = "first release code that does not use it, then do this in a revision of the phase post: "
_NAMED_POST = _POST + 'name it post_…, or set phase = "post" in it'


@rule(
    "renames a column that running code uses",
    "add a column (pre), write both, copy in batches, read the new one, drop the old one (post)",
    "used",
    squawk=("renaming-column",),
    strong=("rename_column",),
)
def rename_column(statement: Statement, _scene: Scene) -> Found:
    """Refuse RENAME COLUMN."""
    if statement.kind == "rename_stmt" and statement.body.get("rename_type") in {
        "OBJECT_COLUMN",
        "OBJECT_ATTRIBUTE",
    }:
        yield named(statement.body)


@rule(
    "renames a table that running code uses",
    "make a table of the new name, write both, copy in batches, read the new one, drop the old one "
    "(post); or make a view of the new name",
    "used",
    squawk=("renaming-table",),
    strong=("rename_table",),
)
def rename_table(statement: Statement, _scene: Scene) -> Found:
    """Refuse ALTER TABLE … RENAME TO."""
    if statement.kind == "rename_stmt" and statement.body.get("rename_type") == "OBJECT_TABLE":
        yield named(statement.body)


@rule(
    "renames what running code may use by name",
    "make a new one beside it, and drop the old one in a revision of the phase post",
    "always",
    squawk=("renaming-object",),
)
def rename_object(statement: Statement, _scene: Scene) -> Found:
    """Refuse renaming types, views, functions and sequences; indexes and constraints are free."""
    kinds = {
        "OBJECT_TYPE", "OBJECT_DOMAIN", "OBJECT_VIEW", "OBJECT_MATVIEW", "OBJECT_FUNCTION",
        "OBJECT_PROCEDURE", "OBJECT_SEQUENCE", "OBJECT_AGGREGATE",
    }  # fmt: skip
    if statement.kind == "rename_stmt" and statement.body.get("rename_type") in kinds:
        yield None


@rule(
    "drops a column that running code may use",
    _NAMED_POST,
    "used",
    squawk=("ban-drop-column",),
    strong=("remove_column",),
)
def drop_column(statement: Statement, scene: Scene) -> Found:
    """Refuse DROP COLUMN before `post`."""
    for table, _ in commands(statement, "AT_DropColumn"):
        if scene.phase != "post":
            yield table


@rule(
    "drops a table that running code may use",
    _NAMED_POST,
    "used",
    squawk=("ban-drop-table",),
    strong=("create_table_force",),
)
def drop_table(statement: Statement, scene: Scene) -> Found:
    """Refuse DROP TABLE before `post`."""
    if statement.kind == "drop_stmt" and statement.body.get("remove_type") == "OBJECT_TABLE":
        for item in statement.body["objects"]:
            if scene.phase != "post":
                yield name_of(item)


@rule(
    "drops what running code may use",
    _NAMED_POST,
    "always",
    squawk=("ban-drop-type", "ban-drop-domain", "ban-drop-view", "ban-drop-sequence",
            "ban-drop-function", "ban-drop-trigger", "ban-drop-policy"),
)  # fmt: skip
def drop_object(statement: Statement, scene: Scene) -> Found:
    """Refuse dropping types, views, sequences, functions, triggers and policies before `post`."""
    free = {"OBJECT_TABLE", "OBJECT_INDEX", "OBJECT_SCHEMA", "OBJECT_EXTENSION"}
    if (
        statement.kind == "drop_stmt"
        and scene.phase != "post"
        and statement.body.get("remove_type") not in free
    ):
        yield None


@rule(
    "adds a column that must be given, which running code does not do",
    "give it a constant DEFAULT, or let it be null until every row and every writer has it",
    "used",
    squawk=("adding-required-field", "adding-not-nullable-field"),
    strong=("add_column_not_null",),
)
def required_column(statement: Statement, _scene: Scene) -> Found:
    """Refuse ADD COLUMN … NOT NULL without a default."""
    given = {"CONSTR_DEFAULT", "CONSTR_GENERATED", "CONSTR_IDENTITY"}
    for table, command in commands(statement, "AT_AddColumn"):
        found = command["def"]["column_def"].get("constraints", ())
        kinds = {item["constraint"].get("contype") for item in found}
        if kinds & {"CONSTR_NOTNULL", "CONSTR_PRIMARY"} and not kinds & given:
            yield table


@rule(
    "empties a table that running code uses",
    "delete rows in batches from a program; nothing that a migration does can bring them back",
    "used",
    squawk=("ban-truncate-cascade",),
)
def truncate(statement: Statement, _scene: Scene) -> Found:
    """Refuse TRUNCATE."""
    if statement.kind == "truncate_stmt":
        for item in statement.body.get("relations", ()):
            node = item["range_var"]
            schema = node.get("schemaname")
            yield f"{schema}.{node['relname']}" if schema else node["relname"]


@rule(
    "renames a value of an enum that rows and running code hold",
    "add the new value (pre), write it, change rows in batches; values are never removed",
    "always",
)
def rename_enum_value(statement: Statement, _scene: Scene) -> Found:
    """Refuse ALTER TYPE … RENAME VALUE."""
    if statement.kind == "alter_enum_stmt" and statement.body.get("old_val"):
        yield None


@rule(
    "switches off triggers, and with them foreign keys",
    "leave them on, or drop the trigger in a revision of the phase post",
    "used",
    squawk=("ban-disable-trigger",),
)
def disable_trigger(statement: Statement, _scene: Scene) -> Found:
    """Refuse DISABLE TRIGGER and DISABLE RULE."""
    subtypes = ("AT_DisableTrig", "AT_DisableTrigAll", "AT_DisableTrigUser", "AT_DisableRule")
    for table, _ in commands(statement, *subtypes):
        yield table


@rule(
    "changes what identifies a row when a logical shard moves",
    "leave the replica identity alone: give the table a primary key",
    "always",
    squawk=("ban-replica-identity",),
)
def replica_identity(statement: Statement, _scene: Scene) -> Found:
    """Refuse REPLICA IDENTITY."""
    for _ in commands(statement, "AT_ReplicaIdentity"):
        yield None


@rule(
    "changes rights or owners, which shardkit keeps",
    "the application's login has what it needs on every table of a logical shard, and owns none; "
    "more than that is for `shardkit migrate drift` to find",
    "always",
    squawk=("ban-revoke",),
)
def rights(statement: Statement, _scene: Scene) -> Found:
    """Refuse REVOKE, OWNER TO and changed defaults of rights; GRANT is free."""
    if statement.kind == "grant_stmt" and not statement.body.get("is_grant"):
        yield None
    if statement.kind in {"alter_owner_stmt", "alter_default_privileges_stmt"}:
        yield None
    for _ in commands(statement, "AT_ChangeOwner"):
        yield None


@rule(
    "replaces a view or a function that running code uses, perhaps with another shape",
    "make a new one beside it; when only its body changes and its columns and arguments stay, set "
    "this rule aside with that as the reason",
    "always",
    squawk=("ban-replace-view-function",),
)
def replace_object(statement: Statement, _scene: Scene) -> Found:
    """Refuse CREATE OR REPLACE VIEW and FUNCTION."""
    if statement.kind in {"view_stmt", "create_function_stmt"} and statement.body.get("replace"):
        yield None
