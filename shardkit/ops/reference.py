"""Are reference tables the same on every physical shard? Compared with the home, and repaired.

The home is the first physical shard by name, where broadcasts write first. Tables are compared
by the number of their rows and a digest that does not depend on the order of rows or columns.
Called by `shardkit reference`; how rows are put is `shardkit.broadcasts`' or plain SQL here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql

from shardkit.broadcasts import LOCK_KEY, LOCK_TIMEOUT
from shardkit.errors import (
    EndpointUnavailableError,
    RefusedError,
    ShardkitError,
    TryAgainError,
)
from shardkit.models import REFERENCE_SCHEMA
from shardkit.ops.direct import connect
from shardkit.topology import Topology

__all__ = ["Difference", "ReferenceCheck", "check", "repair"]

Connection = psycopg.Connection[tuple[Any, ...]]

# The same text for the same value, whatever the server's or the role's settings are.
_SETTINGS = "SET TimeZone = 'UTC'; SET DateStyle = 'ISO'; SET extra_float_digits = 1"

# AccessShareLock on catalogues only. Parents come first: a table stands as deep as the longest
# chain of foreign keys below it; circles are cut.
_TABLES = """
WITH RECURSIVE tables AS (
    SELECT oid, relname FROM pg_class
    WHERE relnamespace = to_regnamespace(%(schema)s) AND relkind IN ('r', 'p')
        AND NOT relispartition
), depth (oid, n) AS (
    SELECT oid, 0 FROM tables
    UNION ALL
    SELECT c.conrelid, d.n + 1 FROM depth AS d JOIN pg_constraint AS c
        ON c.confrelid = d.oid AND c.contype = 'f' AND c.conrelid <> c.confrelid AND d.n < 20
)
SELECT t.relname, max(d.n),
    (SELECT array_agg(a.attname ORDER BY a.attname) FROM pg_attribute AS a
     WHERE a.attrelid = t.oid AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''),
    (SELECT array_agg(a.attname ORDER BY a.attname) FROM pg_index AS i JOIN pg_attribute AS a
        ON a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey)
     WHERE i.indrelid = t.oid AND i.indisprimary)
