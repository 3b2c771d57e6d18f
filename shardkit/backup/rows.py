"""Rows in one order and one spelling: what tells whether two tables hold the same.

The stream is what `COPY … TO STDOUT` sends, in the order of the primary key, so a digest needs no
memory whatever the size, and an exported file is its own digest. Called by `create`, `drill`,
`exporting` and `importing`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import psycopg
from psycopg import sql

__all__ = ["Connection", "Shape", "copy_out", "prepare", "shapes"]

Connection = psycopg.Connection[tuple[Any, ...]]

# The same text for the same value, whatever the server's or the role's settings are.
_SETTINGS: Final = """
SET TimeZone = 'UTC'; SET DateStyle = 'ISO, YMD'; SET IntervalStyle = 'postgres';
SET extra_float_digits = 1; SET bytea_output = 'hex'; SET xmloption = 'content';
SET client_encoding = 'UTF8'; SET search_path = pg_catalog; SET jit = off;
SET statement_timeout = 0; SET row_security = off
"""

# AccessShareLock on catalogues, and for an instant on each table. Text sorts by code point, as
# servers may have different languages.
_SHAPES: Final = """
SELECT n.nspname, c.relname, c.relkind = 'r' AND pg_relation_size(c.oid) = 0,
    array_agg(a.attname ORDER BY a.attnum),
    (SELECT array_agg(k.attname ORDER BY place) FROM pg_index AS i,
        unnest(i.indkey) WITH ORDINALITY AS u (number, place)
        JOIN pg_attribute AS k ON k.attnum = u.number
     WHERE i.indrelid = c.oid AND i.indisprimary AND k.attrelid = c.oid),
    array_agg(a.attname) FILTER (WHERE a.attcollation <> 0)
FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
    JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
        AND a.attgenerated = ''
WHERE n.nspname = ANY (%s) AND c.relkind IN ('r', 'p') AND NOT c.relispartition
GROUP BY n.nspname, c.oid, c.relname, c.relkind ORDER BY 1, 2
"""


@dataclass(frozen=True, slots=True)
class Shape:
    """A table as far as copying it is concerned.

    Attributes:
        schema: its schema.
        name: its name.
        is_empty: whether it holds nothing, not even what is deleted, now.
        columns: all but generated ones, in their order.
        key: those of the primary key; empty for none.
        texts: those that sort by a language.
    """

    schema: str
    name: str
    is_empty: bool
    columns: tuple[str, ...]
    key: tuple[str, ...]
    texts: frozenset[str]

    @property
    def title(self) -> str:
        """Schema and name for people and manifests."""
        return f"{self.schema}.{self.name}"

    @property
    def identifier(self) -> sql.Identifier:
        """Schema and name for SQL."""
        return sql.Identifier(self.schema, self.name)

    @property
    def listed(self) -> sql.Composed:
        """The columns for SQL."""
        return sql.SQL(", ").join(map(sql.Identifier, self.columns))

    def ordered(self) -> sql.Composed:
        """Return the query of all rows in order."""
        # A table without a key is sorted by everything in it.
        if self.key:
            by = [
                sql.SQL('{} COLLATE "C"' if name in self.texts else "{}").format(
                    sql.Identifier(name)
                )
                for name in self.key
            ]
        else:
            by = [sql.SQL('ROW({})::text COLLATE "C"').format(self.listed)]
        return sql.SQL("SELECT {} FROM {} ORDER BY {}").format(
            self.listed, self.identifier, sql.SQL(", ").join(by)
        )


def prepare(connection: Connection) -> None:
    """Make a session write every value in the one spelling; of the session, not a transaction."""
    connection.execute(_SETTINGS)


def shapes(connection: Connection, schemas: Sequence[str]) -> list[Shape]:
    """Return the tables of schemas, by schema and name."""
    return [
        Shape(schema, name, is_empty, tuple(columns), tuple(key or ()), frozenset(texts or ()))
        for schema, name, is_empty, columns, key, texts in connection.execute(
            _SHAPES, (list(schemas),)
        )
    ]


def copy_out(
    connection: Connection, shape: Shape, write: Callable[[bytes], object] = lambda _: None
) -> tuple[int, str]:
    """Read a whole table in order; returns the number of its rows and their SHA-256.

    Args:
        connection: after `prepare`, in the transaction whose snapshot counts.
        shape: of the table.
        write: told of every piece.
    """
    digest = hashlib.sha256()
    n_rows = 0
    with (
        connection.cursor() as cursor,
        cursor.copy(sql.SQL("COPY ({}) TO STDOUT").format(shape.ordered())) as rows,
    ):
        for piece in rows:
            data = bytes(piece)
            n_rows += data.count(b"\n")  # of a value is written as two characters
            digest.update(data)
            write(data)
    return n_rows, digest.hexdigest()
