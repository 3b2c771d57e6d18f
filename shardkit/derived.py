"""Lists and counts of rows that are cached: what a program declares beside its models.

    newest = CachedList(Photo.owner_id, order_by=Photo.id.desc(), limit=60)
    followers = CachedCount(Follower.followee_id)

    session.cached(newest, owner_id)       # ids, newest first
    session.cached(followers, user_id)     # 17

Sessions ask here for statements, `shardkit.derivedplan` has the entries, and triggers
(`shardkit.ops.derivedtriggers`) say which lists a transaction has changed. No I/O; needs nothing
of the `cache` extra.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, Generic, NamedTuple, Self, TypeVar, cast
from uuid import UUID

from sqlalchemy import Column, ColumnElement, MetaData, Select, Table, UnaryExpression, func, select
from sqlalchemy.orm import InstrumentedAttribute
from sqlalchemy.sql import operators

from shardkit.cacheable import LONGEST_TTL, TAGS, cached_tables
from shardkit.caching.columns import is_exact_key
from shardkit.caching.lives import DEFAULT_LIVES, Lives
from shardkit.errors import InvalidShardKeyError, NotCacheableError
from shardkit.models import sharding_of
from shardkit.router import Router

__all__ = [
    "LONGEST_LIST",
    "Cached",
    "CachedCount",
    "CachedList",
    "Derived",
    "Watch",
    "derived_of",
    "is_watched",
    "watched_columns",
]

LONGEST_LIST: Final = 10_000
"""Values a list may have: more is not worth reading whole, and near the size of an entry."""

_INFO: Final = "shardkit.derived"

_ORDERS: Final[Mapping[Any, str]] = {
    operators.desc_op: "DESC",
    operators.asc_op: "ASC",
    operators.nulls_first_op: "NULLS FIRST",
    operators.nulls_last_op: "NULLS LAST",
}

V_co = TypeVar("V_co", covariant=True)


class Watch(NamedTuple):
    """What triggers have to watch so that a list or count is never old.

    Attributes:
        table: whose rows.
        entry: the first part of the names of its entries.
        number: of twelve letters: what tells it from others of the table, and names its triggers.
        key: `tag:name` of the columns of its key, as `shardkit.cacheable.identity_of` reads them.
        columns: what it depends on: rows that change in nothing of this change no list.
    """

    table: str
    entry: str
    number: str
    key: tuple[str, ...]
    columns: tuple[str, ...]


class Cached(NamedTuple):
    """What of some models is cached, as triggers have to know it.

    Attributes:
        tables: columns of the primary key by table: `shardkit.cacheable.cached_tables`.
        watches: what lists and counts depend on, each once.
    """

    tables: Mapping[str, Sequence[str]]
    watches: tuple[Watch, ...]

    @classmethod
    def of(cls, metadata: MetaData) -> Self:
        """Return what is cached of some models.

        Raises:
            NotCacheableError: a list or count cannot be kept exactly.
        """
        found = {derived.watch: None for derived in derived_of(metadata)}
        return cls(cached_tables(metadata), tuple(found))


class Derived(Generic[V_co]):
    """A list or a count of the rows of a table that have one key; see the two kinds.

    Attributes:
        table: whose rows.
        key: columns; the logical shard of the rows is that of one of them.
        order: columns and how each orders, as SQL; empty for a count.
        limit: of a list; 0 for a count.
        values: columns of which a list has the values; none for a count.
        lives: of its entries.
        name: as listeners are told.

    *Invariant:* it is a function of the values that rows of one key have in the watched columns.
    """

    def __init__(
        self,
        key: Sequence[Any],
        *,
        order: Sequence[tuple[Column[Any], str]],
        limit: int,
        values: Sequence[Column[Any]],
        ttl: float,
    ) -> None:
        kind = type(self).__name__
        self.key = tuple(_column(each, f"the key of a {kind}") for each in key)
        if not self.key or len({id(column.table) for column in self.key}) != 1:
            raise NotCacheableError(
                f"a {kind} needs columns of one table as its key",
                hint=f"write {kind}(Photo.owner_id, …)",
            )
        self.table: Table = self.key[0].table
        self.order = tuple(order)
        self.limit = limit
        self.values = tuple(values)
        self.name = f"{kind}({', '.join(str(column) for column in self.key)})"
        if type(ttl) not in (int, float) or not (math.isfinite(ttl) and 1 <= ttl <= LONGEST_TTL):
            raise NotCacheableError(
                f"{self.name}: ttl is {ttl!r}", hint=f"give seconds from 1 to {LONGEST_TTL:,.0f}"
            )
        self.lives: Lives = DEFAULT_LIVES._replace(value=float(ttl))
        sharding = sharding_of(self.table)
        names = {} if sharding is None else sharding.placing
        placing = [n for n, column in enumerate(self.key) if column.name in names]
        if not placing:
            raise NotCacheableError(
                f"{self.name}: rows of one key are on many logical shards",
                hint="use the shard key, alone or with others; for another column keep a table "
                "that is sharded by it",
            )
        self._place = placing[0]
        self._rule = names[self.key[self._place].name]
        self.table.info.setdefault(_INFO, []).append(self)

    def __repr__(self) -> str:
        return self.name

    # -- one key

    def identity(self, key: Any) -> tuple[Any, ...]:
        """Return a key as a tuple.

        Raises:
            InvalidShardKeyError: it has too few or too many values.
        """
        found = tuple(key) if isinstance(key, tuple | list) else (key,)
        if len(found) != len(self.key):
            raise InvalidShardKeyError(f"{self.name} has {len(self.key)} values, not {len(found)}")
        return found

    def names_row(self, identity: Sequence[Any]) -> bool:
        """Tell whether a key is written as the database writes it: then it has one name."""
        return all(
            type(value) is column.type.python_type
            and (type(value) is not int or -(2**63) <= value < 2**63)
            for value, column in zip(identity, self.key, strict=True)
        )

    def shard_of(self, router: Router, identity: Sequence[Any]) -> int:
        """Return the logical shard of the rows of a key.

        Raises:
            InvalidShardKeyError: it cannot place rows.
        """
        return router.shard(self._rule, identity[self._place])

    def statement(self, identity: Sequence[Any]) -> Select[Any]:
        """Return what reads it from a database, as any program would."""
        matches = [column == value for column, value in zip(self.key, identity, strict=True)]
        if not self.values:
            return select(func.count()).select_from(self.table).where(*matches)
        found = select(*self.values).where(*matches).limit(self.limit)
        return found.order_by(*(_ordering(column, how) for column, how in self.order))

    def result(self, rows: Sequence[Any]) -> V_co:
        """Return what the rows of `statement` are."""
        if not self.values:
            return cast("V_co", rows[0][0])
        return cast("V_co", [row[0] if len(self.values) == 1 else tuple(row) for row in rows])

    # -- what is watched

    @functools.cached_property
    def watch(self) -> Watch:
        """What its triggers watch.

        Raises:
            NotCacheableError: a column has a type of which equal values look different.
        """
        for column in (*self.key, *self.values):
            if not is_exact_key(column.type):
                raise NotCacheableError(
                    f"{self.name}: {column.name}, a {type(column.type).__name__}, may be written "
                    "in several ways",
                    hint="use BigInteger, Text, Uuid or LargeBinary, without a collation",
                )
        key = [f"{TAGS[_python_type(column)]}:{column.name}" for column in self.key]
        listed = (*self.values, *(column for column, _ in self.order))
        columns = dict.fromkeys(column.name for column in (*self.key, *listed))
        text = "\t".join(
            [
                type(self).__name__,
                self.table.name,
                ",".join(key),
                ",".join(f"{TAGS[_python_type(each)]}:{each.name}" for each in self.values),
                ",".join(f"{column.name} {how}" for column, how in self.order),
                str(self.limit),
            ]
        )
        number = hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
        name = self.table.name
        return Watch(name, f"{name}|{number}", number, tuple(key), tuple(columns))


class CachedList(Derived[list[Any]]):
    """The first values of a column among the rows of one key, in an order.

    Args:
        *key: attributes of a sharded class; one is its shard key.
        order_by: attributes, or such with `desc()`, `asc()`, `nulls_first()`, `nulls_last()`. The
            primary key decides where they do not.
        limit: values it has at most, from 1 to 10,000.
        of: attribute whose values it has; several make it a list of tuples; None for the primary
            key, or what the key leaves of it.
        ttl: seconds an entry may stay, from 1.

    Raises:
        NotCacheableError: it cannot be kept exactly; says what to write.

    Example:
        >>> last = Photo.id.desc()  # doctest: +SKIP
        >>> newest = CachedList(Photo.owner_id, order_by=last, limit=60)  # doctest: +SKIP
        >>> session.get_many(Photo, session.cached(newest, ana.id))  # doctest: +SKIP
    """

    def __init__(
        self, *key: Any, order_by: Any, limit: int, of: Any = None, ttl: float = 300.0
    ) -> None:
        if type(limit) is not int or not 1 <= limit <= LONGEST_LIST:
            raise NotCacheableError(
                f"a CachedList has a limit of {limit!r}", hint=f"give 1 to {LONGEST_LIST:,}"
            )
        columns = [_column(each, "the key of a CachedList") for each in key]
        primary = list(columns[0].table.primary_key) if columns else []
        orders = order_by if isinstance(order_by, tuple | list) else (order_by,)
        order = [_ordered(each) for each in orders]
        named = [column for column, _ in order]
        order += [(column, "ASC") for column in primary if column not in named]
        if any(column.table is not columns[0].table for column, _ in order if columns):
            raise NotCacheableError(
                "a CachedList is ordered by another table's column", hint="order by one of its own"
            )
        several = of if isinstance(of, tuple | list) else (of,)
        values = [_value(each, columns, primary) for each in several]
        super().__init__(columns, order=order, limit=limit, values=values, ttl=ttl)


class CachedCount(Derived[int]):
    """How many rows have one key.

    Args:
        *key: attributes of a sharded class; one is its shard key.
        ttl: seconds an entry may stay, from 1.

    Raises:
        NotCacheableError: it cannot be kept exactly; says what to write.

    Example:
        >>> likes = CachedCount(Like.photo_id)  # doctest: +SKIP
        >>> session.cached_many(likes, [photo.id for photo in photos])  # doctest: +SKIP
    """

    def __init__(self, *key: Any, ttl: float = 300.0) -> None:
        super().__init__(key, order=(), limit=0, values=(), ttl=ttl)

    def statement_of_many(self, identities: Sequence[Sequence[Any]]) -> Select[Any]:
        """Return what reads counts of keys of one column, with their keys; none for no rows."""
        (column,) = self.key
        counts = select(column, func.count()).where(column.in_([each for (each,) in identities]))
        return counts.group_by(column)


def derived_of(metadata: MetaData) -> list[Derived[Any]]:
    """Return the lists and counts that are declared of some models."""
    return [derived for table in metadata.sorted_tables for derived in _derived_of(table)]


def is_watched(table: Any) -> bool:
    """Tell whether lists or counts are made of the rows of a table."""
    return isinstance(table, Table) and _INFO in table.info


def watched_columns(table: Table) -> frozenset[str]:
    """Return the columns on which lists and counts of a table's rows depend."""
    return frozenset(name for derived in _derived_of(table) for name in derived.watch.columns)


