"""The copy on the target: its schema made from revisions, its rows from one snapshot.

The schema is made as `shardkit migrate` makes it. For the load, foreign keys and secondary indexes
are taken away and triggers switched off; afterwards everything that the source's catalogue has is
completed, so what is left undone by a crash needs no list. Called by the driver; decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import psycopg
from psycopg import sql

from shardkit.topology import schema_name

__all__ = ["Table", "build", "complete", "copy", "drop", "size_of", "strip", "tables_of"]

Connection = psycopg.Connection[Any]

# AccessShareLock on catalogues. Generated columns are made again.
_TABLES: Final = """
SELECT c.relname, c.relkind = 'p', greatest(c.reltuples, 0)::bigint, pg_total_relation_size(c.oid),
    array_agg(a.attname ORDER BY a.attnum) FILTER (WHERE a.attgenerated = ''),
    coalesce((SELECT array_agg(k.attname ORDER BY u.place) FROM pg_index AS i,
        unnest(i.indkey) WITH ORDINALITY AS u (number, place)
        JOIN pg_attribute AS k ON k.attnum = u.number
        WHERE i.indrelid = c.oid AND i.indisprimary AND k.attrelid = c.oid), '{}'),
    coalesce((SELECT array_agg(format_type(k.atttypid, k.atttypmod) ORDER BY u.place)
        FROM pg_index AS i, unnest(i.indkey) WITH ORDINALITY AS u (number, place)
        JOIN pg_attribute AS k ON k.attnum = u.number
        WHERE i.indrelid = c.oid AND i.indisprimary AND k.attrelid = c.oid), '{}')
FROM pg_class AS c JOIN pg_attribute AS a ON a.attrelid = c.oid
    AND a.attnum > 0 AND NOT a.attisdropped
WHERE c.relnamespace = %s::regnamespace AND c.relkind IN ('r', 'p') AND NOT c.relispartition
GROUP BY c.oid, c.relname, c.relkind, c.reltuples ORDER BY c.relname
"""

# Foreign keys first, since they stand on unique indexes; indexes that belong to no constraint.
_STRIPPED: Final = """
SELECT format('ALTER TABLE %%I.%%I DROP CONSTRAINT %%I', n.nspname, c.relname, k.conname)
FROM pg_constraint AS k JOIN pg_class AS c ON c.oid = k.conrelid
    JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE n.nspname = %(schema)s AND k.contype = 'f' AND k.conparentid = 0
UNION ALL
SELECT format('DROP INDEX %%I.%%I', n.nspname, i.relname)
FROM pg_index AS x JOIN pg_class AS i ON i.oid = x.indexrelid
    JOIN pg_class AS c ON c.oid = x.indrelid JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE n.nspname = %(schema)s AND NOT x.indisunique AND NOT x.indisprimary AND NOT c.relispartition
    AND NOT EXISTS (SELECT FROM pg_constraint WHERE conindid = i.oid)
UNION ALL
SELECT format('ALTER TABLE %%I.%%I DISABLE TRIGGER USER', n.nspname, c.relname)
FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE n.nspname = %(schema)s AND c.relkind IN ('r', 'p') AND c.relhastriggers
"""

# What a schema has beside tables, by kind and name, with the statement that makes it. Constraints
# that stand on other tables come last.
_PARTS: Final = """
SELECT 1, 'function ' || p.proname || '(' || pg_get_function_identity_arguments(p.oid) || ')',
    pg_get_functiondef(p.oid)
FROM pg_proc AS p WHERE p.pronamespace = %(schema)s::regnamespace AND p.prokind IN ('f', 'p')
UNION ALL
SELECT 2, 'index ' || i.relname, pg_get_indexdef(i.oid)
FROM pg_index AS x JOIN pg_class AS i ON i.oid = x.indexrelid JOIN pg_class AS c
    ON c.oid = x.indrelid
WHERE c.relnamespace = %(schema)s::regnamespace AND NOT c.relispartition AND x.indisvalid
    AND NOT EXISTS (SELECT FROM pg_constraint AS k WHERE k.conindid = i.oid AND k.contype <> 'f')
UNION ALL
SELECT CASE WHEN k.contype = 'f' THEN 4 ELSE 3 END, 'constraint ' || c.relname || '.' || k.conname,
    format('ALTER TABLE %%I.%%I ADD CONSTRAINT %%I %%s', %(schema)s::text, c.relname, k.conname,
        pg_get_constraintdef(k.oid))
FROM pg_constraint AS k JOIN pg_class AS c ON c.oid = k.conrelid
WHERE c.relnamespace = %(schema)s::regnamespace AND k.contype IN ('c', 'u', 'x', 'f')
    AND k.conparentid = 0 AND NOT c.relispartition
