"""The versions of cached rows and what says that they changed, as DDL.

Every cached table has four triggers in every logical shard. One gives a row its version before it
is written; three say after a statement which rows it changed, in one event of the outbox (more for
many rows). So nothing that changes a row is left out: objects, statements of any kind, cascades
and psql. The functions are in the admin schema and serve all tables; PL/pgSQL keeps their plans
for each table by itself. Source: docs/cache.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import psycopg
from psycopg import sql

from shardkit.cacheable import CHANGED
from shardkit.emitting import CHANNEL, EPOCH_SHIFT, POSITION, SLEEPING
from shardkit.topology import schema_name

__all__ = ["complete", "function_statements", "sequence_statements", "trigger_statements"]

_ROWS_PER_EVENT: Final = 1000

# Takes no lock. PostgreSQL has locked the row that an UPDATE found before it asks; a sequence that
# was left behind by a hand-over must not count a row backwards.
_VERSION = """
CREATE OR REPLACE FUNCTION shardkit.cache_version() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.version := pg_catalog.nextval((TG_TABLE_SCHEMA || '.version_seq')::regclass);
    IF TG_OP = 'UPDATE' THEN
        NEW.version := greatest(NEW.version, OLD.version + 1);
    END IF;
    RETURN NEW;
END
$$
"""

_ARRAY: Final = """ARRAY(
        SELECT jsonb_agg(jsonb_build_array(c.key, c.version)) FROM (
            SELECT {key} AS key, {version} AS version, (row_number() OVER () - 1) / {most} AS n
            FROM {rows} AS r) AS c {condition} GROUP BY c.n)"""

_KEY: Final = """(SELECT jsonb_agg(to_jsonb(r) -> k.name ORDER BY k.n)
                FROM unnest(names) WITH ORDINALITY AS k (name, n))"""

_FRESH: Final = _ARRAY.format(
    key=_KEY, version="r.version", most=_ROWS_PER_EVENT, rows="fresh", condition=""
)
_GONE: Final = _ARRAY.format(
    key=_KEY, version="r.version + 1", most=_ROWS_PER_EVENT, rows="gone", condition=""
)
_RENAMED: Final = _ARRAY.format(
    key=_KEY,
    version="r.version + 1",
    most=_ROWS_PER_EVENT,
    rows="gone",
    condition=f"WHERE c.key NOT IN (SELECT {_KEY} FROM fresh AS r)",  # noqa: S608 - constants
)

# Row locks on what is inserted. An argument is one column of the primary key, `tag:name`. A key
# that is gone has the version after its last one. Ids are negative: nobody mints such. While the
# logical shard is not this server's to write, only copies are made, which say nothing.
_CHANGED = f"""
CREATE OR REPLACE FUNCTION shardkit.cache_changed() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    shard integer := pg_catalog.right(TG_TABLE_SCHEMA, 4)::integer;
    names text[] := ARRAY(SELECT substr(a, strpos(a, ':') + 1) FROM unnest(TG_ARGV) AS a);
    noted text := 'shardkit.cache_' || TG_TABLE_SCHEMA;
    epoch_place bigint;
    place bigint;
    changes jsonb[];
    part jsonb;
BEGIN
    SELECT o.epoch << {EPOCH_SHIFT} INTO epoch_place FROM shardkit.ownership AS o
    WHERE o.logical_shard = shard AND o.state = 'active';
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    IF TG_OP = 'DELETE' THEN
        changes := {_GONE};
    ELSE
        changes := {_FRESH};
    END IF;
    IF TG_OP = 'UPDATE' AND TG_NARGS > 1 THEN  -- a part of the key may have changed
        changes := changes || {_RENAMED};
    END IF;
    IF cardinality(changes) = 0 THEN
        RETURN NULL;
    END IF;
    FOREACH part IN ARRAY changes LOOP
        place := epoch_place + nextval('{POSITION}');
        EXECUTE format(
            'INSERT INTO %I.shardkit_outbox (position, id, topic, payload)'
            ' VALUES ($1, -$1, ''{CHANGED}'', $2)', TG_TABLE_SCHEMA
        ) USING place, json_build_object(
            'table', TG_TABLE_NAME,
            'tags', ARRAY(SELECT split_part(a, ':', 1) FROM unnest(TG_ARGV) AS a),
            'transaction', pg_current_xact_id()::text, 'rows', part);
        IF coalesce(current_setting(noted, true), '') = '' THEN
            PERFORM set_config(noted, place::text, true);
        END IF;
    END LOOP;
    IF coalesce(current_setting('shardkit.quiet', true), '') <> 'on'
        AND NOT pg_try_advisory_xact_lock_shared({SLEEPING})
    THEN
        PERFORM pg_notify('{CHANNEL}', shard::text);
    END IF;
    RETURN NULL;
