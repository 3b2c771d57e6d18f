"""The tables and functions shardkit itself owns, as DDL.

Two places hold them. The admin schema `shardkit` exists once on every physical shard: who it
is, and one ownership row per logical shard it has or had. Each logical shard's schema holds the
state of its id generator and its outbox, so that they replicate, move and fail over with the data.

`shardkit migrate apply` runs these statements with the admin login; they can be run again at
any time. Roles get the rights that `shardkit.ops.rights` lists; the application owns nothing.
Source: docs/architecture.md, decisions 6 and 7.
"""

from __future__ import annotations

from collections.abc import Mapping

from psycopg import sql

from shardkit.emitting import POSITION
from shardkit.ids import EPOCH_MS
from shardkit.models import REFERENCE_SCHEMA
from shardkit.ops import cachetriggers, rights
from shardkit.ops.idfunctions import id_statements
from shardkit.ops.logfunctions import log_statements
from shardkit.ops.lookuptable import lookup_statements
from shardkit.ops.outboxtables import outbox_admin_statements, outbox_statements
from shardkit.ops.ownershiptables import ownership_statements, register_statements
from shardkit.topology import RoleNames, schema_name

__all__ = ["ADMIN_SCHEMA", "admin_statements", "logical_shard_statements", "rule_statements"]

ADMIN_SCHEMA = "shardkit"

# Takes locks on new objects only.
_ADMIN_TABLES = """
CREATE SCHEMA IF NOT EXISTS shardkit;
REVOKE ALL ON SCHEMA shardkit FROM PUBLIC;
CREATE TABLE IF NOT EXISTS shardkit.identity (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    cluster text NOT NULL,
    physical text NOT NULL,
    logical_shards integer NOT NULL,
    id_epoch_ms bigint NOT NULL
);
CREATE TABLE IF NOT EXISTS shardkit.ownership (
    logical_shard integer PRIMARY KEY,
    epoch bigint NOT NULL,
    state text NOT NULL CHECK (state IN ('active', 'importing', 'fenced', 'retired')),
    moved_to text
);
CREATE TABLE IF NOT EXISTS shardkit.placement (
    table_name text PRIMARY KEY,
    rule text NOT NULL
);
CREATE TABLE IF NOT EXISTS shardkit.decisions (
    transaction text PRIMARY KEY CHECK (transaction ~ '^[0-9a-f]{32}$'),
    outcome text NOT NULL CHECK (outcome IN ('commit', 'abort')),
    participants text[] NOT NULL DEFAULT '{}',
    decided timestamptz NOT NULL DEFAULT clock_timestamp(),
    asked timestamptz
);
CREATE TABLE IF NOT EXISTS shardkit.reference_version (
    revision text PRIMARY KEY,
    checksum text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE IF NOT EXISTS shardkit.ddl_locks (
    logical_shard integer PRIMARY KEY,
    holder text NOT NULL,
    reason text NOT NULL,
    since timestamptz NOT NULL DEFAULT now()
);
CREATE SCHEMA IF NOT EXISTS reference;
"""


def admin_statements(
    *, cluster: str, physical: str, n_logical_shards: int, roles: RoleNames
) -> list[sql.SQL | sql.Composed]:
    """Return the statements that create or complete the admin schema of one physical shard."""
    return [
        # What the owner makes, nobody may run who was not told to; in every schema.
        sql.SQL("ALTER DEFAULT PRIVILEGES REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC"),
        sql.SQL(_ADMIN_TABLES),
        *outbox_admin_statements(),
        *id_statements(),
        *log_statements(),
        *cachetriggers.function_statements(),
        *ownership_statements(),
        *rights.default_statements(ADMIN_SCHEMA, roles),
        *rights.table_statements(ADMIN_SCHEMA, rights.ADMIN_TABLES, roles),
        *rights.function_statements(rights.ADMIN_FUNCTIONS, roles),
        sql.SQL(f"GRANT USAGE ON SEQUENCE {POSITION} TO {{}}").format(sql.Identifier(roles.app)),
        # Reference tables, the same on every physical shard: shardkit.broadcasts.
        *rights.default_statements(REFERENCE_SCHEMA, roles),
        sql.SQL(
            "INSERT INTO shardkit.identity (cluster, physical, logical_shards, id_epoch_ms) "
            "VALUES ({}, {}, {}, {}) ON CONFLICT DO NOTHING"
        ).format(cluster, physical, n_logical_shards, EPOCH_MS),
        *register_statements(),
    ]


def rule_statements(rules: Mapping[str, str]) -> list[sql.SQL | sql.Composed]:
    """Return the statements that record how the rows of tables are placed, where nothing is yet.

    Args:
        rules: text of `shardkit.strategies.Rule` by name of the table.
    """
    return [
        sql.SQL(
            "INSERT INTO shardkit.placement (table_name, rule) VALUES ({}, {}) "
            "ON CONFLICT DO NOTHING"
        ).format(table, rule)
        for table, rule in sorted(rules.items())
    ]


def logical_shard_statements(
    logical_shard: int, *, roles: RoleNames
) -> list[sql.SQL | sql.Composed]:
    """Return the statements that create or complete the schema of one logical shard.

    They belong in one transaction: a shard is owned as soon as its schema exists.
    """
    schema = sql.Identifier(schema_name(logical_shard))
    return [
        sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(schema),
        sql.SQL(
            "CREATE TABLE IF NOT EXISTS {}.shardkit_id_state ("
            "one boolean PRIMARY KEY DEFAULT true CHECK (one), state bigint NOT NULL)"
        ).format(schema),
        sql.SQL(
            "INSERT INTO {}.shardkit_id_state (state) VALUES (0) ON CONFLICT DO NOTHING"
        ).format(schema),
        *rights.default_statements(schema_name(logical_shard), roles),
        sql.SQL(
            "CREATE TABLE IF NOT EXISTS {}.shardkit_directory (directory text NOT NULL, "
            "key bytea NOT NULL, shard integer NOT NULL CHECK (shard BETWEEN 0 AND 8191), "
            "PRIMARY KEY (directory, key))"
        ).format(schema),
        # What `Cluster.run` did under a name, so that it is done once: `shardkit.operations`.
        sql.SQL(
            "CREATE TABLE IF NOT EXISTS {}.shardkit_operations ("
            "operation text PRIMARY KEY, fingerprint text, result text, "
            "n_runs integer NOT NULL DEFAULT 1, expires_at timestamptz NOT NULL)"
        ).format(schema),
        sql.SQL(
            "CREATE INDEX IF NOT EXISTS shardkit_operations_expires_at "
            "ON {}.shardkit_operations (expires_at)"
        ).format(schema),
        *lookup_statements(schema),
        *outbox_statements(logical_shard),
        *cachetriggers.sequence_statements(logical_shard),
        # The ledger is made, and its rights are given, by shardkit.ops.ledger.
        *rights.table_statements(
            schema_name(logical_shard),
            [table for table in rights.SHARD_TABLES if table != "shardkit_version"],
            roles,
        ),
        sql.SQL("GRANT USAGE ON SEQUENCE {}.version_seq TO {}").format(
            schema, sql.Identifier(roles.app)
        ),
        sql.SQL(
            "INSERT INTO shardkit.ownership (logical_shard, epoch, state) "
            "VALUES ({}, 1, 'active') ON CONFLICT DO NOTHING"
        ).format(logical_shard),
    ]
