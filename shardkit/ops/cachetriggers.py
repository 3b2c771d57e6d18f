"""The versions of cached rows and what says that they changed, as DDL.

Every cached table has four triggers in every logical shard. One gives a row its version before it
is written; three say after a statement which rows it changed, in one event of the outbox (more for
many rows). So nothing that changes a row is left out: objects, statements of any kind, cascades
and psql. What says it is a function of the table's own: SQL that is known beforehand takes a
quarter of the time. It moves with the schema. Source: docs/cache.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import psycopg
from psycopg import sql

from shardkit.derived import Watch
from shardkit.ops.derivedtriggers import LACKING, arguments, watch_statements
from shardkit.ops.outboxevents import noticed, said, said_few
from shardkit.topology import schema_name

__all__ = ["complete", "function_statements", "sequence_statements", "trigger_statements"]

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

# A key that is gone has the version after its last one.
_CHANGED: Final = """
CREATE OR REPLACE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    {noticed}
    IF TG_OP = 'DELETE' THEN{gone};
    ELSE{few};
        IF NOT FOUND THEN{fresh};
        END IF;
    END IF;
    {notified}{renamed}
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


def function_statements() -> list[sql.SQL]:
    """Return the statements that create what all tables share, in the admin schema."""
    return [sql.SQL(_VERSION)]


def sequence_statements(logical_shard: int) -> list[sql.Composed]:
    """Return the statements that create the versions of one logical shard."""
    sequence = sql.Identifier(schema_name(logical_shard), "version_seq")
    return [sql.SQL("CREATE SEQUENCE IF NOT EXISTS {} AS bigint").format(sequence)]


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

    def say(
        rows: str, version: str, condition: sql.Composable = _NOTHING, *, is_few: bool = False
    ) -> sql.Composed:
        return (said_few if is_few else said)(
            logical_shard,
            name=table,
            tags=[column.partition(":")[0] for column in key],
            columns=names,
            version=sql.SQL(version),
            rows=sql.Identifier(rows),
            condition=condition,
        )

    renamed: sql.Composable = _NOTHING
    if len(key) > 1:  # the only column of a key places its row, and stays
        same = sql.SQL(" AND ").join(
            sql.SQL("f.{0} = r.{0}").format(sql.Identifier(column.partition(":")[2]))
            for column in key
        )
        condition = sql.SQL("WHERE NOT EXISTS (SELECT FROM fresh AS f WHERE {})").format(same)
        renamed = sql.SQL(_RENAMED).format(gone=say("gone", "r.version + 1", condition))
    first, last = noticed(logical_shard)
    return sql.SQL(_CHANGED).format(
        function=function,
        noticed=first,
        gone=say("gone", "r.version + 1"),
        few=say("fresh", "r.version", is_few=True),
        fresh=say("fresh", "r.version"),
        notified=last,
        renamed=renamed,
    )


def complete(
    connection: psycopg.Connection[tuple[Any, ...]],
    logical_shards: Iterable[int],
    tables: Mapping[str, Sequence[str]],
    watches: Sequence[Watch] = (),
    *,
    lock_timeout: float,
    attempts: int,
) -> None:
    """Create the triggers that tables lack; those of a table, or list, in their own transaction.

    Args:
        connection: with the admin login.
        logical_shards: where.
        tables: `cached_tables`.
        watches: what lists and counts depend on.
        lock_timeout: seconds to queue for the lock of a table; whoever queues behind waits as long.
        attempts: times to try that.

    Raises:
        psycopg.errors.LockNotAvailable: a table was in use all the time (try again).
    """
    numbers = {schema_name(number): number for number in logical_shards}
    scripts = [
        trigger_statements(numbers[schema], {table: tables[table]})
        for schema, table in connection.execute(_LACKING, (list(numbers), list(tables))).fetchall()
    ]
    for watch in watches:
        lacking = connection.execute(LACKING, arguments(watch, list(numbers))).fetchall()
        scripts += [watch_statements(numbers[schema], [watch]) for (schema,) in lacking]
    limit = sql.SQL("SET LOCAL lock_timeout = {}").format(round(lock_timeout * 1000))
    for script in scripts:
        for attempt in range(attempts, 0, -1):
            try:
                with connection.transaction():
                    connection.execute(sql.SQL(";").join([limit, *script]))
                break
            except psycopg.errors.LockNotAvailable:
                if attempt == 1:
                    raise
