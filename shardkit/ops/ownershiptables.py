"""Ownership, fences and the journal of moves as DDL: part of the admin schema.

Rights are what a fence takes, so rights are what is written down: `shardkit.close_shard` notes
every right on the tables and sequences of a logical shard before it revokes it, and
`shardkit.open_shard` gives back what was noted, whoever had it. So lifting a fence needs nobody
who knows how rights were given, and a copy that nobody may use yet opens with the rights that its
own migrations gave. Part of `shardkit.ops.catalog`; the transactions are
`shardkit.ops.moves.transactions`. Source: docs/moves.md.
"""

from __future__ import annotations

from typing import Final

from psycopg import sql

from shardkit.ownership import LIFT_AFTER

__all__ = ["TIMELINE", "ownership_statements", "register_statements"]

TIMELINE: Final = (
    "('x' || pg_catalog.substr(pg_catalog.pg_walfile_name("
    "pg_catalog.pg_current_wal_insert_lsn()), 1, 8))::bit(32)::bigint"
)
"""SQL of a primary's timeline. The control file would show it a checkpoint late."""

# AccessExclusiveLock on small tables that exist already, for their new columns.
_TABLES: Final = """
ALTER TABLE shardkit.ownership ADD COLUMN IF NOT EXISTS move_id uuid,
    ADD COLUMN IF NOT EXISTS attempt integer NOT NULL DEFAULT 0,
    ADD COLUMN IF NOT EXISTS fenced_at timestamptz,
    ADD COLUMN IF NOT EXISTS fence_timeline bigint;
ALTER TABLE shardkit.identity ADD COLUMN IF NOT EXISTS timeline bigint,
    ADD COLUMN IF NOT EXISTS system_identifier bigint;
CREATE TABLE IF NOT EXISTS shardkit.closed_rights (
    logical_shard integer NOT NULL,
    relation name NOT NULL,
    is_sequence boolean NOT NULL,
    attribute name NOT NULL DEFAULT '',
    grantee name NOT NULL DEFAULT '',
    privilege text NOT NULL,
    is_grantable boolean NOT NULL,
    PRIMARY KEY (logical_shard, relation, attribute, grantee, privilege)
);
CREATE TABLE IF NOT EXISTS shardkit.move_journal (
    entry bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    move_id uuid NOT NULL,
    attempt integer NOT NULL,
    logical_shard integer NOT NULL,
    step text NOT NULL,
    is_done boolean NOT NULL,
    lsn pg_lsn NOT NULL,
    detail json,
    noted timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE TABLE IF NOT EXISTS shardkit.failovers (
    entry bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    kind text NOT NULL,
    server text NOT NULL,
    timeline bigint NOT NULL,
    position pg_lsn NOT NULL DEFAULT pg_catalog.pg_current_wal_insert_lsn(),
    detail json,
    noted timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX IF NOT EXISTS move_journal_move ON shardkit.move_journal (move_id, entry);
"""

# A row lock, once.
_REGISTER: Final = f"""
UPDATE shardkit.identity SET timeline = {TIMELINE}, system_identifier =
    (SELECT system_identifier FROM pg_catalog.pg_control_system())
WHERE timeline IS NULL
"""

# No lock but on what is revoked. Rights of the owner and of superusers are not in the lists, and
# REVOKE does not stop them: whoever fences looks for such logins first.
_CLOSE: Final = """
CREATE OR REPLACE FUNCTION shardkit.close_shard(shard integer, reads boolean) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog AS $$
DECLARE
    place text := 'shard_' || lpad(shard::text, 4, '0');
    taken text[] := ARRAY['INSERT', 'UPDATE', 'DELETE', 'TRUNCATE', 'USAGE'];
    r record;
BEGIN
    IF reads THEN
        taken := taken || 'SELECT'::text;
    END IF;
    FOR r IN
        WITH granted AS (
            SELECT c.relname, c.relkind = 'S' AS is_sequence, ''::name AS attribute,
                a.grantee, a.privilege_type, a.is_grantable
            FROM pg_class AS c, aclexplode(c.relacl) AS a
            WHERE c.relnamespace = place::regnamespace AND a.grantee <> c.relowner
                AND c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
            UNION ALL
            SELECT c.relname, false, t.attname, a.grantee, a.privilege_type, a.is_grantable
            FROM pg_class AS c JOIN pg_attribute AS t ON t.attrelid = c.oid,
                aclexplode(t.attacl) AS a
            WHERE c.relnamespace = place::regnamespace AND NOT t.attisdropped
                AND a.grantee <> c.relowner
        ), noted AS (
            INSERT INTO shardkit.closed_rights AS held
                (logical_shard, relation, is_sequence, attribute, grantee, privilege, is_grantable)
            SELECT shard, g.relname, g.is_sequence, g.attribute, coalesce(w.rolname, ''),
                g.privilege_type, bool_or(g.is_grantable)
            FROM granted AS g LEFT JOIN pg_roles AS w ON w.oid = g.grantee
            WHERE g.privilege_type = ANY (taken) GROUP BY 1, 2, 3, 4, 5, 6
            ON CONFLICT (logical_shard, relation, attribute, grantee, privilege)
                DO UPDATE SET is_grantable = excluded.is_grantable
            RETURNING relation, is_sequence, grantee, privilege
        )
        SELECT relation, is_sequence, grantee, string_agg(DISTINCT privilege, ', ') AS privileges
        FROM noted GROUP BY 1, 2, 3 ORDER BY 1, 3
    LOOP
        -- A right on a table takes those on its columns with it.
        EXECUTE format('REVOKE %s ON %s %I.%I FROM %s CASCADE', r.privileges,
            CASE WHEN r.is_sequence THEN 'SEQUENCE' ELSE 'TABLE' END, place, r.relation,
            CASE WHEN r.grantee = '' THEN 'PUBLIC' ELSE quote_ident(r.grantee) END);
    END LOOP;
END
$$
"""

