"""How one list or count is cached: the plan of what `shardkit.derived` declares.

An entry holds its key and the values, and as its version the oldest transaction that was running
when the primary was asked: whatever a transaction with a smaller number has committed is in it. So
a transaction's change has the version after its number, and versions of lists compare as those of
rows do, although nobody holds a lock on a list. Source: pg_snapshot_xmin(), PostgreSQL manual,
"Transaction ID and Snapshot Information Functions"; docs/cache.md, "Lists and counts". No I/O.
"""

from __future__ import annotations

import functools
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from sqlalchemy import Column, TextClause, text

from shardkit.cached import Question
from shardkit.caching.lives import Lives
from shardkit.caching.rows import decode_row, encode_row
from shardkit.derived import Derived
from shardkit.topology import schema_name

__all__ = ["DerivedPlan", "derived_plan"]

_LOG: Final = logging.getLogger("shardkit.cache")

_TYPES: Final = {"": "bigint", "s": "text", "b": "bytea", "u": "uuid"}
"""What values of a key are sent as: types that cut nothing off."""

# Locks nothing beyond what a SELECT does. A trigger that this statement sees was there before any
# transaction that it does not see could write: CREATE TRIGGER waits for writers, and they for it.
_ONE_SHARD: Final = """
SELECT w.n, {value}, CAST(CAST(pg_snapshot_xmin(pg_current_snapshot()) AS text) AS bigint),
    EXISTS (SELECT FROM pg_catalog.pg_trigger AS g WHERE g.tgrelid = CAST('{literal}' AS regclass)
        AND g.tgname = 'shardkit_derived_{number}_deleted' AND g.tgenabled <> 'D')
FROM unnest({arrays}) AS w (n, {names})"""
_COUNT: Final = "(SELECT count(*) FROM {table} AS t WHERE {matches})"
_LIST: Final = (
    "ARRAY(SELECT t.{value} FROM {table} AS t WHERE {matches} ORDER BY {order} LIMIT {limit})"
)


class DerivedPlan:
    """How one list or count is cached.

    Attributes:
        derived: what was declared.
        entry: what names of its entries begin with.
        lives: of its entries.
        name: as listeners are told.
        version_index: where the version stands among what `answered` and `decode` return: the
            key, the list or count, the version, and whether its triggers are there.
    """

    __slots__ = (
        "_has_warned",
        "_shape",
        "derived",
        "entry",
        "lives",
        "n_keys",
        "name",
        "version_index",
    )

    def __init__(self, derived: Derived[Any]) -> None:
        self.derived = derived
        self.entry = derived.watch.entry
        self.lives: Lives = derived.lives
        self.name = derived.name
        self.n_keys = len(derived.key)
        self.version_index = self.n_keys + 1
        self._shape = bytes.fromhex(derived.watch.number)
        self._has_warned = False

    def questions(
        self,
        wanted: Sequence[tuple[int, tuple[Any, ...]]],
        group: Callable[[Sequence[int]], Mapping[str, Sequence[int]]],
    ) -> Iterable[Question]:
        """Yield the statements that read lists or counts: one for each server.

        Args:
            wanted: logical shard and key of each.
            group: returns logical shards by physical shard.
        """
        by_shard: dict[int, list[tuple[int, tuple[Any, ...]]]] = defaultdict(list)
        for n, (shard, identity) in enumerate(wanted):
            by_shard[shard].append((n, identity))
        for shards in group(list(by_shard)).values():
            values: dict[str, Any] = {}
            for shard in shards:
                some = by_shard[shard]
                values[f"n_{shard}"] = [n for n, _ in some]
                for at in range(self.n_keys):
                    values[f"key_{at}_{shard}"] = [identity[at] for _, identity in some]
            yield _statement(self.derived, tuple(shards)), values, shards[0]

    def answered(self, row: Sequence[Any], wanted: Sequence[Any]) -> list[Any]:
        """Return the values of a row that a question has found."""
        n, *values, version, is_watched = row
        value = values[0] if len(values) == 1 else values
        return [*wanted[n][1], value, version, is_watched]

    def identity(self, values: Sequence[Any]) -> tuple[Any, ...]:
        """Return the key of a list or count."""
        return tuple(values[: self.n_keys])

    def encode(self, values: Sequence[Any]) -> bytes | None:
        """Return the payload, or None when it must not be cached: nobody would say it is old."""
        if not values[-1]:
            if not self._has_warned:
                self._has_warned = True
                _LOG.warning(
                    "%s is not cached: tables lack its triggers; "
                    "run shardkit migrate apply, with migrations.models",
                    self.name,
                )
            return None
        packed = encode_row(list(values[: self.version_index]))
        return None if packed is None else self._shape + packed

    def decode(self, payload: bytes, version: int | None = None) -> list[Any] | None:
        """Return what `answered` did, or None for bytes that are no such list or count.

        Args:
            payload: of an entry.
            version: of the entry; None where it does not matter any more.
        """
        if not payload.startswith(self._shape):
            return None
        values = decode_row(payload[len(self._shape) :], self.version_index)
        wanted = list if self.derived.values else int
        if values is None or type(values[-1]) is not wanted:
            return None
        return [*values, version, True]

    def value(self, values: Sequence[Any]) -> Any:
        """Return the list or the count; what has several columns is kept by column."""
        found = values[self.n_keys]
        return list(zip(*found, strict=True)) if len(self.derived.values) > 1 else found


@functools.cache
def derived_plan(derived: Derived[Any]) -> DerivedPlan:
    """Return how a list or count is cached.

    Raises:
        NotCacheableError: it cannot be.
    """
    return DerivedPlan(derived)


@functools.lru_cache(maxsize=1024)
def _statement(derived: Derived[Any], shards: tuple[int, ...]) -> TextClause:
    """Return what reads a list or count in some logical shards of one server."""
    found = " UNION ALL ".join(_of_one(derived, shard) for shard in shards)
    return text(found)


def _of_one(derived: Derived[Any], shard: int) -> str:
    table = f"{_quoted(schema_name(shard))}.{_quoted(derived.table.name)}"
    matches = " AND ".join(f"t.{_named(c)} = w.k{n}" for n, c in enumerate(derived.key))
    order = ", ".join(f"t.{_named(column)} {how}" for column, how in derived.order)
    lists = [  # in one order, of one snapshot
        _LIST.format(
            value=_named(column), table=table, matches=matches, order=order, limit=derived.limit
        )
        for column in derived.values
    ]
    value = ", ".join(lists) or _COUNT.format(table=table, matches=matches)
    types = ["integer", *(_TYPES[tag.partition(":")[0]] for tag in derived.watch.key)]
    names = ["n", *(f"key_{n}" for n in range(len(derived.key)))]
    arrays = [f"CAST(:{name}_{shard} AS {kind}[])" for name, kind in zip(names, types, strict=True)]
    return _ONE_SHARD.format(
        value=value,
        literal=table.replace("'", "''"),
        number=derived.watch.number,
        arrays=", ".join(arrays),
        names=", ".join(f"k{n}" for n in range(len(derived.key))),
    )


def _named(column: Column[Any]) -> str:
    return _quoted(column.name)


def _quoted(name: str) -> str:
    """Return an identifier for `text()`, to which a colon is the beginning of a parameter."""
    quoted = name.replace('"', '""').replace(":", "\\:")
    return f'"{quoted}"'
