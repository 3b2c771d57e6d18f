"""The versions of cached rows and what says that they changed, as DDL.

Every cached table has four triggers in every logical shard. One gives a row its version before it
is written; three say after a statement which rows it changed, in one event of the outbox (more for
many rows). So nothing that changes a row is left out: objects, statements of any kind, cascades
and psql. What says it is a function of the table's own: SQL that is known beforehand takes a
quarter of the time. It moves with the schema. Source: docs/cache.md.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import psycopg
from psycopg import sql

from shardkit.cacheable import CHANGED
from shardkit.emitting import CHANNEL, EPOCH_SHIFT, POSITION, SLEEPING
from shardkit.topology import schema_name

__all__ = ["complete", "function_statements", "sequence_statements", "trigger_statements"]

_ROWS_PER_EVENT: Final = 1000
_NOTHING: Final = sql.SQL("")

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

# Row locks on what is inserted. Ids are negative: nobody mints such. While the logical shard is not
# this server's to write, only copies are made, which say nothing.
_SAY: Final = """
    INSERT INTO {schema}.shardkit_outbox (position, id, topic, payload)
    SELECT e.place, -e.place, {topic}, e.payload FROM (
        SELECT (o.epoch << {shift}) + nextval({position}) AS place, c.payload
        FROM shardkit.ownership AS o, (
            SELECT json_build_object('table', {name}, 'tags', {tags}::json,
                'transaction', pg_current_xact_id()::text, 'rows', json_agg(d.change)) AS payload
            FROM (SELECT json_build_array(json_build_array({columns}), {version}) AS change,
                    (row_number() OVER () - 1) / {most} AS n
                FROM {rows} AS r {condition}) AS d
            GROUP BY d.n) AS c
        WHERE o.logical_shard = {shard} AND o.state = 'active' OFFSET 0) AS e"""

# The same for what nearly every statement changes: a few rows, in one event. It takes two thirds of
# the time, so it is tried first; it says nothing where there are none or too many.
_SAY_FEW: Final = """
    INSERT INTO {schema}.shardkit_outbox (position, id, topic, payload)
    SELECT e.place, -e.place, {topic}, e.payload FROM (
        SELECT (SELECT o.epoch << {shift} FROM shardkit.ownership AS o
                WHERE o.logical_shard = {shard} AND o.state = 'active')
                + nextval({position}) AS place,
            json_build_object('table', {name}, 'tags', {tags}::json,
                'transaction', pg_current_xact_id()::text,
                'rows', json_agg(json_build_array(json_build_array({columns}), {version})))
                AS payload
        FROM {rows} AS r HAVING count(*) BETWEEN 1 AND {most} OFFSET 0) AS e
    WHERE e.place IS NOT NULL"""

# A key that is gone has the version after its last one. `cache_since` is where the transaction's
# first event is at the earliest: whoever asks for them begins there.
_CHANGED: Final = """
CREATE OR REPLACE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF coalesce(current_setting('shardkit.cache_since', true), '') = '' THEN
        PERFORM set_config('shardkit.cache_since',
            coalesce(pg_sequence_last_value({position}), 0)::text, true);
    END IF;
    IF TG_OP = 'DELETE' THEN{gone};
    ELSE{few};
        IF NOT FOUND THEN{fresh};
        END IF;
    END IF;
    IF FOUND AND coalesce(current_setting('shardkit.quiet', true), '') <> 'on'
        AND NOT pg_try_advisory_xact_lock_shared({sleeping})
    THEN
        PERFORM pg_notify({channel}, {number});
    END IF;{renamed}
    RETURN NULL;