_OPEN: Final = """
CREATE OR REPLACE FUNCTION shardkit.open_shard(shard integer) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog AS $$
DECLARE
    place text := 'shard_' || lpad(shard::text, 4, '0');
    r record;
BEGIN
    FOR r IN
        SELECT h.is_sequence, h.relation, h.grantee, h.is_grantable, string_agg(
            h.privilege || CASE WHEN h.attribute = '' THEN '' ELSE format(' (%I)', h.attribute) END,
            ', ') AS privileges
        FROM shardkit.closed_rights AS h JOIN pg_class AS c
            ON c.relname = h.relation AND c.relnamespace = place::regnamespace
        WHERE h.logical_shard = shard
            AND (h.grantee = '' OR EXISTS (SELECT FROM pg_roles AS w WHERE w.rolname = h.grantee))
            AND (h.attribute = '' OR EXISTS (SELECT FROM pg_attribute AS t
                WHERE t.attrelid = c.oid AND t.attname = h.attribute AND NOT t.attisdropped))
        GROUP BY 1, 2, 3, 4 ORDER BY 2, 3
    LOOP
        EXECUTE format('GRANT %s ON %s %I.%I TO %s%s', r.privileges,
            CASE WHEN r.is_sequence THEN 'SEQUENCE' ELSE 'TABLE' END, place, r.relation,
            CASE WHEN r.grantee = '' THEN 'PUBLIC' ELSE quote_ident(r.grantee) END,
            CASE WHEN r.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END);
    END LOOP;
    DELETE FROM shardkit.closed_rights WHERE logical_shard = shard;
END
$$
"""

# A row lock, and none where somebody else is at it. After a change of timeline the fence stays:
# a decision that followed it may have been lost, so the target has to be asked first.
_LIFT: Final = f"""
CREATE OR REPLACE FUNCTION shardkit.lift_expired_fence(shard integer) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog AS $$
DECLARE
    held record;
BEGIN
    SELECT * INTO held FROM shardkit.ownership AS o
    WHERE o.logical_shard = shard AND o.state = 'fenced'
    FOR UPDATE SKIP LOCKED;
    IF NOT FOUND OR held.fenced_at > clock_timestamp() - interval '{LIFT_AFTER} s'
        OR held.fence_timeline IS DISTINCT FROM {TIMELINE}
    THEN
        RETURN false;
    END IF;
    PERFORM shardkit.open_shard(shard);
    UPDATE shardkit.ownership SET state = 'active', moved_to = NULL, fenced_at = NULL,
        fence_timeline = NULL
    WHERE logical_shard = shard;
    RETURN true;
END
$$
"""


# AccessShareLock on a small table. Says of a transaction's server that it is the primary that the
# client knows: behind a pooler any server may serve the next one. The error is that of a primary
# which takes no writes any more.
_ON_TIMELINE: Final = f"""
CREATE OR REPLACE FUNCTION shardkit.on_timeline(expected bigint) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog AS $$
DECLARE
    registered bigint := (SELECT i.timeline FROM shardkit.identity AS i);
BEGIN
    IF pg_is_in_recovery() OR registered IS DISTINCT FROM expected OR {TIMELINE} <> expected THEN
        RAISE EXCEPTION 'timeline % is expected here, and % is registered', expected, registered
            USING ERRCODE = 'read_only_sql_transaction',
                HINT = 'another server is the primary, or this one has just become it';
    END IF;
END
$$
"""


def ownership_statements() -> list[sql.SQL | sql.Composed]:
    """Return the statements that complete the admin schema; `shardkit.ops.rights` grants."""
    return [sql.SQL(_TABLES), *(sql.SQL(text) for text in (_CLOSE, _OPEN, _LIFT, _ON_TIMELINE))]


def register_statements() -> list[sql.SQL | sql.Composed]:
    """Return the statement that notes which server this is, where nothing is noted yet."""
    return [sql.SQL(_REGISTER)]