FROM tables AS t JOIN depth AS d USING (oid) GROUP BY t.oid, t.relname ORDER BY 2, 1
"""


@dataclass(frozen=True, slots=True)
class _Shape:
    """Columns of one table, by name, and those of its primary key."""

    columns: tuple[str, ...]
    key: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Difference:
    """One table that is not the same as on the home.

    Attributes:
        physical: the physical shard that differs.
        table: name of the table.
        rows: its number of rows there; None where it has other columns or does not exist.
        expected: the home's number of rows; None where the home has no such table.
    """

    physical: str
    table: str
    rows: int | None
    expected: int | None


@dataclass(frozen=True, slots=True)
class ReferenceCheck:
    """What was found.

    Attributes:
        home: name of the physical shard that the others are compared with.
        tables: number of rows on the home by table.
        differences: what is not the same.
        failed: why a physical shard could not be compared, or repaired, by name.
        repaired: rows put or removed, by physical shard; of `repair` only.
    """

    home: str
    tables: Mapping[str, int]
    differences: tuple[Difference, ...]
    failed: Mapping[str, ShardkitError]
    repaired: Mapping[str, int]


def check(topology: Topology, *, patience: float | None = None) -> ReferenceCheck:
    """Compare every reference table with the home's; changes nothing.

    Broadcasts wait while it runs, so that no difference is one that is being written.

    Args:
        topology: the cluster.
        patience: seconds to wait for each answer of a server; None for ever.

    Raises:
        EndpointUnavailableError: the home does not answer (retryable).
        TryAgainError: a broadcast holds the lock too long (retryable).
    """
    return _run(topology, repairs=False, patience=patience)


def repair(topology: Topology) -> ReferenceCheck:
    """Make every reference table the same as the home's, in one transaction per server.

    Rows that are the same are not touched. Broadcasts wait while it runs.

    Raises:
        EndpointUnavailableError: the home does not answer (retryable).
        TryAgainError: a broadcast holds the lock too long (retryable).
        RefusedError: a table that differs has no primary key or other columns than the home's.
    """
    return _run(topology, repairs=True)


def _run(topology: Topology, *, repairs: bool, patience: float | None = None) -> ReferenceCheck:
    home, *others = sorted(topology.physical)
    differences: list[Difference] = []
    failed: dict[str, ShardkitError] = {}
    repaired: dict[str, int] = {}
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(_locked(topology, home, patience, repairs=repairs))
        shapes = _shapes(first)
        expected = {name: _digest(first, name, shape) for name, shape in shapes.items()}
        for physical in others:
            try:
                with _locked(topology, physical, patience, repairs=repairs) as connection:
                    found = _compared(connection, physical, shapes, expected)
                    differences += found
                    if repairs and found:
                        repaired[physical] = _repaired(first, connection, found, shapes)
            except (EndpointUnavailableError, TryAgainError, RefusedError) as error:
                failed[physical] = error
            except psycopg.Error as error:
                failed[physical] = _told(error, f"{physical}/primary")
    rows = {name: count for name, (count, _) in expected.items()}
    return ReferenceCheck(home, rows, tuple(differences), failed, repaired)


@contextlib.contextmanager
def _locked(
    topology: Topology, physical: str, patience: float | None, *, repairs: bool
) -> Iterator[Connection]:
    """Open a transaction on a server that holds the lock of broadcasts."""
    shard = topology.physical[physical]
    url = None if repairs else shard.looking_url
    with connect(shard, application="shardkit reference", patience=patience, url=url) as connection:
        connection.execute(_SETTINGS)
        connection.execute(f"SET lock_timeout = '{LOCK_TIMEOUT}s'".encode())
        with connection.transaction():
            try:
                connection.execute("SELECT pg_advisory_xact_lock(%s)", (LOCK_KEY,))
            except psycopg.errors.LockNotAvailable as error:
                raise TryAgainError(
                    f"a write of reference tables holds the lock for {LOCK_TIMEOUT} s",
                    hint="see shardkit twophase status for what is in doubt",
                    endpoint=f"{physical}/primary",
                ) from error
            yield connection


def _shapes(connection: Connection) -> dict[str, _Shape]:
    rows = connection.execute(_TABLES, {"schema": REFERENCE_SCHEMA}).fetchall()
    return {name: _Shape(tuple(columns or ()), tuple(key or ())) for name, _, columns, key in rows}


def _row(shape: _Shape) -> sql.Composed:
    """Return one row as text, the same wherever the values are."""
    columns = sql.SQL(", ").join(map(sql.Identifier, shape.columns))
    return sql.SQL("json_build_array({})::text").format(columns)


def _digest(connection: Connection, table: str, shape: _Shape) -> tuple[int, str]:
    # AccessShareLock. The sum of the first 64 bits of each row's SHA-256.
    row = connection.execute(
        sql.SQL(
            "SELECT count(*), coalesce(sum(('x' || encode(substr(sha256(convert_to({row}, 'UTF8')),"
            " 1, 8), 'hex'))::bit(64)::bigint::numeric), 0)::text FROM {table}"
        ).format(row=_row(shape), table=sql.Identifier(REFERENCE_SCHEMA, table))
    ).fetchone()
    assert row is not None
    return int(row[0]), str(row[1])


def _compared(
    connection: Connection,
    physical: str,
    shapes: Mapping[str, _Shape],
    expected: Mapping[str, tuple[int, str]],
) -> list[Difference]:
    found = []
    here = _shapes(connection)
    for table in sorted(shapes.keys() | here.keys()):
        wanted = expected.get(table)
        if table not in here or table not in shapes or here[table] != shapes[table]:
            found.append(Difference(physical, table, None, wanted[0] if wanted else None))
            continue
        digest = _digest(connection, table, shapes[table])
        if digest != wanted:
            found.append(Difference(physical, table, digest[0], expected[table][0]))
    return found


def _repaired(
    home: Connection,
    connection: Connection,
    found: list[Difference],
    shapes: Mapping[str, _Shape],
) -> int:
    """Put what differs, parents first, and remove what is too much, children first."""
    for difference in found:
        key = shapes[difference.table].key if difference.table in shapes else ()
        if difference.rows is None or not key:
            raise RefusedError(
                f"{REFERENCE_SCHEMA}.{difference.table} cannot be repaired on "
                f"{difference.physical!r}: "
                + (
                    "it has no primary key" if difference.rows is not None else "its columns differ"
                ),
                hint="run shardkit migrate apply, then repair again",
            )
    names = {difference.table for difference in found}
    tables = [(name, shape) for name, shape in shapes.items() if name in names]
    n_rows = 0
    for name, shape in tables:
        n_rows += _put(home, connection, name, shape)
    for name, shape in reversed(tables):
        n_rows += _remove(home, connection, name, shape)
    return n_rows


def _put(home: Connection, connection: Connection, name: str, shape: _Shape) -> int:
    table = sql.Identifier(REFERENCE_SCHEMA, name)
    query = sql.SQL("SELECT {} FROM {}").format(_row(shape), table)
    here = {row[0] for row in connection.execute(query)}
    json = sql.SQL("SELECT {}, row_to_json(t)::text FROM {} AS t").format(_row(shape), table)
    missing = [row[1] for row in home.execute(json) if row[0] not in here]
    rest = [column for column in shape.columns if column not in shape.key]
    listed = sql.SQL(", ").join(map(sql.Identifier, shape.columns))
    update = sql.SQL(", ").join(
        sql.SQL("{0} = excluded.{0}").format(sql.Identifier(column)) for column in rest
    )
    put = sql.SQL(
        "INSERT INTO {table} ({listed}) OVERRIDING SYSTEM VALUE SELECT {listed} "
        "FROM json_populate_recordset(NULL::{table}, %s::json) ON CONFLICT ({key}) DO {action}"
    ).format(
        table=table,
        listed=listed,
        key=sql.SQL(", ").join(map(sql.Identifier, shape.key)),
        action=sql.SQL("UPDATE SET {}").format(update) if rest else sql.SQL("NOTHING"),
    )
    for start in range(0, len(missing), 1000):
        some = ",".join(missing[start : start + 1000])
        connection.execute(put, (f"[{some}]",))
    return len(missing)


def _remove(home: Connection, connection: Connection, name: str, shape: _Shape) -> int:
    table = sql.Identifier(REFERENCE_SCHEMA, name)
    key = _row(_Shape(shape.key, shape.key))
    query = sql.SQL("SELECT {} FROM {}").format(key, table)
    kept = {row[0] for row in home.execute(query)}
    gone = [row[0] for row in connection.execute(query) if row[0] not in kept]
    if gone:
        connection.execute(
            sql.SQL("DELETE FROM {} WHERE {} = ANY (%s)").format(table, key), (gone,)
        )
    return len(gone)


def _told(error: psycopg.Error, endpoint: str) -> ShardkitError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    kind = EndpointUnavailableError if isinstance(error, psycopg.OperationalError) else RefusedError
    return kind(reason, endpoint=endpoint)
