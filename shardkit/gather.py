"""What a statement over several logical shards becomes: a plan, or a refusal.

Pure. `plan` decides from the statement alone: what every logical shard runs (the branch), what
each server does with the union of its branches, and how the answers of the servers combine into
the rows one unsharded server would have given. It refuses whatever it cannot combine exactly.
`shardkit.scatter` runs the plan.
"""

from __future__ import annotations

import datetime as dt
import decimal
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

from sqlalchemy import (
    BindParameter,
    Boolean,
    Column,
    Date,
    DateTime,
    Float,
    Integer,
    Label,
    LargeBinary,
    Numeric,
    Over,
    Select,
    String,
    Table,
    TextClause,
    Time,
    TypeCoerce,
    UnaryExpression,
    Uuid,
)
from sqlalchemy.sql import operators
from sqlalchemy.sql.elements import CollationClause, ColumnElement, Grouping
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.selectable import CTE, AliasedReturnsRows, FromClause, SelectBase
from sqlalchemy.sql.visitors import iterate

from shardkit.errors import UnsupportedStatementError
from shardkit.keylists import KeyLists, split
from shardkit.router import Router
from shardkit.statements import Params

__all__ = ["Plan", "plan"]

_SORT: Final = "shardkit_sort_{}"
# As many digits as a numeric of PostgreSQL can have; infinities of both signs make NaN there too.
_EXACT: Final = decimal.Context(prec=150_000, traps=[])

# Collations differ between servers and from Python; these types order alike everywhere. So would
# intervals, but psycopg makes a year 365 days and PostgreSQL 12 months of 30.
_ORDERED_TYPES = (Integer, Numeric, Float, Boolean, Date, DateTime, Time, Uuid, LargeBinary)
# Functions of one row. Any other may be an aggregate, which does not distribute over a union.
_ROW_FUNCTIONS = frozenset((
    "abs", "ceil", "char_length", "coalesce", "date_part", "date_trunc", "extract", "floor",
    "greatest", "jsonb_array_length", "least", "length", "lower", "nullif", "round", "upper",
))  # fmt: skip


@dataclass(frozen=True, slots=True)
class SortKey:
    """One ORDER BY column of a row.

    Attributes:
        position: of the column; added ones count from the end.
        descending: whether larger values come first.
        nulls_first: whether NULL comes before every value.
    """

    position: int
    descending: bool
    nulls_first: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """How a statement runs over several logical shards.

    Attributes:
        branch: what each logical shard runs.
        tail: what each server puts after the union of its branches.
        combine: makes the final rows of the rows of all servers, as the driver returned them.
        n_columns: elements of a result row that the statement asked for.
        adds: whether the branch has further columns after those, for sorting.
        lists: the keys that each logical shard is asked for.
    """

    branch: Select[Any]
    tail: str
    combine: Callable[[list[Sequence[Any]]], list[Sequence[Any]]]
    n_columns: int
    adds: bool
    lists: KeyLists


def plan(statement: Any, params: Params, router: Router) -> Plan:
    """Decide how a statement runs over several logical shards.

    Args:
        statement: what is asked.
        params: the values passed with it.
        router: places the keys in its lists.

    Raises:
        UnsupportedStatementError: it cannot be combined exactly; the message says why.
    """
    if not isinstance(statement, Select):
        raise _refused(f"{type(statement).__name__} over several logical shards")
    _refuse_unmergeable(statement)
    limit, offset = (
        _count(clause, params) for clause in (statement._limit_clause, statement._offset_clause)
    )
    bare, lists = split(statement.order_by(None).limit(None).offset(None), params, router)
    columns = statement._raw_columns
    is_orm = statement._propagate_attrs.get("compile_state_plugin") == "orm"
    n_columns = (
        sum(_width(column) for column in columns)
        if is_orm
        else len(list(statement.selected_columns))
    )
    aggregates = [_aggregate(column) for column in columns]
    if any(aggregates) or statement._group_by_clauses:
        combine = _grouping(statement, aggregates)
        keys = [_among(statement, clause) for clause in statement._order_by_clauses]
        ordered = _then(combine, _ordering(keys, limit, offset))
        return Plan(bare, "", ordered, n_columns, adds=False, lists=lists)
    sort, branch, tail = [], bare, []
    for i, clause in enumerate(statement._order_by_clauses):
        expression, descending, nulls_first = _direction(clause)
        _refuse_unordered(expression)
        _refuse_beyond_row(expression)
        name = _SORT.format(i)
        branch = branch.add_columns(expression.label(name))
        sort.append(SortKey(i - len(statement._order_by_clauses), descending, nulls_first))
        tail.append(
            f"{name} {'DESC' if descending else 'ASC'} NULLS {'FIRST' if nulls_first else 'LAST'}"
        )
    text = f" ORDER BY {', '.join(tail)}" if tail else ""
    if limit is not None:
        text += f" LIMIT {limit + (offset or 0)}"
    ordered = _ordering(sort, limit, offset)
    return Plan(branch, text, ordered, n_columns, adds=bool(sort), lists=lists)