def _derived_of(table: Table) -> Sequence[Derived[Any]]:
    return cast("Sequence[Derived[Any]]", table.info.get(_INFO, ()))


def _column(attribute: Any, what: str) -> Column[Any]:
    """Return the column of an attribute."""
    columns = getattr(getattr(attribute, "property", None), "columns", (None,))
    column = columns[0] if isinstance(attribute, InstrumentedAttribute) else attribute
    if not isinstance(column, Column):
        raise NotCacheableError(
            f"{what} has {attribute!r}, which is no mapped column", hint="write Photo.owner_id"
        )
    table: Any = column.table
    if not isinstance(table, Table) or sharding_of(table) is None:
        raise NotCacheableError(
            f"{what} has {attribute}, which is no column of a sharded class",
            hint="use a column of a class that derives from Sharded",
        )
    return column


def _ordered(given: Any) -> tuple[Column[Any], str]:
    """Return the column of an ORDER BY element, and how it orders, as SQL."""
    words: list[str] = []
    element = given
    while isinstance(element, UnaryExpression) and element.modifier in _ORDERS:
        words.insert(0, _ORDERS[element.modifier])
        element = element.element
    if isinstance(element, ColumnElement) and not isinstance(element, Column):
        raise NotCacheableError(
            f"a CachedList is ordered by {given}", hint="order by columns, with desc() or without"
        )
    if isinstance(element, Column) and isinstance(element.table, Table):
        element = element.table.c.get(element.key, element)  # as it was before it had annotations
    if not words or words[0].startswith("NULLS"):
        words.insert(0, "ASC")
    return _column(element, "the order of a CachedList"), " ".join(words)


def _ordering(column: Column[Any], how: str) -> Any:
    found: Any = column.desc() if how.startswith("DESC") else column.asc()
    if how.endswith("NULLS FIRST"):
        return found.nulls_first()
    return found.nulls_last() if how.endswith("NULLS LAST") else found


def _value(of: Any, key: Sequence[Column[Any]], primary: Sequence[Column[Any]]) -> Column[Any]:
    if of is not None:
        column = _column(of, "the values of a CachedList")
        if key and column.table is not key[0].table:
            raise NotCacheableError(
                f"a CachedList has values of {of}", hint="use a column of the same class"
            )
        return column
    rest = list(primary) if len(primary) == 1 else [c for c in primary if c not in set(key)]
    if len(rest) != 1:
        raise NotCacheableError(
            "a CachedList of a class with a primary key of several columns needs to know which",
            hint="say of=Follower.follower_id",
        )
    return rest[0]


def _python_type(column: Column[Any]) -> type[Any]:
    found: type[Any] = column.type.python_type
    assert found in (int, str, bytes, UUID), "an exact key"
    return found
