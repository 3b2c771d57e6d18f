"""Whether two servers hold the same rows of a logical shard, while one of them follows the other.

Each table is hashed on its server, in buckets of the primary key, under two snapshots that are
milliseconds apart: the second is taken as soon as the target has applied what the first has seen.
Rows of buckets that differ are compared one by one, and again after the lag has passed, until they
agree, are shown to differ, or change too often to say: those are looked at again in the fence.
Called by the driver.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

import psycopg
from psycopg import sql

from shardkit.ops.moves.copying import Table, tables_of
from shardkit.topology import schema_name

__all__ = ["ALONE", "Diff", "compare", "differing", "frozen", "prepare", "settle"]

Connection = psycopg.Connection[Any]
Key = tuple[str | None, ...]

ALONE: Final = frozenset({"shardkit_id_state"})
"""Left out while writers go on: its one row changes all the time, and draining compares it."""

_PER_BUCKET: Final = 512
_MOST_BUCKETS: Final = 1 << 16

HOT: Final = 1000
"""Rows that may change too often to be compared; more, and the diff is not clean."""

_ROUNDS: Final = 12

# The same text for the same value, whatever the server's or the role's settings are.
_SETTINGS: Final = """
SET TimeZone = 'UTC'; SET DateStyle = 'ISO, YMD'; SET IntervalStyle = 'postgres';
SET extra_float_digits = 1; SET bytea_output = 'hex'; SET xmloption = 'content';
SET client_encoding = 'UTF8'; SET search_path = pg_catalog; SET jit = off;
SET statement_timeout = 0; SET row_security = off
"""

# AccessShareLock. Sorted by the hashes themselves, so that no language has a say.
_BUCKETS: Final = """
SELECT bucket, count(*), md5(string_agg(hash, '' ORDER BY hash)) FROM (
    SELECT hashtextextended(ROW({key})::text, 0) & {mask} AS bucket,
        md5(ROW({columns})::text) AS hash FROM {table}
) AS r GROUP BY bucket
"""

_ROWS: Final = """
SELECT ARRAY[{texts}], md5(ROW({columns})::text) FROM {table}
WHERE hashtextextended(ROW({key})::text, 0) & {mask} = ANY (%s)
"""

_KEYED: Final = """
SELECT ARRAY[{texts}], md5(ROW({columns})::text) FROM {table}
WHERE ({key}) IN (SELECT {casts} FROM unnest({arrays}) AS u ({names}))
"""


@dataclass
class Diff:
    """What a comparison has found.

    Attributes:
        n_rows: that were compared.
        differing: keys of rows that differ, by table.
        hot: keys of rows that change too often to say, by table.
    """

    n_rows: int = 0
    differing: dict[str, list[Key]] = field(default_factory=dict)
    hot: dict[str, list[Key]] = field(default_factory=dict)

    @property
    def is_clean(self) -> bool:
        """Whether nothing differs and little is left to look at."""
        return not self.differing and sum(map(len, self.hot.values())) <= HOT

    def told(self) -> str:
        """Return what differs, for people."""
        named = [
            f"{sum(map(len, found.values()))} rows {what} ({name} {found[name][0]})"
            for what, found in (("differ", self.differing), ("never settle", self.hot))
            for name in [*found][:1]
        ]
        return "; ".join(named) or "nothing differs"


def prepare(connection: Connection) -> None:
    """Make a session write every value in the one spelling."""
    connection.execute(_SETTINGS)


def compare(
    source: Connection,
    target: Connection,
    logical_shard: int,
    caught_up: Callable[[], None],
    on_table: Callable[[str, int, int], None],
) -> Diff:
    """Compare all rows while writers go on.

    Args:
        source: after `prepare`, in autocommit mode.
        target: likewise.
        logical_shard: which.
        caught_up: returns once the target has applied what the source has committed before.
        on_table: told of every table, how many are through, and of how many.
    """
    found = Diff()
    tables = [t for t in tables_of(source, logical_shard) if t.name not in ALONE]
    with source.transaction(force_rollback=True), target.transaction(force_rollback=True):
        for connection in (source, target):
            connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        source.execute("SELECT 1 FROM pg_class LIMIT 1")  # takes the snapshot
        caught_up()
        target.execute("SELECT 1 FROM pg_class LIMIT 1")
        suspects = _suspects(source, target, logical_shard, tables, found, on_table)
    settle(source, target, logical_shard, suspects, caught_up, found)
    return found


def frozen(
    source: Connection,
    target: Connection,
    logical_shard: int,
    on_table: Callable[[str, int, int], None],
) -> Diff:
    """Compare all rows of two transactions whose snapshots were taken while nobody could write."""
    found = Diff()
    tables = tables_of(source, logical_shard)
    for name, keys in _suspects(source, target, logical_shard, tables, found, on_table).items():
        found.differing[name] = sorted(keys, key=str)
    return found


def settle(  # noqa: PLR0917  both sides of one comparison
    source: Connection,
    target: Connection,
    logical_shard: int,
    suspects: Mapping[str, set[Key]],
    caught_up: Callable[[], None],
    found: Diff,
) -> None:
    """Compare rows one by one after the lag has passed, until all is said about them."""
    tables = {table.name: table for table in tables_of(source, logical_shard)}
    firm: dict[str, set[Key]] = {}
    for _ in range(_ROUNDS):
        if not any(suspects.values()):
            break
        before = {n: _keyed(source, logical_shard, tables[n], k) for n, k in suspects.items()}
        caught_up()
        left: dict[str, set[Key]] = {}
        for name, keys in suspects.items():
            copied = _keyed(target, logical_shard, tables[name], keys)
            after = _keyed(source, logical_shard, tables[name], keys)
            for key in keys:
                first, last = before[name].get(key), after.get(key)
                if copied.get(key) in (first, last):
                    continue
                # Unchanged on the source, twice, and still another row on the target.
                if first == last and key in firm.get(name, ()):
                    found.differing.setdefault(name, []).append(key)
                    continue
                if first == last:
                    firm.setdefault(name, set()).add(key)
                left.setdefault(name, set()).add(key)
        suspects = left
    for name, keys in suspects.items():
        if keys:
            found.hot[name] = sorted(keys, key=str)


def differing(
    source: Connection, target: Connection, logical_shard: int, hot: Mapping[str, Sequence[Key]]
) -> list[str]:
    """Return the tables of which some rows differ, of few rows that are frozen on both sides."""
    tables = {table.name: table for table in tables_of(source, logical_shard)} if hot else {}
    return [
        name
        for name, keys in hot.items()
        if _keyed(source, logical_shard, tables[name], keys)
        != _keyed(target, logical_shard, tables[name], keys)
    ]


def _suspects(  # noqa: PLR0917  both sides of one comparison
    source: Connection,
    target: Connection,
    logical_shard: int,
    tables: Sequence[Table],
    found: Diff,
    on_table: Callable[[str, int, int], None],
) -> dict[str, set[Key]]:
    suspects: dict[str, set[Key]] = {}
    with ThreadPoolExecutor(2) as pool:
        for number, table in enumerate(tables):
            on_table(table.name, number, len(tables))
            mask = _mask(table)

            def ask(
                query: str,
                *arguments: Any,
                table: Table = table,
                mask: int = mask,
            ) -> list[list[Any]]:
                text = _query(query, logical_shard, table, mask)
                asked = [pool.submit(_all, each, text, arguments) for each in (source, target)]
                return [future.result() for future in asked]

            here, there = (
                {bucket: (n, digest) for bucket, n, digest in rows} for rows in ask(_BUCKETS)
            )
            found.n_rows += sum(n for n, _ in here.values())
            odd = [b for b in here.keys() | there.keys() if here.get(b) != there.get(b)]
            if odd:
                left, right = ({tuple(key): row for key, row in rows} for rows in ask(_ROWS, odd))
                keys = {k for k in left.keys() | right.keys() if left.get(k) != right.get(k)}
                suspects[table.name] = keys
    return suspects


def _all(connection: Connection, query: sql.Composed, arguments: Sequence[Any]) -> list[Any]:
    return connection.execute(query, arguments).fetchall()


def _mask(table: Table) -> int:
    buckets = 1
    while buckets < min(_MOST_BUCKETS, table.rows // _PER_BUCKET):
        buckets *= 2
    return buckets - 1


def _query(query: str, logical_shard: int, table: Table, mask: int = 0) -> sql.Composed:
    n = range(len(table.key))
    return sql.SQL(query).format(
        key=sql.SQL(", ").join(map(sql.Identifier, table.key)),
        texts=sql.SQL(", ").join(sql.SQL("{}::text").format(sql.Identifier(k)) for k in table.key),
        columns=table.listed,
        table=sql.Identifier(schema_name(logical_shard), table.name),
        mask=mask,
        casts=sql.SQL(", ").join(
            sql.SQL("{}::{}").format(sql.Identifier(f"k{i}"), sql.SQL(table.key_types[i]))
            for i in n
        ),
        arrays=sql.SQL(", ").join(sql.SQL("%s::text[]") for _ in n),
        names=sql.SQL(", ").join(sql.Identifier(f"k{i}") for i in n),
    )


def _keyed(
    connection: Connection, logical_shard: int, table: Table, keys: Iterable[Key]
) -> dict[Key, str]:
    """Return the hashes of rows by key; rows that do not exist are left out."""
    columns = list(zip(*keys, strict=True)) or [() for _ in table.key]
    rows = connection.execute(
        _query(_KEYED, logical_shard, table), [list(column) for column in columns]
    )
    return {tuple(key): digest for key, digest in rows}
