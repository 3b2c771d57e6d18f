"""What is only told: `shardkit migrate plan` prints it, and nothing is refused for it."""

from __future__ import annotations

from collections.abc import Iterator

from shardkit.ops.safety.rules import Found, Scene, commands, rule, typed
from shardkit.ops.sqltree import Node, Statement

__all__: list[str] = []


def _columns(statement: Statement) -> Iterator[Node]:
    """Return every column that a statement makes."""
    if statement.kind == "create_stmt":
        for item in statement.body.get("table_elts", ()):
            if "column_def" in item:
                yield item["column_def"]
    for _, command in commands(statement, "AT_AddColumn"):
        yield command["def"]["column_def"]


def _of_type(statement: Statement, *names: str) -> Found:
    if any(typed(column) in names for column in _columns(statement)):
        yield None


@rule("uses char(n), which pads with blanks", "use text", "advice", squawk=("ban-char-field",))
def char_column(statement: Statement, _scene: Scene) -> Found:
    """Tell of char(n)."""
    yield from _of_type(statement, "bpchar")


@rule(
    "uses varchar(n), whose limit cannot be lowered without a scan",
    "use text, with a CHECK on its length",
    "advice",
    squawk=("prefer-text-field",),
)
def varchar_column(statement: Statement, _scene: Scene) -> Found:
    """Tell of varchar(n)."""
    if any(typed(c) == "varchar" and c["type_name"].get("typmods") for c in _columns(statement)):
        yield None


@rule(
    "uses timestamp without a time zone",
    "use timestamptz: DateTime(timezone=True)",
    "advice",
    squawk=("prefer-timestamptz",),
)
def naive_timestamp(statement: Statement, _scene: Scene) -> Found:
    """Tell of timestamp."""
    yield from _of_type(statement, "timestamp")


@rule(
    "uses integers of 32 bits or less, which run out, and widening them writes the table anew",
    "use bigint",
    "advice",
    squawk=("prefer-big-int", "prefer-bigint-over-int", "prefer-bigint-over-smallint"),
)
def narrow_integer(statement: Statement, _scene: Scene) -> Found:
    """Tell of int and smallint."""
    yield from _of_type(statement, "int4", "int2", "serial", "smallserial", "serial4", "serial2")


@rule(
    "counts ids up per table; each logical shard would give the same ones",
    "let shardkit mint ids (docs/ids.md), or use GENERATED AS IDENTITY for a number that never "
    "leaves its logical shard",
    "advice",
    squawk=("prefer-identity",),
)
def serial_type(statement: Statement, _scene: Scene) -> Found:
    """Tell of serial in a new table."""
    yield from _of_type(statement, "serial", "bigserial", "smallserial", "serial4", "serial8")


@rule(
    "uses json, which has no equality, so that DISTINCT and UNION fail",
    "use jsonb",
    "advice",
    strong=("add_column_json",),
)
def json_column(statement: Statement, _scene: Scene) -> Found:
    """Tell of json."""
    yield from _of_type(statement, "json")


@rule(
    "constrains a domain, which cannot be changed later without scanning every table of it",
    "use a plain type and constrain the columns",
    "advice",
    squawk=("ban-create-domain-with-constraint",),
)
def domain_with_constraint(statement: Statement, _scene: Scene) -> Found:
    """Tell of CREATE DOMAIN … CHECK."""
    if statement.kind == "create_domain_stmt" and statement.body.get("constraints"):
        yield None


@rule(
    "lets a column be null that running code may not expect to be",
    "release code that reads nulls first",
    "advice",
    squawk=("ban-drop-not-null",),
)
def drop_not_null(statement: Statement, _scene: Scene) -> Found:
    """Tell of DROP NOT NULL."""
    for _ in commands(statement, "AT_DropNotNull"):
        yield None


@rule(
    "changes a default that running code may rely on",
    "release code that gives the value itself first",
    "advice",
    squawk=("ban-set-default", "ban-drop-default"),
    strong=("change_column_default",),
)
def change_default(statement: Statement, _scene: Scene) -> Found:
    """Tell of SET and DROP DEFAULT."""
    for _ in commands(statement, "AT_ColumnDefault", "AT_CookedColumnDefault"):
        yield None


@rule(
    "drops a constraint that running code may rely on",
    "do it once no code does",
    "advice",
    squawk=("ban-drop-constraint",),
)
def drop_constraint(statement: Statement, _scene: Scene) -> Found:
    """Tell of DROP CONSTRAINT."""
    for _ in commands(statement, "AT_DropConstraint"):
        yield None


@rule(
    "adds a value to an enum at its end",
    "say BEFORE or AFTER where values are compared",
    "advice",
    squawk=("require-enum-value-ordering", "ban-add-enum-value"),
)
def enum_value_order(statement: Statement, _scene: Scene) -> Found:
    """Tell of ADD VALUE without a place."""
    if (
        statement.kind == "alter_enum_stmt"
        and not statement.body.get("new_val_neighbor")
        and not statement.body.get("old_val")
    ):
        yield None


@rule(
    "indexes more than three columns without being unique",
    "put the most selective columns first and leave the others out",
    "advice",
    strong=("add_index_columns",),
)
def wide_index(statement: Statement, _scene: Scene) -> Found:
    """Tell of indexes of many columns."""
    if (
        statement.kind == "index_stmt"
        and not statement.body.get("unique")
        and len(statement.body.get("index_params", ())) > 3
    ):
        yield None


@rule(
    "runs a program whose statements no rule sees",
    "write plain statements, or read it twice",
    "advice",
    strong=("execute",),
)
def opaque_program(statement: Statement, _scene: Scene) -> Found:
    """Tell of DO and CALL."""
    if statement.kind in {"do_stmt", "call_stmt"}:
        yield None


@rule(
    "restricts what may be written or seen",
    "release code that keeps to it first",
    "advice",
    squawk=("ban-new-write-restriction",),
)
def new_restriction(statement: Statement, _scene: Scene) -> Found:
    """Tell of policies, row security and triggers."""
    if statement.kind in {"create_policy_stmt", "create_trig_stmt", "rule_stmt"}:
        yield None
    for _ in commands(statement, "AT_EnableRowSecurity", "AT_ForceRowSecurity"):
        yield None