END
$$
"""  # noqa: S608 - constants

# ShareRowExclusiveLock on the table: it waits for writers, and writers for it.
_TRIGGERS = """
DROP TRIGGER IF EXISTS shardkit_version ON {table};
DROP TRIGGER IF EXISTS shardkit_inserted ON {table};
DROP TRIGGER IF EXISTS shardkit_updated ON {table};
DROP TRIGGER IF EXISTS shardkit_deleted ON {table};
CREATE TRIGGER shardkit_version BEFORE INSERT OR UPDATE ON {table}
    FOR EACH ROW EXECUTE FUNCTION shardkit.cache_version();
CREATE TRIGGER shardkit_inserted AFTER INSERT ON {table} REFERENCING NEW TABLE AS fresh
    FOR EACH STATEMENT EXECUTE FUNCTION shardkit.cache_changed({key});
CREATE TRIGGER shardkit_updated AFTER UPDATE ON {table}
    REFERENCING OLD TABLE AS gone NEW TABLE AS fresh
    FOR EACH STATEMENT EXECUTE FUNCTION shardkit.cache_changed({key});
CREATE TRIGGER shardkit_deleted AFTER DELETE ON {table} REFERENCING OLD TABLE AS gone
    FOR EACH STATEMENT EXECUTE FUNCTION shardkit.cache_changed({key})
"""

# Catalogues only. A table without the column is waiting for its revision.
_LACKING = """
SELECT n.nspname, c.relname FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE n.nspname = ANY (%s) AND c.relname = ANY (%s) AND c.relkind IN ('r', 'p')
    AND EXISTS (SELECT FROM pg_attribute AS a WHERE a.attrelid = c.oid AND a.attname = 'version'
        AND NOT a.attisdropped)
    AND NOT EXISTS (SELECT FROM pg_trigger AS t WHERE t.tgrelid = c.oid
        AND t.tgname = 'shardkit_deleted')
ORDER BY 1, 2
"""


def function_statements() -> list[sql.SQL | sql.Composed]:
    """Return the statements that create the functions in the admin schema."""
    return [
        sql.SQL(_VERSION),
        sql.SQL(_CHANGED),
        sql.SQL(
            "REVOKE ALL ON FUNCTION shardkit.cache_version(), shardkit.cache_changed() FROM PUBLIC"
        ),
    ]


def sequence_statements(logical_shard: int, *, app_role: str) -> list[sql.SQL | sql.Composed]:
    """Return the statements that create the versions of one logical shard."""
    sequence = sql.Identifier(schema_name(logical_shard), "version_seq")
    return [
        sql.SQL("CREATE SEQUENCE IF NOT EXISTS {} AS bigint").format(sequence),
        sql.SQL("GRANT USAGE ON SEQUENCE {} TO {}").format(sequence, sql.Identifier(app_role)),
    ]


def trigger_statements(
    logical_shard: int, tables: Mapping[str, Sequence[str]]
) -> list[sql.SQL | sql.Composed]:
    """Return the statements that create the triggers of one logical shard, anew.

    Args:
        logical_shard: its number.
        tables: `tag:name` of the columns of the primary key, by table: `cached_tables`.
    """
    return [
        sql.SQL(_TRIGGERS).format(
            table=sql.Identifier(schema_name(logical_shard), table),
            key=sql.SQL(", ").join(sql.Literal(column) for column in key),
        )
        for table, key in sorted(tables.items())
    ]


def complete(
    connection: psycopg.Connection[tuple[Any, ...]],
    logical_shards: Iterable[int],
    tables: Mapping[str, Sequence[str]],
    *,
    lock_timeout: float,
    attempts: int,
) -> None:
    """Create the triggers that tables lack; each table in a transaction of its own.

    Args:
        connection: with the admin login.
        logical_shards: where.
        tables: `cached_tables`.
        lock_timeout: seconds to queue for the lock of a table; whoever queues behind waits as long.
        attempts: times to try that.

    Raises:
        psycopg.errors.LockNotAvailable: a table was in use all the time (try again).
    """
    numbers = {schema_name(number): number for number in logical_shards}
    for schema, table in connection.execute(_LACKING, (list(numbers), list(tables))).fetchall():
        script = [
            sql.SQL("SET LOCAL lock_timeout = {}").format(round(lock_timeout * 1000)),
            *trigger_statements(numbers[schema], {table: tables[table]}),
        ]
        for attempt in range(attempts, 0, -1):
            try:
                with connection.transaction():
                    connection.execute(sql.SQL(";").join(script))
                break
            except psycopg.errors.LockNotAvailable:
                if attempt == 1:
                    raise
