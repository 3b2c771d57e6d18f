"""What each role may do with what: the one list that everything about rights is made of. Pure.

`migrate apply` grants by it what it creates (`shardkit.ops.catalog`), `shardkit roles` compares
servers with it and repairs them, and so does the doctor. The application may read and write rows,
and mint ids through functions; events leave through the relay, which may do what the application
may and, beyond that, empty outboxes; the monitor sees states and counts, and no user's row.
Source: docs/roles.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from psycopg import sql

from shardkit.models import REFERENCE_SCHEMA
from shardkit.topology import RoleNames

__all__ = [
    "ADMIN_FUNCTIONS",
    "ADMIN_TABLES",
    "ALL_ROWS",
    "DEFAULTS",
    "PUBLIC",
    "SHARD_TABLES",
    "Rights",
    "default_statements",
    "function_statements",
    "of_function",
    "of_schema",
    "of_sequence",
    "of_table",
    "shard_numbered",
    "table_statements",
]

PUBLIC: Final = ""
"""Everybody, as `acldefault` and `aclexplode` have it: role 0 without a name."""

ALL_ROWS: Final = "SELECT, INSERT, UPDATE, DELETE"


@dataclass(frozen=True, slots=True)
class Rights:
    """Who may do what with one thing, as GRANT has it; an empty text is nothing.

    Attributes:
        app: the application; and the relay, which is a member of it.
        relay: beyond that the relay; the application, where it delivers itself.
        monitor: the monitor, where there is one.
    """

    app: str = ""
    relay: str = ""
    monitor: str = ""

    def by_role(self, roles: RoleNames) -> dict[str, frozenset[str]]:
        """Return the privileges of each role that has rights of its own, possibly none."""
        found: dict[str, frozenset[str]] = {roles.app: _split(self.app)}
        found[roles.relay] = found.get(roles.relay, frozenset()) | _split(self.relay)
        if roles.has_relay:
            found[roles.relay] -= found[roles.app]
        if roles.has_monitor:
            found[roles.monitor] = _split(self.monitor)
        return {name: rights for name, rights in found.items() if name != roles.owner}


NOTHING: Final = Rights()

SHARD_TABLES: Final[Mapping[str, Rights]] = {
    # Counted forwards by functions only, so that no id is given twice.
    "shardkit_id_state": Rights(monitor="SELECT"),
    # Entries of directories never change, so they may only be added.
    "shardkit_directory": Rights(app="SELECT, INSERT"),
    "shardkit_operations": Rights(app=ALL_ROWS),
    "shardkit_lookup": Rights(app=ALL_ROWS),
    # Writers look their own events up; who is not a relay cannot make an event vanish.
    "shardkit_outbox": Rights(
        app="SELECT, INSERT",
        relay="SELECT, INSERT, DELETE",
        monitor='SELECT (created), SELECT ("position")',
    ),
    "shardkit_outbox_retry": Rights(relay=ALL_ROWS, monitor="SELECT (due)"),
    "shardkit_outbox_dead": Rights(relay="SELECT, INSERT, DELETE", monitor="SELECT (id)"),
    "shardkit_effects": Rights(app="SELECT, INSERT, DELETE"),
    "shardkit_version": Rights(app="SELECT", monitor="SELECT"),
}
"""In the schema of every logical shard."""

ADMIN_TABLES: Final[Mapping[str, Rights]] = {
    "identity": Rights(app="SELECT", monitor="SELECT"),
    "ownership": Rights(app="SELECT", monitor="SELECT"),
    "placement": Rights(app="SELECT", monitor="SELECT"),
    # How transactions over several physical shards ended: shardkit.twophase.
    "decisions": Rights(app=ALL_ROWS, monitor="SELECT"),
    "reference_version": Rights(monitor="SELECT"),
    "outbox_lease": Rights(relay="SELECT, UPDATE", monitor="SELECT"),
    # The doctor says who holds migrations up.
    "ddl_locks": Rights(monitor="SELECT"),
    # What a fence has taken, and what a move has done: shardkit.ops.moves.
    "closed_rights": NOTHING,
    "move_journal": Rights(monitor="SELECT"),
    # Promotions, switchovers that began, and for how long commits were not confirmed.
    "failovers": Rights(monitor="SELECT"),
}
"""In the schema `shardkit` of every physical shard."""

ADMIN_FUNCTIONS: Final[Mapping[str, Rights]] = {
    "lease_ids(integer[], integer[])": Rights(app="EXECUTE"),
    "next_id(integer)": Rights(app="EXECUTE"),
    "replayed(pg_lsn, integer)": Rights(app="EXECUTE"),
    "outbox_claim(integer[], integer, double precision, integer, integer)": Rights(relay="EXECUTE"),
    "outbox_finish(integer[], bigint[], integer[], bigint[], boolean, double precision)": Rights(
        relay="EXECUTE"
    ),
    "outbox_fail(integer, bigint, bigint, integer, double precision, text)": Rights(
        relay="EXECUTE"
    ),
    "outbox_alive(integer)": Rights(relay="EXECUTE"),
    # Called by those above, or by triggers, which need no right of whoever fires them.
    "id_clock_ms()": NOTHING,
    "reserve_ids(integer, integer)": NOTHING,
    "cache_version()": NOTHING,
    # Whoever waits for a fence may lift one that is too old; nobody else opens or closes.
    "lift_expired_fence(integer)": Rights(app="EXECUTE"),
    # Each transaction that writes through a pooler begins with it.
    "on_timeline(bigint)": Rights(app="EXECUTE"),
    "close_shard(integer, boolean)": NOTHING,
    "open_shard(integer)": NOTHING,
}
"""In the schema `shardkit`, by name and types of the arguments."""

DEFAULTS: Final[Mapping[str, Mapping[str, Rights]]] = {
    "shard": {
        "TABLES": Rights(app=ALL_ROWS),
        "SEQUENCES": Rights(app="USAGE"),
        "FUNCTIONS": Rights(app="EXECUTE"),
    },
    # The same on every physical shard, and nothing of a user: the monitor compares them.
    REFERENCE_SCHEMA: {
        "TABLES": Rights(app=ALL_ROWS, monitor="SELECT"),
        "SEQUENCES": Rights(app="USAGE"),
    },
}
"""What is made later has at once: by kind of schema, by kind of object."""

_SHARD: Final = re.compile(r"shard_(\d{4})")


def shard_numbered(schema: str) -> int | None:
    """Return the logical shard of a schema, or None."""
    found = _SHARD.fullmatch(schema)
    return int(found[1]) if found else None


def of_schema(schema: str) -> Rights:
    """Return the rights on a schema."""
    is_ours = schema in {"shardkit", REFERENCE_SCHEMA} or shard_numbered(schema) is not None
    return Rights(app="USAGE", monitor="USAGE") if is_ours else NOTHING


def of_table(schema: str, table: str) -> Rights:
    """Return the rights on a table: shardkit's own, of reference, or the application's."""
    if schema == "shardkit":
        return ADMIN_TABLES.get(table, NOTHING)
    if schema == REFERENCE_SCHEMA:
        return DEFAULTS[REFERENCE_SCHEMA]["TABLES"]
    return SHARD_TABLES.get(table, DEFAULTS["shard"]["TABLES"])


def of_sequence(schema: str, sequence: str) -> Rights:
    """Return the rights on a sequence."""
    if schema == "shardkit" and sequence != "outbox_position":
        return NOTHING
    return DEFAULTS["shard"]["SEQUENCES"]


def of_function(schema: str, signature: str) -> Rights:
    """Return the rights on a function, by its name and the types of its arguments."""
    if schema == "shardkit":
        return ADMIN_FUNCTIONS.get(signature, NOTHING)
    if schema == REFERENCE_SCHEMA or signature.startswith("shardkit_"):
        return NOTHING
    return DEFAULTS["shard"]["FUNCTIONS"]


def table_statements(schema: str, tables: Iterable[str], roles: RoleNames) -> list[sql.Composed]:
    """Return the statements that give roles their rights on shardkit's own tables, and no more.

    Args:
        schema: `shardkit`, or of a logical shard.
        tables: which exist by then.
        roles: who does what.
    """
    names = list(tables)
    grouped: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for table in names:
        for role, rights in of_table(schema, table).by_role(roles).items():
            if rights:
                grouped.setdefault((role, tuple(sorted(rights))), []).append(table)
    found = []
    if takers := _managed(roles):
        # Row locks in the catalogue. Default privileges of the schema give more.
        found.append(
            sql.SQL("REVOKE ALL ON {} FROM {}").format(_named(schema, names), _listed(takers))
        )
    for (role, rights_), owned in grouped.items():
        found.append(
            sql.SQL("GRANT {} ON {} TO {}").format(
                sql.SQL(", ".join(rights_)), _named(schema, owned), sql.Identifier(role)
            )
        )
    return found


def function_statements(signatures: Iterable[str], roles: RoleNames) -> list[sql.Composed]:
    """Return the statements that give roles their rights on functions of `shardkit`, and no more.

    Args:
        signatures: keys of `ADMIN_FUNCTIONS`.
        roles: who does what.
    """
    names = list(signatures)
    revoked = [sql.SQL("PUBLIC"), *(sql.Identifier(n) for n in _managed(roles))]
    functions = {name: sql.SQL(f"shardkit.{name}") for name in names}
    found = [
        sql.SQL("REVOKE ALL ON FUNCTION {} FROM {}").format(
            sql.SQL(", ").join(functions.values()), sql.SQL(", ").join(revoked)
        )
    ]
    granted: dict[str, list[sql.SQL]] = {}
    for name in names:
        for role, rights in ADMIN_FUNCTIONS[name].by_role(roles).items():
            if rights:
                granted.setdefault(role, []).append(functions[name])
    for role, theirs in granted.items():
        found.append(
            sql.SQL("GRANT EXECUTE ON FUNCTION {} TO {}").format(
                sql.SQL(", ").join(theirs), sql.Identifier(role)
            )
        )
    return found


def default_statements(schema: str, roles: RoleNames) -> list[sql.Composed]:
    """Return the statements that let roles into a schema, and at what is made there later."""
    kind = "shard" if shard_numbered(schema) is not None else schema
    name = sql.Identifier(schema)
    found = []
    for role, rights in of_schema(schema).by_role(roles).items():
        if rights:
            found.append(
                sql.SQL("GRANT USAGE ON SCHEMA {} TO {}").format(name, sql.Identifier(role))
            )
    for objects, default in DEFAULTS.get(kind, {}).items():
        for role, rights in default.by_role(roles).items():
            if rights:
                found.append(
                    sql.SQL("ALTER DEFAULT PRIVILEGES IN SCHEMA {} GRANT {} ON {} TO {}").format(
                        name,
                        sql.SQL(", ".join(sorted(rights))),
                        sql.SQL(objects),
                        sql.Identifier(role),
                    )
                )
    return found


def _managed(roles: RoleNames) -> list[str]:
    return list(NOTHING.by_role(roles))


def _split(rights: str) -> frozenset[str]:
    return frozenset(part.strip() for part in rights.split(",") if part.strip())


def _named(schema: str, tables: Iterable[str]) -> sql.Composed:
    return sql.SQL(", ").join(sql.Identifier(schema, table) for table in tables)


def _listed(roles: Iterable[str]) -> sql.Composed:
    return sql.SQL(", ").join(sql.Identifier(role) for role in roles)