END
$$;
REVOKE ALL ON FUNCTION {function}() FROM PUBLIC
"""

# Where a part of a key may change, the old key is gone.
_RENAMED: Final = """
    IF TG_OP = 'UPDATE' THEN{gone};
    END IF;"""

# ShareRowExclusiveLock on the table: it waits for writers, and writers for it.
_TRIGGERS = """
DROP TRIGGER IF EXISTS shardkit_version ON {table};
DROP TRIGGER IF EXISTS shardkit_inserted ON {table};
DROP TRIGGER IF EXISTS shardkit_updated ON {table};
DROP TRIGGER IF EXISTS shardkit_deleted ON {table};
CREATE TRIGGER shardkit_version BEFORE INSERT OR UPDATE ON {table}
    FOR EACH ROW EXECUTE FUNCTION shardkit.cache_version();
CREATE TRIGGER shardkit_inserted AFTER INSERT ON {table} REFERENCING NEW TABLE AS fresh
    FOR EACH STATEMENT EXECUTE FUNCTION {function}();
CREATE TRIGGER shardkit_updated AFTER UPDATE ON {table}
    REFERENCING OLD TABLE AS gone NEW TABLE AS fresh
    FOR EACH STATEMENT EXECUTE FUNCTION {function}();
CREATE TRIGGER shardkit_deleted AFTER DELETE ON {table} REFERENCING OLD TABLE AS gone
    FOR EACH STATEMENT EXECUTE FUNCTION {function}()
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
    """Return the statements that create what all tables share, in the admin schema."""
    return [
        sql.SQL(_VERSION),
        sql.SQL("REVOKE ALL ON FUNCTION shardkit.cache_version() FROM PUBLIC"),
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
    found: list[sql.SQL | sql.Composed] = []
    for table, key in sorted(tables.items()):
        function = sql.Identifier(schema_name(logical_shard), _function(table))
        found += [
            _changed(logical_shard, table, key, function),
            sql.SQL(_TRIGGERS).format(
                table=sql.Identifier(schema_name(logical_shard), table), function=function
            ),
        ]
    return found


def _function(table: str) -> str:
    """Return the name of a table's function; PostgreSQL would cut a longer one."""
    name = f"shardkit_changed_{table}"
    if len(name.encode()) < 64:
        return name
    return f"shardkit_changed_{hashlib.blake2b(table.encode(), digest_size=16).hexdigest()}"


def _changed(
    logical_shard: int, table: str, key: Sequence[str], function: sql.Identifier
) -> sql.Composed:
    names = [sql.Identifier("r", column.partition(":")[2]) for column in key]
    position = sql.Literal(POSITION)

    def say(
        rows: str, version: str, condition: sql.Composable = _NOTHING, template: str = _SAY
    ) -> sql.Composed:
        return sql.SQL(template).format(
            schema=sql.Identifier(schema_name(logical_shard)),
            topic=sql.Literal(CHANGED),
            shift=EPOCH_SHIFT,
            position=position,
            name=sql.Literal(table),
            tags=sql.Literal(json.dumps([column.partition(":")[0] for column in key])),
            columns=sql.SQL(", ").join(names),
            version=sql.SQL(version),
            most=_ROWS_PER_EVENT,
            rows=sql.Identifier(rows),
            condition=condition,
            shard=logical_shard,
        )

    renamed: sql.Composable = _NOTHING
    if len(key) > 1:  # the only column of a key places its row, and stays
        same = sql.SQL(" AND ").join(
            sql.SQL("f.{0} = r.{0}").format(sql.Identifier(column.partition(":")[2]))
            for column in key
        )
        condition = sql.SQL("WHERE NOT EXISTS (SELECT FROM fresh AS f WHERE {})").format(same)
        renamed = sql.SQL(_RENAMED).format(gone=say("gone", "r.version + 1", condition))
    return sql.SQL(_CHANGED).format(
        function=function,
        position=position,
        gone=say("gone", "r.version + 1"),
        few=say("fresh", "r.version", template=_SAY_FEW),
        fresh=say("fresh", "r.version"),
        renamed=renamed,
        sleeping=SLEEPING,
        channel=sql.Literal(CHANNEL),
        number=sql.Literal(str(logical_shard)),
    )


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
