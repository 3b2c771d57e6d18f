"""`array_agg` and `string_agg` over several logical shards: parts of a list into the whole one.

Pure. Every logical shard collects its own elements, and beside them what they are ordered by, in
lists of the same order; the whole list is sorted here, by the comparisons of `shardkit.ordering`.
Called by `shardkit.aggregates`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import (
    BindParameter,
    Enum,
    FunctionFilter,
    String,
    UnaryExpression,
    func,
    literal_column,
)
from sqlalchemy.dialects.postgresql import aggregate_order_by
from sqlalchemy.sql import operators
from sqlalchemy.sql.elements import AggregateOrderBy, ClauseList, ColumnElement
from sqlalchemy.sql.functions import FunctionElement

from shardkit.ordering import (
    EQUATABLE_TYPES,
    Row,
    SortKey,
    alike,
    direction,
    ordering,
    refuse_unordered,
    refused,
    same,
)
from shardkit.schemas import ANY_SCHEMA
from shardkit.shapes import unlabelled

__all__ = ["COLLECTING", "Call", "List", "call_of", "list_of"]

COLLECTING: Final = frozenset(("array_agg", "string_agg"))

# Becomes 'shard_0042.' in the branch of that logical shard, so that parts sort by it.
_SHARD: Final = literal_column(f"'{ANY_SCHEMA}.'", String())


@dataclass(frozen=True, slots=True)
class Call:
    """A call of an aggregate.

    Attributes:
        function: what is called.
        arguments: without ORDER BY.
        order: its ORDER BY terms.
        criterion: its FILTER, or None.
    """

    function: FunctionElement[Any]
    arguments: tuple[Any, ...]
    order: tuple[Any, ...] = ()
    criterion: Any = None

    @property
    def name(self) -> str:
        """The name of the function, in lower case."""
        return str(getattr(self.function, "name", "")).lower()

    @property
    def expressions(self) -> tuple[Any, ...]:
        """All expressions about single rows in it."""
        return (*self.arguments, *self.order, *(() if self.criterion is None else [self.criterion]))

    def like(self, function: FunctionElement[Any]) -> Any:
        """Return the call of another function with the same FILTER."""
        return function if self.criterion is None else function.filter(self.criterion)


def call_of(element: Any) -> Call | None:
    """Return what an expression calls, behind FILTER and ORDER BY, or None for anything else."""
    order: tuple[Any, ...] = ()
    criterion = None
    while isinstance(element, FunctionFilter | AggregateOrderBy):
        if isinstance(element, FunctionFilter):
            criterion = element.criterion if criterion is None else criterion & element.criterion
            element = element.func
        else:
            order, element = tuple(element.order_by), element.element
    if not isinstance(element, FunctionElement):
        return None
    arguments: list[Any] = list(element.clauses)
    for i, argument in enumerate(arguments):
        if isinstance(argument, aggregate_order_by):
            terms: Any = argument.order_by
            order += tuple(terms) if isinstance(terms, ClauseList) else (terms,)
            arguments[i] = argument.target
    return Call(element, tuple(arguments), order, criterion)


@dataclass(frozen=True, slots=True)
class List:
    """How the parts of a list are joined.

    Attributes:
        parts: what each logical shard has to show: the elements, what they are sorted by, all in
            one order, and its own name at last.
        keys: the order of elements, in rows of one of each part.
        is_distinct: whether equal elements become one.
        separator: what joins the elements of a text; None where they stay a list.
    """

    parts: tuple[ColumnElement[Any], ...]
    keys: tuple[SortKey, ...]
    is_distinct: bool
    separator: Callable[[], Any] | None

    def join(self, parts: Iterable[Row]) -> Any:
        """Return the whole of rows that have the parts; None for no element, as PostgreSQL has it.

        Elements that tie, or have no order, are those of one logical shard after another.
        """
        rows: list[Row] = []
        for *lists, _ in sorted(parts, key=lambda row: row[-1]):
            if lists[0] is not None:
                rows += zip(*lists, strict=True)
        if self.is_distinct:
            rows = list({same(row[:1]): row for row in reversed(rows)}.values())[::-1]
        elements = [row[0] for row in ordering(self.keys, None, None)(rows)]
        if self.separator is None:
            return elements or None
        texts = [element for element in elements if element is not None]
        return (self.separator() or "").join(texts) if texts else None


def list_of(call: Call, value: Callable[[BindParameter[Any]], Any]) -> List:
    """Decide how an `array_agg` or `string_agg` is joined.

    Two aggregates with one ORDER BY put rows in one order, but for those that tie; and of rows
    that tie, what they are sorted by is equal. So the lists agree, element by element.

    Args:
        call: of the aggregate.
        value: returns the value of a parameter.

    Raises:
        UnsupportedStatementError: it cannot be joined exactly.
    """
    element, *others = call.arguments
    is_distinct = isinstance(element, UnaryExpression) and (
        element.operator is operators.distinct_op
    )
    inner: Any = unlabelled(element.element if is_distinct else element)
    is_text = call.name == "string_agg"
    # Lists of lists have to be of one shape, which servers check; enums come back unread.
    known = (String,) if is_text else EQUATABLE_TYPES
    if not isinstance(inner.type, known) or isinstance(inner.type, Enum):
        raise refused(f"{call.name} of type {inner.type}", "cast the element")
    if is_text and not (len(others) == 1 and isinstance(others[0], BindParameter)):
        raise refused("string_agg with a separator that is no value")
    keys: list[SortKey] = []
    expressions = []
    for clause in call.order:
        expression, descending, nulls_first = direction(clause)
        refuse_unordered(expression)
        if is_distinct and not alike(expression, inner):
            raise refused(f"{call.name}(DISTINCT …) in the order of something else")
        keys.append(SortKey(len(keys) + 1, descending, nulls_first))
        expressions.append(expression)
    once = [e.distinct() if is_distinct else e for e in expressions]
    parts = (*(_collected(call, part) for part in (element, *once)), _SHARD)
    separator = (lambda: value(others[0])) if is_text else None
    return List(parts, tuple(keys), is_distinct, separator)


def _collected(call: Call, element: Any) -> Any:
    made: Any = func.array_agg(element)
    if call.order:
        made = made.aggregate_order_by(*call.order)
    return call.like(made)
