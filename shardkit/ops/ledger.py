"""What has been applied where: one ledger per logical shard, read per physical shard.

The table `shardkit_version` in each logical shard's schema holds one row per revision, written
in the transaction of the revision itself, so that it moves, replicates and fails over with the
tables it describes. One more row, `shardkit`, stands for the objects shardkit owns there.
Called by `shardkit.ops.migrate`; decides nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg import sql

from shardkit.models import REFERENCE_SCHEMA
from shardkit.ops.catalog import admin_statements, logical_shard_statements, rule_statements
from shardkit.ops.revisions import Revision
from shardkit.ops.rights import table_statements
from shardkit.ops.steps import MARK, Step, at_once
from shardkit.topology import PhysicalShard, RoleNames, schema_name

__all__ = [
    "FORMAT",
    "OWN",
    "Identity",
    "Ledger",
    "Ownership",
    "admin_script",
    "logical_shard_digest",
    "read",
    "read_shards",
    "recorded",
    "reference_script",
    "rules_script",
    "shard_script",
    "steps_script",
    "summary",
    "summary_script",
]

OWN = "shardkit"
"""Ledger row of the objects shardkit itself keeps in a logical shard's schema."""

FORMAT = 3
"""Version of what is stored: 2 has the ledger's columns `step` and `overrides`, 3 has `position`
and `shardkit.ddl_locks`. A newer one is refused, since it may mean something this version does
not know."""

SCHEMAS_PER_QUERY = 512
"""Ledgers read in one statement; each holds one lock of `max_locks_per_transaction`."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Whose server this is, as it says itself."""

    cluster: str
    physical: str
    n_logical_shards: int
    id_epoch_ms: int


@dataclass(frozen=True, slots=True)
class Ownership:
    """One ownership row."""

    epoch: int
    state: str
    moved_to: str | None


@dataclass(frozen=True, slots=True)
class Ledger:
    """Everything a physical shard says about its schemas.

    Attributes:
        identity: None on a server shardkit has not used yet.
        is_replica: whether the server replays another one's log and takes no writes.
        digest: of the admin schema's statements when they last ran.
        ownership: rows by logical shard.
        applied: checksum by revision, by logical shard; no entry before the first.
        rules: how the rows of tables are placed, as far as it was recorded, by table.
        reference: checksum by revision of what was done to reference tables.
        locked: who keeps migrations away and why, by logical shard: `shardkit.ops.ddllocks`.
        partial: statements done of a revision under way, and its checksum, by revision, by
            logical shard.
    """

    identity: Identity | None = None
    is_replica: bool = False
    digest: str | None = None
    ownership: Mapping[int, Ownership] = field(default_factory=dict)
    applied: Mapping[int, Mapping[str, str]] = field(default_factory=dict)
    rules: Mapping[str, str] = field(default_factory=dict)
    reference: Mapping[str, str] = field(default_factory=dict)
    partial: Mapping[int, Mapping[str, tuple[int, str]]] = field(default_factory=dict)
    locked: Mapping[int, str] = field(default_factory=dict)


def summary(applied: Mapping[str, str]) -> str:
    """Return a digest of all that is applied to a logical shard: the comment of its schema.

    Written in the transaction that makes it true, it saves reading the ledger of a logical shard
    that is current. A comment that says anything else is no statement at all.
    """
    return f"shardkit ledger {_digest(json.dumps(sorted(applied.items())))}"


def summary_script(applied: Mapping[str, str] | None) -> str:
    """Return the SQL that writes the digest down, for any logical shard; None takes it away."""
    # SHARE UPDATE EXCLUSIVE on the schema, which nobody else asks for.
    text = sql.SQL("COMMENT ON SCHEMA {} IS {}").format(
        sql.Identifier(MARK), summary(applied) if applied else None
    )
    return text.as_string(None)


