"""Which classes can be cached, as they are mapped: their columns, and the one of the version.

Called by `shardkit.models` when a class with `__cache_ttl__` is mapped, and by `shardkit.cached`,
which makes the plan. Needs nothing of the `cache` extra. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, Self, cast
from uuid import UUID

from sqlalchemy import BigInteger, Column, FetchedValue, MetaData, Table, Update
from sqlalchemy.orm import ColumnProperty, Mapper, mapped_column
from sqlalchemy.types import NullType

from shardkit.caching.columns import Codec, codec_of, is_exact_key
from shardkit.errors import NotCacheableError

__all__ = [
    "CHANGED",
    "LONGEST_TTL",
    "TAGS",
    "VERSION",
    "cacheable_columns",
    "cached_tables",
    "identity_of",
    "is_cached",
    "keep_cached",
    "version_column",
]

VERSION: Final = "version"
"""Name of the attribute and the column that hold a row's version."""

CHANGED: Final = "shardkit.cache"
"""Topic of the events that say which cached rows were changed; relays handle it by themselves."""

_INFO: Final = "shardkit.cached"

TAGS: Final[dict[type, str]] = {int: "", str: "s", bytes: "b", UUID: "u"}
"""How `identity_of` reads the values of a key from JSON."""

LONGEST_TTL: Final = 30 * 24 * 3600.0
"""Seconds; Memcached reads more as a date. Source: memcached, doc/protocol.txt, "Expiration"."""


def version_column() -> Any:
    """Return the column that a class with `__cache_ttl__` gets; the server raises its values.

    It has a default, so that it can be added to a table with rows in an instant. Source: ALTER
    TABLE, PostgreSQL manual: a constant default is not written to the rows.
    """
    return mapped_column(BigInteger, nullable=False, server_default="0")


def cacheable_columns(
    mapper: Mapper[Any], *, is_mapped: bool
) -> dict[str, tuple[Column[Any], Codec]]:
    """Return the columns of a class that are cached, with their codecs, by attribute.

    Args:
        mapper: the class.
        is_mapped: whether every class is mapped, so that foreign keys have their types.

    Raises:
        NotCacheableError: the rows of the class cannot be; says what to write.
    """
    cls = mapper.class_
    name, ttl = cls.__name__, cls.__cache_ttl__
    if (
        not isinstance(ttl, int | float)
        or isinstance(ttl, bool)
        or not (math.isfinite(ttl) and 1 <= ttl <= LONGEST_TTL)
    ):
        raise NotCacheableError(
            f"{name}: __cache_ttl__ is {ttl!r}",
            hint=f"give seconds from 1 to {LONGEST_TTL:,.0f}, or leave it out for no cache",
        )
    if mapper.inherits is not None or mapper.polymorphic_on is not None:
        raise NotCacheableError(
            f"{name}: classes that inherit from each other share rows, which are not cached",
            hint="leave out __cache_ttl__, or map the classes to tables of their own",
        )
    if len(mapper.tables) != 1 or not isinstance(mapper.local_table, Table):
        raise NotCacheableError(
            f"{name}: it is mapped to more than one table", hint="leave out __cache_ttl__"
        )
    version = mapper.columns.get(VERSION)
    if (
        version is None
        or version.name != VERSION
        or not isinstance(version.type, BigInteger)
        or version.nullable
    ):
        raise NotCacheableError(
            f"{name}: the version of its rows has no column",
            hint="write version: Mapped[int] = mapped_column(BigInteger)",
        )
    found: dict[str, tuple[Column[Any], Codec]] = {}
    attributes = {column: key for key, column in mapper.columns.items()}
    for column in mapper.local_table.columns:
        attribute = attributes.get(column)
        if attribute is None or (isinstance(column.type, NullType) and not is_mapped):
            continue
        if cast("ColumnProperty[Any]", mapper.get_property(attribute)).deferred:
            if column.primary_key or column is version:
                raise NotCacheableError(
                    f"{name}: {attribute} is deferred", hint="load it with the row"
                )
            continue
        codec = codec_of(column.type)
        if codec is None:
            raise NotCacheableError(
                f"{name}: values of {column.name}, a {type(column.type).__name__}, are not cached",
                hint="defer it: mapped_column(…, deferred=True), or leave out __cache_ttl__",
            )
        if column.primary_key and not is_exact_key(column.type):
            raise NotCacheableError(
                f"{name}: PostgreSQL may find one row by several values of {column.name}, "
                f"a {type(column.type).__name__}",
                hint="use BigInteger, Text, Uuid or LargeBinary, without a collation",
            )
        found[attribute] = (column, codec)
    return found


class _ReturningUpdate(Update):
    """An UPDATE that remembers what it is with its RETURNING.

    SQLAlchemy keeps the UPDATE of a mapper's flushes, and adds the columns to return at each
    flush: making that statement and its cache key anew is a twentieth of a small transaction.
    """

    inherit_cache = True

    def return_defaults(self, *columns: Any, **options: Any) -> Self:
        """Return the same statement for the same columns."""
        if options:
            return super().return_defaults(*columns, **options)
        known: tuple[Any, Self] | None = self.__dict__.get(_RETURNING)
        if known is None or known[0] != columns:
            known = (columns, super().return_defaults(*columns))
            self._set_memoized_attribute(_RETURNING, known)
        return known[1]


_RETURNING: Final = "_shardkit_returning"


def keep_cached(mapper: Mapper[Any]) -> None:
    """Have the statements that write objects of a class return their rows as they then are.

    An UPDATE sets what was changed, and returns the rest: what others have changed since the
    object was loaded must not come back through the cache.
    """
    table = cast("Table", mapper.local_table)
    table.info[_INFO] = True
    table.update = lambda: _ReturningUpdate(table)  # type: ignore[method-assign]
    mapper.base_mapper.eager_defaults = True
    version = mapper.columns[VERSION]
    if version.server_default is None:  # the program's own column; the trigger fills it
        version.server_default = FetchedValue()
    for attribute, column in cast("Any", mapper.columns).items():
        if not isinstance(column, Column):  # an expression, which is refused later
            continue
        deferred = cast("ColumnProperty[Any]", mapper.get_property(attribute)).deferred
        if not (column.primary_key or deferred or column.server_onupdate is not None):
            column.server_onupdate = FetchedValue(for_update=True)


def is_cached(table: Any) -> bool:
    """Tell whether the rows of a table are cached."""
    return isinstance(table, Table) and _INFO in table.info


def cached_tables(metadata: MetaData) -> dict[str, tuple[str, ...]]:
    """Return the columns of the primary key, as `tag:name`, of every cached table."""
    return {
        table.name: tuple(f"{TAGS[c.type.python_type]}:{c.name}" for c in table.primary_key)
        for table in metadata.sorted_tables
        if is_cached(table)
    }


def identity_of(tags: Sequence[str], values: Sequence[Any]) -> tuple[Any, ...]:
    """Return a primary key from an event that says it was changed."""
    return tuple(_READ[tag](value) for tag, value in zip(tags, values, strict=True))


_READ: Final[dict[str, Any]] = {
    "": int,
    "s": str,
    "u": UUID,
    "b": lambda text: bytes.fromhex(text.removeprefix("\\x")),
}
