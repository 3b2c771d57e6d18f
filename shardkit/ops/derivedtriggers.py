"""What says that cached lists and counts changed, as DDL.

Every list and count has three triggers on its table in every logical shard. After a statement they
say, in one event of the outbox, of which keys rows came, went or changed in what the list is made
of: the same event as for a changed row (`shardkit.ops.cachetriggers`), with the list's name for the
table, its key for the primary key, and for the version the number of the transaction, plus one. So
writers and relays do with it what they do with rows. A declaration that is changed has another
name and gets triggers of its own. Source: docs/cache.md, "Lists and counts".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from psycopg import sql

from shardkit.derived import Watch
from shardkit.ops.outboxevents import noticed, said
from shardkit.topology import schema_name

__all__ = ["LACKING", "arguments", "watch_statements"]

_FUNCTION: Final = """
CREATE OR REPLACE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    {noticed}
    IF TG_OP = 'INSERT' THEN{fresh};
    ELSIF TG_OP = 'DELETE' THEN{gone};
    ELSE{changed};
    END IF;
    {notified}
    RETURN NULL;
END
$$;
REVOKE ALL ON FUNCTION {function}() FROM PUBLIC
"""

# ShareRowExclusiveLock on the table: it waits for writers, and writers for it. So who sees the
# triggers sees everything that was written without them.
_TRIGGERS: Final = """
DROP TRIGGER IF EXISTS {inserted} ON {table};
DROP TRIGGER IF EXISTS {updated} ON {table};
DROP TRIGGER IF EXISTS {deleted} ON {table};
CREATE TRIGGER {inserted} AFTER INSERT ON {table} REFERENCING NEW TABLE AS fresh
    FOR EACH STATEMENT EXECUTE FUNCTION {function}();
CREATE TRIGGER {updated} AFTER UPDATE ON {table} REFERENCING OLD TABLE AS gone NEW TABLE AS fresh
    FOR EACH STATEMENT EXECUTE FUNCTION {function}();
CREATE TRIGGER {deleted} AFTER DELETE ON {table} REFERENCING OLD TABLE AS gone
    FOR EACH STATEMENT EXECUTE FUNCTION {function}()
"""

# A row that is the same before and after in all that counts is in neither difference.
_DIFFERENCE: Final = """(SELECT {columns} FROM gone EXCEPT ALL SELECT {columns} FROM fresh
        UNION ALL (SELECT {columns} FROM fresh EXCEPT ALL SELECT {columns} FROM gone))"""

# Catalogues only. A table without one of the columns is waiting for its revision.
LACKING: Final = """
SELECT n.nspname FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE n.nspname = ANY (%s) AND c.relname = %s AND c.relkind IN ('r', 'p')
    AND (SELECT count(*) FROM pg_attribute AS a WHERE a.attrelid = c.oid AND NOT a.attisdropped
        AND a.attname = ANY (%s)) = %s
    AND NOT EXISTS (SELECT FROM pg_trigger AS t WHERE t.tgrelid = c.oid AND t.tgname = %s)
ORDER BY 1
"""
"""Schemas, table, columns, their number, and the trigger that is made last."""


def watch_statements(logical_shard: int, watches: Sequence[Watch]) -> list[sql.SQL | sql.Composed]:
    """Return the statements that create the triggers of lists and counts, anew.

    Args:
        logical_shard: its number.
        watches: of `shardkit.derived.Cached`.
    """
    found: list[sql.SQL | sql.Composed] = []
    for watch in watches:
        name = f"shardkit_derived_{watch.number}"
        function = sql.Identifier(schema_name(logical_shard), name)
        moments = {m: sql.Identifier(f"{name}_{m}") for m in ("inserted", "updated", "deleted")}
        found += [
            _function(logical_shard, watch, function),
            sql.SQL(_TRIGGERS).format(
                table=sql.Identifier(schema_name(logical_shard), watch.table),
                function=function,
                **moments,
            ),
        ]
    return found


def _function(logical_shard: int, watch: Watch, function: sql.Identifier) -> sql.Composed:
    names = [sql.Identifier(column.partition(":")[2]) for column in watch.key]
    columns = sql.SQL(", ").join(map(sql.Identifier, watch.columns))

    def say(rows: sql.Composable) -> sql.Composed:
        """Say of which keys there are rows; a key without a value has no list."""
        distinct = sql.SQL("(SELECT DISTINCT {} FROM {} AS d WHERE {})").format(
            sql.SQL(", ").join(names),
            rows,
            sql.SQL(" AND ").join(sql.SQL("{} IS NOT NULL").format(name) for name in names),
        )
        return said(
            logical_shard,
            name=watch.entry,
            tags=[column.partition(":")[0] for column in watch.key],
            columns=[sql.SQL("r.{}").format(name) for name in names],
            version=sql.SQL("pg_current_xact_id()::text::bigint + 1"),
            rows=distinct,
        )

    first, last = noticed(logical_shard)
    return sql.SQL(_FUNCTION).format(
        function=function,
        noticed=first,
        notified=last,
        fresh=say(sql.SQL("fresh")),
        gone=say(sql.SQL("gone")),
        changed=say(sql.SQL(_DIFFERENCE).format(columns=columns)),
    )


def arguments(watch: Watch, schemas: Sequence[str]) -> tuple[Any, ...]:
    """Return the parameters of `LACKING`."""
    columns = list(watch.columns)
    deleted = f"shardkit_derived_{watch.number}_deleted"
    return (list(schemas), watch.table, columns, len(columns), deleted)
