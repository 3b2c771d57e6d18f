"""ORDER BY, LIMIT and equality of values, as PostgreSQL has them, over rows in the client.

Pure. Used by `shardkit.gather` to put the answers of several servers into one order, and to tell
equal rows; refuses the types on which PostgreSQL and Python could disagree.
"""

from __future__ import annotations

import datetime as dt
import heapq
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    BindParameter,
    Boolean,
    Date,
    DateTime,
    Float,
    Integer,
    Label,
    LargeBinary,
    Numeric,
    String,
    Time,
    TypeCoerce,
    UnaryExpression,
    Uuid,
)
from sqlalchemy.sql import operators
from sqlalchemy.sql.elements import CollationClause, ColumnElement, Grouping

from shardkit.errors import UnsupportedStatementError
from shardkit.statements import Params

__all__ = [
    "EQUATABLE_TYPES",
    "Combine",
    "Merge",
    "Row",
    "SortKey",
    "alike",
    "comparable",
    "count_of",
    "direction",
    "merging",
    "ordering",
    "refuse_unordered",
    "refused",
    "same",
]

Row = Sequence[Any]
Combine = Callable[[list[Row]], list[Row]]
"""Makes rows of rows; may reorder the list it is given."""
Merge = Callable[[Sequence[Iterator[Row]]], Iterator[Row]]
"""Makes rows of the rows of each server, in their order, and holds no more than one of each."""

# Collations differ between servers and from Python; these types order alike everywhere. So would
# intervals, but psycopg makes a year 365 days and PostgreSQL 12 months of 30.
ORDERED_TYPES = (Integer, Numeric, Float, Boolean, Date, DateTime, Time, Uuid, LargeBinary)
EQUATABLE_TYPES = (*ORDERED_TYPES, String)
"""Types whose values are equal in Python exactly when they are in PostgreSQL."""


@dataclass(frozen=True, slots=True)
class SortKey:
    """One ORDER BY column of a row.

    Attributes:
        position: of the column; negative positions count from the end.
        descending: whether larger values come first.
        nulls_first: whether NULL comes before every value.
    """

    position: int
    descending: bool
    nulls_first: bool


def refused(what: str, instead: str | None = None) -> UnsupportedStatementError:
    """Return the error for what cannot be answered exactly."""
    return UnsupportedStatementError(f"{what} cannot be answered exactly", hint=instead)


def alike(one: Any, other: Any) -> bool:
    """Tell whether two expressions are the same one, by structure."""
    if not isinstance(one, ColumnElement) or not isinstance(other, ColumnElement):
        return False
    while isinstance(one, Grouping):  # parentheses, as `collate(…).nulls_first()` adds
        one = one.element
    while isinstance(other, Grouping):
        other = other.element
    try:
        return bool(one.compare(other))
    except AttributeError:  # SQLAlchemy stumbles over expressions of two different aliases
        return False


def refuse_unordered(expression: Any) -> None:
    """Refuse to sort by an expression on whose order server and client could disagree."""
    kind = getattr(expression, "type", None)
    if isinstance(expression, TypeCoerce):
        raise refused(f"ORDER BY {expression}, which only looks like {kind}", "use cast()")
    if isinstance(kind, ORDERED_TYPES) and not (isinstance(kind, Time) and kind.timezone):
        return
    if isinstance(kind, String) and _collated_c(expression):
        return
    raise refused(
        f"ORDER BY {expression} of type {kind}",
        'servers and client agree on text order only in the C collation: .collate("C")'
        if isinstance(kind, String)
        else "sort by a number, time, boolean, UUID or bytes",
    )


def _collated_c(expression: Any) -> bool:
    right = getattr(expression, "right", None)
    return isinstance(right, CollationClause) and right.collation == "C"


def direction(clause: Any) -> tuple[ColumnElement[Any], bool, bool]:
    """Return expression, descending and NULLs-first of one ORDER BY term."""
    descending, nulls_first = False, None
    while isinstance(clause, UnaryExpression) and clause.modifier is not None:
        if clause.modifier is operators.desc_op:
            descending = True
        elif clause.modifier is operators.nulls_first_op:
            nulls_first = True
        elif clause.modifier is operators.nulls_last_op:
            nulls_first = False
        clause = clause.element
    if not isinstance(clause, ColumnElement) or not hasattr(clause, "label"):
        raise refused(f"ORDER BY {clause}", "name columns of the model")
    if isinstance(clause, Label):
        clause = clause.element
    elif hasattr(clause, "element") and isinstance(clause.element, Label):  # label reference
        clause = clause.element.element
    # PostgreSQL sorts NULL as larger than every value.
    return clause, descending, descending if nulls_first is None else nulls_first