def _width(column: Any) -> int:
    """Return how many elements of an ORM row a column becomes; a plain table is many."""
    is_plain = isinstance(column, FromClause) and "parententity" not in column._annotations
    return len(column.c) if is_plain else 1


# -- what can be merged


def _refused(what: str, instead: str | None = None) -> UnsupportedStatementError:
    return UnsupportedStatementError(f"{what} cannot be answered exactly", hint=instead)


def _refuse_unmergeable(statement: Select[Any]) -> None:
    reasons = {
        "DISTINCT over several logical shards": statement._distinct,
        "HAVING over several logical shards": statement._having_criteria,
        "FETCH over several logical shards": statement._fetch_clause is not None,
        "SELECT … FOR UPDATE over several logical shards": statement._for_update_arg is not None,
        "a statement with prefixes, suffixes or hints over several logical shards": (
            statement._prefixes or statement._suffixes or statement._hints
        ),
        "a statement with extensions over several logical shards": (
            statement._pre_columns_clause is not None
            or statement._post_select_clause is not None
            or statement._post_criteria_clause is not None
            or statement._post_body_clause is not None
        ),
    }
    for what, present in reasons.items():
        if present:
            raise _refused(what, "filter on one shard key")
    if any(isinstance(part, CTE) for part in iterate(statement)):
        raise _refused("a statement with CTEs over several logical shards", "use subquery()")
    # The target of a join may be a relationship, which is no expression itself.
    targets = [
        table
        for part in (statement, *statement._memoized_select_entities)
        for join in part._setup_joins
        for table in join[0]._from_objects
    ]
    sources = [*statement._from_obj, *targets]
    for element in [*statement._raw_columns, *sources]:
        for part in () if isinstance(element, Table) else iterate(cast("Any", element)):
            if isinstance(part, CTE) or (
                isinstance(part, AliasedReturnsRows) and isinstance(part.element, SelectBase)
            ):
                raise _refused("a subquery in FROM over several logical shards")
    for column in statement._raw_columns:
        inner = _unlabelled(column)
        if isinstance(inner, Column | Table) or _is_aggregate(inner):
            continue
        _refuse_beyond_row(inner)


def _refuse_beyond_row(expression: Any) -> None:
    """Refuse an expression that may be about more than one row."""
    for part in iterate(expression):
        if isinstance(part, Over):
            raise _refused("a window function over several logical shards")
        if isinstance(part, FunctionElement) and part.name.lower() not in _ROW_FUNCTIONS:
            raise _refused(
                f"{part.name}() over several logical shards",
                "count, sum, min and max alone in their column are merged",
            )
        if isinstance(part, TextClause) or getattr(part, "is_literal", False):
            raise _refused(f"the SQL text {part} over several logical shards", "name columns")


def _refuse_unordered(expression: Any) -> None:
    kind = getattr(expression, "type", None)
    if isinstance(expression, TypeCoerce):
        raise _refused(f"ORDER BY {expression}, which only looks like {kind}", "use cast()")
    if isinstance(kind, _ORDERED_TYPES) and not (isinstance(kind, Time) and kind.timezone):
        return
    if isinstance(kind, String) and _collated_c(expression):
        return
    raise _refused(
        f"ORDER BY {expression} of type {kind}",
        'servers and client agree on text order only in the C collation: .collate("C")'
        if isinstance(kind, String)
        else "sort by a number, time, boolean, UUID or bytes",
    )


def _collated_c(expression: Any) -> bool:
    right = getattr(expression, "right", None)
    return isinstance(right, CollationClause) and right.collation == "C"


# -- order and limit


def _direction(clause: Any) -> tuple[ColumnElement[Any], bool, bool]:
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
        raise _refused(f"ORDER BY {clause}", "name columns of the model")
    if isinstance(clause, Label):
        clause = clause.element
    elif hasattr(clause, "element") and isinstance(clause.element, Label):  # label reference
        clause = clause.element.element
    # PostgreSQL sorts NULL as larger than every value.
    return clause, descending, descending if nulls_first is None else nulls_first


def _ordering(
    keys: Sequence[SortKey], limit: int | None, offset: int | None
) -> Callable[[list[Sequence[Any]]], list[Sequence[Any]]]:
    stop = None if limit is None else limit + (offset or 0)

    def combine(rows: list[Sequence[Any]]) -> list[Sequence[Any]]:
        # Stable, last key first; the runs of the servers are sorted, so this is one merge.
        for key in reversed(keys):
            rows.sort(key=_rank(key), reverse=key.descending)
        return rows[offset or 0 : stop]

    return combine


def _rank(key: SortKey) -> Callable[[Sequence[Any]], tuple[bool, bool, Any]]:
    position = key.position
    # With `reverse` the larger rank comes first, so NULLs rank high exactly when that is wanted.
    nulls_high = key.nulls_first is key.descending

    def rank(row: Sequence[Any]) -> tuple[bool, bool, Any]:
        value = row[position]
        return (nulls_high, False, 0) if value is None else (not nulls_high, *_comparable(value))

    return rank