def read(
    connection: psycopg.Connection[Any],
    *,
    current: Mapping[str, str] | None = None,
    digest: str | None = None,
) -> Ledger:
    """Return the ledger of one physical shard, in eight queries whatever its size.

    Args:
        connection: to its primary.
        current: what a logical shard with nothing to do has applied; those that say so need no
            look at their ledgers.
        digest: of the admin schema; a server with another one is read in full.
    """
    # AccessShareLock on catalogues only.
    used = connection.execute(
        "SELECT to_regclass('shardkit.identity') IS NOT NULL, "
        "obj_description(to_regnamespace('shardkit'), 'pg_namespace'), pg_is_in_recovery(), "
        "to_regclass('shardkit.placement') IS NOT NULL, "
        "to_regclass('shardkit.reference_version') IS NOT NULL, "
        "to_regclass('shardkit.ddl_locks') IS NOT NULL"
    ).fetchone()
    if used is None or not used[0]:
        return Ledger(is_replica=bool(used and used[2]))
    row = connection.execute(
        "SELECT cluster, physical, logical_shards, id_epoch_ms FROM shardkit.identity"
    ).fetchone()
    # AccessShareLock on the ownership table; row and ledger name by logical shard.
    owned = connection.execute(
        "SELECT o.logical_shard, o.epoch, o.state, o.moved_to, to_regclass(format("
        "'shard_%s.shardkit_version', lpad(o.logical_shard::text, 4, '0'))) IS NOT NULL "
        "FROM shardkit.ownership AS o ORDER BY o.logical_shard"
    ).fetchall()
    numbers = [n for n, *_, has_ledger in owned if has_ledger]
    known = set()
    if current is not None and digest is not None and digest == used[1]:
        rows = connection.execute(
            "SELECT o.logical_shard FROM shardkit.ownership AS o JOIN pg_namespace AS n ON "
            "n.nspname = format('shard_%%s', lpad(o.logical_shard::text, 4, '0')) "
            "WHERE obj_description(n.oid, 'pg_namespace') = %s",
            (summary(current),),
        )
        known = {n for (n,) in rows}
    applied, partial = read_shards(connection, [n for n in numbers if n not in known])
    applied |= {n: dict(current or {}) for n in known}
    rules: dict[str, str] = {}
    if used[3]:
        rules.update(connection.execute("SELECT table_name, rule FROM shardkit.placement"))
    reference: dict[str, str] = {}
    if used[4]:
        reference.update(
            connection.execute("SELECT revision, checksum FROM shardkit.reference_version")
        )
    locked: dict[int, str] = {}
    if used[5]:
        locked.update(
            connection.execute(
                "SELECT logical_shard, holder || ' since ' || to_char(since AT TIME ZONE 'UTC', "
                "'YYYY-MM-DD HH24:MI') || ' UTC: ' || reason FROM shardkit.ddl_locks"
            )
        )
    return Ledger(
        identity=Identity(*row) if row else None,
        is_replica=used[2],
        digest=used[1],
        ownership={n: Ownership(epoch, state, to) for n, epoch, state, to, _ in owned},
        applied=applied,
        rules=rules,
        reference=reference,
        partial=partial,
        locked=locked,
    )


def read_shards(
    connection: psycopg.Connection[Any], numbers: Sequence[int]
) -> tuple[dict[int, dict[str, str]], dict[int, dict[str, tuple[int, str]]]]:
    """Return what is applied and what is half applied in logical shards that have a ledger."""
    applied: dict[int, dict[str, str]] = {n: {} for n in numbers}
    partial: dict[int, dict[str, tuple[int, str]]] = {}
    for start in range(0, len(numbers), SCHEMAS_PER_QUERY):
        # AccessShareLock on each ledger. One row for each: a ledger is read as a whole. As JSON,
        # since a ledger of an older version has fewer columns.
        query = " UNION ALL ".join(
            f"SELECT {n}, jsonb_agg(to_jsonb(l) - 'applied_at') "
            f'FROM "{schema_name(n)}".shardkit_version AS l'
            for n in numbers[start : start + SCHEMAS_PER_QUERY]
        )
        for number, rows in connection.execute(query.encode()):
            for row in rows or ():
                if row.get("step") is None:
                    applied[number][row["revision"]] = row["checksum"]
                else:
                    half = partial.setdefault(number, {})
                    half[row["revision"]] = (row["step"], row["checksum"])
    return applied, partial


def reference_script(revision: Revision) -> str:
    """Return the SQL of a revision about reference tables, without BEGIN and COMMIT."""
    done = sql.SQL("INSERT INTO shardkit.reference_version (revision, checksum) VALUES ({}, {})")
    return _text(
        [
            sql.SQL("SET LOCAL search_path = {}").format(sql.Identifier(REFERENCE_SCHEMA)),
            # Without CONCURRENTLY, which a transaction does not allow: these tables are small.
            *(
                sql.SQL(text.replace(MARK, REFERENCE_SCHEMA))
                for text in at_once(revision.reference)
            ),
            done.format(revision.id, revision.checksum),
        ]
    )


def admin_script(shard: PhysicalShard, *, cluster: str, n_logical_shards: int) -> tuple[str, str]:
    """Return the SQL that creates or completes the admin schema, and its digest.

    The digest is stored as the schema's comment: a server that carries it needs nothing.
    """
    statements = admin_statements(
        cluster=cluster,
        physical=shard.name,
        n_logical_shards=n_logical_shards,
        roles=shard.roles,
    )
    text = _text(statements)
    digest = f"shardkit format {FORMAT} {_digest(text)}"
    comment = sql.SQL("COMMENT ON SCHEMA shardkit IS {}").format(digest)
    return _text([sql.SQL(text), comment]), digest


def rules_script(rules: Mapping[str, str]) -> str:
    """Return the SQL that records how the rows of tables are placed."""
    return _text(rule_statements(rules))


def logical_shard_digest(roles: RoleNames) -> str:
    """Return the digest of the objects shardkit keeps in every logical shard."""
    return _digest(_text(_own_statements(0, roles)))