def ordering(keys: Sequence[SortKey], limit: int | None, offset: int | None) -> Combine:
    """Return what sorts rows and cuts LIMIT and OFFSET out of them."""
    stop = None if limit is None else limit + (offset or 0)

    def combine(rows: list[Row]) -> list[Row]:
        # Stable, last key first; the runs of the servers are sorted, so this is one merge.
        for key in reversed(keys):
            rows.sort(key=_rank(key), reverse=key.descending)
        return rows[offset or 0 : stop]

    return combine


def merging(
    keys: Sequence[SortKey], limit: int | None, offset: int | None, *, once: bool = False
) -> Merge:
    """Return what merges the sorted rows of servers one by one, and cuts LIMIT and OFFSET out.

    Rows without an order are taken from the servers in turn.

    Args:
        keys: the order, which every server has kept.
        limit: rows to keep, or None for all.
        offset: rows to leave out first.
        once: whether equal rows, which then follow each other, become one.

    Source: the k-way merge of Knuth, The Art of Computer Programming 3, 5.4.1, as `heapq.merge`.
    """
    stop = None if limit is None else limit + (offset or 0)
    # Backwards as a whole where every key is; else what compares the wrong way round is wrapped.
    backwards = bool(keys) and all(key.descending for key in keys)
    ranks = [(_rank(key), key.descending and not backwards) for key in keys]

    def place(row: Row) -> tuple[Any, ...]:
        return tuple(_Descending(rank(row)) if wrap else rank(row) for rank, wrap in ranks)

    def merge(runs: Sequence[Iterator[Row]]) -> Iterator[Row]:
        rows: Iterator[Row] = _in_turn(runs)
        if keys:
            rows = heapq.merge(*runs, key=place, reverse=backwards)
        return itertools.islice(_once(rows) if once else rows, offset or 0, stop)

    return merge


def _in_turn(runs: Sequence[Iterator[Row]]) -> Iterator[Row]:
    left = list(runs)
    while left:
        for run in tuple(left):
            try:
                row = next(run)
            except StopIteration:
                left.remove(run)
            else:
                yield row


def _once(rows: Iterator[Row]) -> Iterator[Row]:
    last: tuple[Any, ...] | None = None
    for row in rows:
        this = same(row)
        if this != last:
            yield row
        last = this


class _Descending:
    """A rank that sorts the other way round."""

    __slots__ = ("rank",)

    def __init__(self, rank: tuple[Any, ...]) -> None:
        self.rank = rank

    def __lt__(self, other: _Descending) -> bool:
        return other.rank < self.rank

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Descending) and self.rank == other.rank

    __hash__ = None  # type: ignore[assignment]


def _rank(key: SortKey) -> Callable[[Row], tuple[bool, bool, Any]]:
    position = key.position
    # With `reverse` the larger rank comes first, so NULLs rank high exactly when that is wanted.
    nulls_high = key.nulls_first is key.descending

    def rank(row: Row) -> tuple[bool, bool, Any]:
        value = row[position]
        return (nulls_high, False, 0) if value is None else (not nulls_high, *comparable(value))

    return rank


def comparable(value: Any) -> tuple[bool, Any]:
    """Return what compares, and is equal, as PostgreSQL says of a value that is not NULL."""
    if isinstance(value, dt.datetime) and value.tzinfo is not None:
        # Python compares times of one zone by the clock on the wall, which repeats an hour.
        return (False, value.astimezone(dt.UTC))
    if value != value:  # noqa: PLR0124 - NaN, which PostgreSQL sorts above every number
        return (True, 0)
    return (False, value)


def same(values: Sequence[Any]) -> tuple[Any, ...]:
    """Return what is equal, and hashes equally, for rows that DISTINCT or GROUP BY joins."""
    return tuple(None if value is None else comparable(value) for value in values)


def count_of(clause: Any, params: Params) -> int | None:
    """Return the value of LIMIT or OFFSET, or None without one."""
    if clause is None:
        return None
    value = clause.effective_value if isinstance(clause, BindParameter) else clause
    if isinstance(clause, BindParameter) and isinstance(params, Mapping):
        value = params.get(clause.key, value)
    if not isinstance(value, int) or value < 0:
        raise refused(f"LIMIT or OFFSET {value}", "give a whole number from 0")
    return value