UNION ALL
SELECT 5, 'trigger ' || c.relname || '.' || t.tgname, pg_get_triggerdef(t.oid)
FROM pg_trigger AS t JOIN pg_class AS c ON c.oid = t.tgrelid
WHERE c.relnamespace = %(schema)s::regnamespace AND NOT t.tgisinternal AND t.tgparentid = 0
"""

_ENABLED: Final = """
SELECT format('ALTER TABLE %%I.%%I ENABLE TRIGGER USER', n.nspname, c.relname)
FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE n.nspname = %(schema)s AND c.relkind IN ('r', 'p') AND c.relhastriggers
"""

_COMMENT: Final = "SELECT obj_description(%s::regnamespace, 'pg_namespace')"


@dataclass(frozen=True, slots=True)
class Table:
    """A table as far as copying and comparing it is concerned.

    Attributes:
        rows: as the planner estimates.
        size_bytes: with its indexes.
        columns: all but generated ones.
        key: columns of the primary key; empty for none.
        key_types: their types.
    """

    name: str
    is_partitioned: bool
    rows: int
    size_bytes: int
    columns: tuple[str, ...]
    key: tuple[str, ...]
    key_types: tuple[str, ...]

    @property
    def listed(self) -> sql.Composed:
        """The columns for SQL."""
        return sql.SQL(", ").join(map(sql.Identifier, self.columns))


def tables_of(connection: Connection, logical_shard: int) -> list[Table]:
    """Return the tables of a logical shard, by name; partitions go with their parent."""
    return [
        Table(name, is_parent, rows, size, tuple(columns or ()), tuple(key), tuple(types))
        for name, is_parent, rows, size, columns, key, types in connection.execute(
            _TABLES, (schema_name(logical_shard),)
        )
    ]


def size_of(connection: Connection, logical_shard: int) -> int:
    """Return the bytes that the tables of a logical shard have, indexes included."""
    return sum(table.size_bytes for table in tables_of(connection, logical_shard))


def build(connection: Connection, logical_shard: int, script: str) -> None:
    """Make the empty schema anew; nobody may use it.

    Args:
        connection: to the target, whose row is importing.
        logical_shard: which.
        script: what makes it, as `shardkit migrate` would.
    """
    with connection.transaction():
        drop(connection, logical_shard)
        connection.execute(script.encode())
        connection.execute("SET LOCAL search_path = pg_catalog")
        connection.execute("SELECT shardkit.close_shard(%s, true)", (logical_shard,))


def drop(connection: Connection, logical_shard: int) -> None:
    """Drop the schema with all that is in it, and forget which rights it had."""
    # AccessExclusiveLock on tables that nobody uses.
    schema = sql.Identifier(schema_name(logical_shard))
    connection.execute(sql.SQL("DROP SCHEMA IF EXISTS {} CASCADE").format(schema))
    connection.execute(
        "DELETE FROM shardkit.closed_rights WHERE logical_shard = %s", (logical_shard,)
    )


def strip(connection: Connection, logical_shard: int) -> None:
    """Empty the tables, and take away what slows a load or would fire at it."""
    schema = schema_name(logical_shard)
    with connection.transaction():
        for (statement,) in connection.execute(_STRIPPED, {"schema": schema}).fetchall():
            connection.execute(str(statement).encode())
        names = [table.name for table in tables_of(connection, logical_shard)]
        connection.execute(
            sql.SQL("TRUNCATE {}").format(
                sql.SQL(", ").join(sql.Identifier(schema, name) for name in names)
            )
        )


def copy(
    source: Connection,
    target: Connection,
    logical_shard: int,
    snapshot: str,
    on_bytes: Callable[[str, int], None],
) -> int:
    """Copy the rows of one snapshot into the empty tables; return how many.

    Args:
        source: outside a transaction.
        target: likewise.
        logical_shard: which.
        snapshot: of the source, as it was exported.
        on_bytes: told of each piece: its table, and how large it is.
    """
    schema = schema_name(logical_shard)
    # Of two versions the text of a value is the same, and its bytes may not be.
    versions = {connection.info.server_version // 10_000 for connection in (source, target)}
    form = sql.SQL("(FORMAT binary)" if len(versions) == 1 else "(FORMAT text)")
    n_rows = 0
    with source.transaction():
        source.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        source.execute(sql.SQL("SET TRANSACTION SNAPSHOT {}").format(snapshot))
        for table in tables_of(source, logical_shard):
            name = sql.Identifier(schema, table.name)
            out = sql.SQL("COPY (SELECT {} FROM {}) TO STDOUT {}").format(table.listed, name, form)
            into = sql.SQL("COPY {} ({}) FROM STDIN {}").format(name, table.listed, form)
            with source.cursor() as reading, target.cursor() as writing:
                with reading.copy(out) as rows, writing.copy(into) as copied:
                    for piece in rows:
                        copied.write(piece)
                        on_bytes(table.name, len(piece))
                n_rows += max(0, writing.rowcount)
    return n_rows


def complete(
    source: Connection,
    target: Connection,
    logical_shard: int,
    on_part: Callable[[str, int, int], None],
) -> None:
    """Make what the source's catalogue has and the copy lacks; foreign keys are checked.

    Args:
        source: read only.
        target: whose apply may run meanwhile; it waits for what is made.
        logical_shard: which.
        on_part: told what is made, how many are, and of how many.
    """
    schema = schema_name(logical_shard)
    wanted, there = _parts(source, schema), _parts(target, schema)
    missing = [(name, text) for name, text in wanted.items() if name not in there]
    for number, (name, text) in enumerate(missing):
        on_part(name, number, len(missing))
        target.execute(text.encode())
    for (statement,) in target.execute(_ENABLED, {"schema": schema}).fetchall():
        target.execute(str(statement).encode())
    row = source.execute(_COMMENT, (schema,)).fetchone()
    comment = row[0] if row else None
    target.execute(sql.SQL("COMMENT ON SCHEMA {} IS {}").format(sql.Identifier(schema), comment))
    for table in tables_of(target, logical_shard):
        on_part(f"statistics of {table.name}", len(missing), len(missing))
        target.execute(sql.SQL("ANALYZE {}").format(sql.Identifier(schema, table.name)))


def _parts(connection: Connection, schema: str) -> Mapping[str, str]:
    with connection.transaction():
        connection.execute("SET LOCAL search_path = pg_catalog")
        found = connection.execute(_PARTS, {"schema": schema}).fetchall()
    return {str(name): str(text) for _, name, text in sorted(found)}