def shard_script(
    logical_shard: int, *, own: bool, roles: RoleNames, revisions: Iterable[Revision]
) -> str:
    """Return the SQL of one logical shard's transaction, without BEGIN and COMMIT.

    Args:
        logical_shard: whose schema it runs in.
        own: whether the objects shardkit owns are created or completed first.
        roles: who gets which rights.
        revisions: what is applied, in order.
    """
    schema = sql.Identifier(schema_name(logical_shard))
    parts: list[sql.Composable] = _own_statements(logical_shard, roles) if own else []
    # No other schema: an unqualified name is this logical shard's or a built-in.
    parts.append(sql.SQL("SET LOCAL search_path = {}").format(schema))
    name = schema_name(logical_shard)
    applied = tuple(revisions)
    for revision in applied:
        parts += [sql.SQL(text.replace(MARK, name)) for text in at_once(revision.statements)]
    if own or applied:
        parts.append(_done(schema, applied, logical_shard_digest(roles) if own else None))
    return _text(parts)


def steps_script(group: Sequence[tuple[Revision, Step]]) -> str:
    """Return the SQL of steps that commit together for any logical shard, ledger rows included.

    To be rendered with `shardkit.ops.steps.render`; without BEGIN and COMMIT.
    """
    schema = sql.Identifier(MARK)
    # Tables carry their schema already. The path is for what a text cannot tell: types, functions,
    # and names in strings; LOCAL, it ends with the transaction.
    parts: list[sql.Composable] = [sql.SQL("SET LOCAL search_path = {}").format(schema)]
    parts += [sql.SQL(text) for _, step in group for text in step.statements]
    ends = {revision.id: (revision, step) for revision, step in group}.values()
    whole = [revision for revision, step in ends if step.is_last and not revision.is_undone]
    if whole:
        parts.append(_done(schema, whole))
    parts += [recorded(revision, step) for revision, step in ends if revision not in whole]
    return _text(parts)


def recorded(
    revision: Revision, step: Step, *, begun: str | None = None, position: str | None = None
) -> sql.Composable:
    """Return the statement that writes down what is done of a revision, for any logical shard.

    Args:
        revision: which.
        step: the last that is done; with `begun`, the one that begins.
        begun: index that is about to be built or dropped outside a transaction.
        position: how far the step is, as JSON, when it is a backfill that goes on.
    """
    schema = sql.Identifier(MARK)
    is_done = begun is None and position is None
    if revision.is_undone:
        if step.is_last and is_done:
            return sql.SQL("DELETE FROM {}.shardkit_version WHERE revision = {}").format(
                schema, revision.id
            )
    elif step.is_last and is_done:
        return _done(schema, [revision])
    end = step.end if is_done else step.end - len(step.statements)
    return sql.SQL(
        "INSERT INTO {}.shardkit_version (revision, checksum, step, building, position) "
        "VALUES ({}, {}, {}, {}, {}) ON CONFLICT (revision) DO UPDATE SET "
        "checksum = excluded.checksum, applied_at = excluded.applied_at, step = excluded.step, "
        "building = excluded.building, position = excluded.position"
    ).format(schema, revision.id, revision.checksum, end, begun, position)


def _done(
    schema: sql.Identifier, revisions: Iterable[Revision], own: str | None = None
) -> sql.Composable:
    """Return the statement that writes down that revisions are done, and shardkit's own objects."""
    rows = [sql.SQL("({}, {}, NULL)").format(OWN, own)] if own else []
    rows += [
        sql.SQL("({}, {}, {})").format(
            revision.id,
            revision.checksum,
            json.dumps(dict(revision.allowed), sort_keys=True) if revision.allowed else None,
        )
        for revision in revisions
    ]
    return sql.SQL(
        "INSERT INTO {}.shardkit_version (revision, checksum, overrides) VALUES {} "
        "ON CONFLICT (revision) DO UPDATE SET checksum = excluded.checksum, "
        "applied_at = excluded.applied_at, overrides = excluded.overrides, step = NULL, "
        "building = NULL, position = NULL"
    ).format(schema, sql.SQL(", ").join(rows))


def _own_statements(logical_shard: int, roles: RoleNames) -> list[sql.Composable]:
    ledger = sql.Identifier(schema_name(logical_shard), "shardkit_version")
    return [
        *logical_shard_statements(logical_shard, roles=roles),
        sql.SQL(
            "CREATE TABLE IF NOT EXISTS {} (revision text PRIMARY KEY, checksum text NOT NULL, "
            "applied_at timestamptz NOT NULL DEFAULT now())"
        ).format(ledger),
        # NULL once all of a revision is done; why a rule was set aside; how far a backfill is.
        sql.SQL(
            "ALTER TABLE {} ADD COLUMN IF NOT EXISTS step integer, "
            "ADD COLUMN IF NOT EXISTS building text, ADD COLUMN IF NOT EXISTS overrides json, "
            "ADD COLUMN IF NOT EXISTS position json"
        ).format(ledger),
        *table_statements(schema_name(logical_shard), ["shardkit_version"], roles),
    ]


def _text(statements: Iterable[sql.Composable]) -> str:
    # A line of its own for the semicolon: a statement may end in a `--` comment.
    return "\n;\n".join(statement.as_string(None).strip() for statement in statements)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