def _comparable(value: Any) -> tuple[bool, Any]:
    """Return what compares, and is equal, as PostgreSQL says of a value that is not NULL."""
    if isinstance(value, dt.datetime) and value.tzinfo is not None:
        # Python compares times of one zone by the clock on the wall, which repeats an hour.
        return (False, value.astimezone(dt.UTC))
    if value != value:  # noqa: PLR0124 - NaN, which PostgreSQL sorts above every number
        return (True, 0)
    return (False, value)


def _count(clause: Any, params: Params) -> int | None:
    """Return the value of LIMIT or OFFSET."""
    if clause is None:
        return None
    value = clause.effective_value if isinstance(clause, BindParameter) else clause
    if isinstance(clause, BindParameter) and isinstance(params, dict):
        value = params.get(clause.key, value)
    if not isinstance(value, int) or value < 0:
        raise _refused(f"LIMIT or OFFSET {value}", "give a whole number from 0")
    return value


# -- aggregates


def _sum(values: Iterable[Any]) -> Any:
    known = [value for value in values if value is not None]
    with decimal.localcontext(_EXACT):
        return sum(known[1:], start=known[0]) if known else None


def _least(values: Iterable[Any]) -> Any:
    return min((v for v in values if v is not None), default=None, key=_comparable)


def _greatest(values: Iterable[Any]) -> Any:
    return max((v for v in values if v is not None), default=None, key=_comparable)


_COMBINERS: Final = {"count": _sum, "sum": _sum, "min": _least, "max": _greatest}


def _is_aggregate(element: Any) -> bool:
    return isinstance(element, FunctionElement) and element.name.lower() in _COMBINERS


def _unlabelled(column: Any) -> Any:
    while isinstance(column, Label | Grouping):
        column = column.element
    return column


def _aggregate(column: Any) -> Callable[[Iterable[Any]], Any] | None:
    """Return how partial values of an aggregate column combine, or None for another column."""
    function = _unlabelled(column)
    if not _is_aggregate(function):
        return None
    for part in iterate(function.clauses):
        if isinstance(part, FunctionElement) and part.name.lower() not in _ROW_FUNCTIONS:
            raise _refused(f"{part.name}() inside {function.name}()")
        if isinstance(part, UnaryExpression) and part.operator is operators.distinct_op:
            raise _refused(f"{function.name}(DISTINCT …) over several logical shards")
    name = function.name.lower()
    if name in ("min", "max"):
        for argument in function.clauses:
            _refuse_unordered(argument)
    if name == "sum" and not isinstance(function.type, Integer | Numeric):
        raise _refused(f"sum of type {function.type}", "sum numbers")
    return _COMBINERS[name]


def _grouping(
    statement: Select[Any], aggregates: Sequence[Callable[[Iterable[Any]], Any] | None]
) -> Callable[[list[Sequence[Any]]], list[Sequence[Any]]]:
    columns = [_unlabelled(column) for column in statement._raw_columns]
    grouped = [_unlabelled(clause) for clause in statement._group_by_clauses]
    keys = [i for i, aggregate in enumerate(aggregates) if aggregate is None]
    for i in keys:
        if not isinstance(columns[i], ColumnElement):
            raise _refused("whole entities beside aggregates", "select their columns")
        if not any(columns[i].compare(clause) for clause in grouped):
            raise _refused(f"column {columns[i]} outside GROUP BY")
        if not isinstance(columns[i].type, (*_ORDERED_TYPES, String)):
            raise _refused(f"GROUP BY {columns[i]} of type {columns[i].type}")
    for clause in grouped:
        if not any(clause.compare(columns[i]) for i in keys):
            raise _refused(f"GROUP BY {clause} without selecting it", "add it to the columns")

    def combine(rows: list[Sequence[Any]]) -> list[Sequence[Any]]:
        groups: dict[tuple[Any, ...], list[Sequence[Any]]] = {}
        for row in rows:
            groups.setdefault(tuple(_comparable(row[i]) for i in keys), []).append(row)
        return [
            tuple(
                aggregate(row[i] for row in parts) if aggregate else parts[0][i]
                for i, aggregate in enumerate(aggregates)
            )
            for parts in groups.values()
        ]

    return combine


def _among(statement: Select[Any], clause: Any) -> SortKey:
    """Return the sort key of an ORDER BY term of an aggregate query, which must be a column."""
    expression, descending, nulls_first = _direction(clause)
    for i, column in enumerate(statement._raw_columns):
        inner = _unlabelled(column)
        if isinstance(inner, ColumnElement) and inner.compare(expression):
            _refuse_unordered(inner)
            return SortKey(i, descending, nulls_first)
    raise _refused(f"ORDER BY {expression} beside aggregates", "add it to the columns")


def _then(
    first: Callable[[list[Sequence[Any]]], list[Sequence[Any]]],
    second: Callable[[list[Sequence[Any]]], list[Sequence[Any]]],
) -> Callable[[list[Sequence[Any]]], list[Sequence[Any]]]:
    return lambda rows: second(first(rows))
