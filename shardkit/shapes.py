"""What a SELECT reads from, as SQLAlchemy renders it: pure questions about statements.

Called by the walker and by what plans a gather; never runs anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from sqlalchemy import BindParameter, Column, Label, Over, Select, Table, Tuple
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import Mapper
from sqlalchemy.sql import operators
from sqlalchemy.sql.elements import CollectionAggregate, ColumnElement, Grouping
from sqlalchemy.sql.selectable import (
    AliasedReturnsRows,
    FromClause,
    FromGrouping,
    Join,
)
from sqlalchemy.sql.visitors import iterate

from shardkit.errors import InvalidShardKeyError, UnsupportedStatementError
from shardkit.keys import shown
from shardkit.models import Sharding, sharding_of

__all__ = [
    "base_sharding",
    "base_table",
    "expressions_of",
    "extensions",
    "is_row_by_row",
    "listed_by_any",
    "mapped_expressions",
    "outermost",
    "plain_select",
    "refuse_ctes",
    "sources_of",
    "tuples_of",
    "ungrouped",
    "unlabelled",
]


def base_table(element: Any) -> Table | None:
    """Return the table under aliases, or None for a subquery."""
    while isinstance(element, AliasedReturnsRows):
        element = element.element
    return element if isinstance(element, Table) else None


def base_sharding(element: Any) -> Sharding | None:
    """Return how the rows of a table are placed, also behind an alias, or None."""
    table = base_table(element)
    return None if table is None else sharding_of(table)


def plain_select(element: Any) -> Select[Any] | None:
    """Return the SELECT of `IN (SELECT …)` when every one of its rows counts by itself."""
    while isinstance(element, Grouping) or hasattr(element, "element"):
        element = element.element
    if (
        isinstance(element, Select)
        and len(element._raw_columns) == 1
        and not element._group_by_clauses
        and is_row_by_row(element)
    ):
        return element
    return None


def listed_by_any(clause: Any) -> BindParameter[Any] | None:
    """Return the list of `column = ANY (:list)`, or None for anything else."""
    value = clause.right
    if clause.operator is not operators.eq or not isinstance(value, CollectionAggregate):
        return None
    inner: Any = value.element
    while isinstance(inner, Grouping):
        inner = inner.element
    is_list = value.operator is operators.any_op and isinstance(inner, BindParameter)
    return inner if is_list else None


def tuples_of(columns: Tuple, values: Any) -> Sequence[tuple[Any, ...]]:
    """Return what `(a, b) IN (…)` compares with.

    Raises:
        InvalidShardKeyError: these are no tuples of as many values as there are columns.
    """
    rows = list(values or ())
    n_columns = len(columns.clauses)
    for row in rows:
        if not isinstance(row, tuple | list) or len(row) != n_columns:
            raise InvalidShardKeyError(f"{n_columns} columns were compared with {shown(row)}")
    return rows


def is_row_by_row(select: Select[Any]) -> bool:
    """Tell whether a SELECT makes each row without looking at rows of other shards.

    GROUP BY does: a column that places is in it, or is decided by a primary key that is.
    """
    return (
        select._limit_clause is None
        and select._offset_clause is None
        and select._fetch_clause is None
        and not select._distinct_on
        and not any(clause is not None for clause in extensions(select))
        and not any(
            isinstance(part, Over)
            for column in select._raw_columns
            if isinstance(column, ColumnElement)
            for part in iterate(column)
        )
    )


def extensions(select: Select[Any]) -> tuple[Any, ...]:
    """Return what dialects and users put into a SELECT; DISTINCT ON, for one."""
    return (
        select._pre_columns_clause,
        select._post_select_clause,
        select._post_criteria_clause,
        select._post_body_clause,
    )


def refuse_ctes(statement: Any) -> None:
    """Refuse CTEs that a statement carries without selecting from them."""
    if statement._independent_ctes:
        raise UnsupportedStatementError(
            "a CTE beside the statement is not routed", hint="select from it, or run it by itself"
        )


def sources_of(select: Select[Any]) -> list[Any]:
    """Return the FROM list of a SELECT as if nothing were correlated."""
    if select._setup_joins or select._memoized_select_entities:  # before with_only_columns()
        # SQLAlchemy knows how relationships join; let it spell the ON clauses out.
        try:
            return list(select.get_final_froms())
        except InvalidRequestError as error:  # it looked at a subquery without what is around it
            raise UnsupportedStatementError(
                "the joins of a subquery cannot be told", hint="join with select_from()"
            ) from error
    return outermost(
        {
            hash(table): table
            for element in (*select._from_obj, *select._raw_columns, *select._where_criteria)
            for table in element._from_objects
        }
    )


def outermost(froms: Mapping[int, Any]) -> list[Any]:
    """Return sources of rows without those that stand inside joins among them."""
    inside = {
        hash(table)
        for source in froms.values()
        if isinstance(source, Join)
        for table in source._from_objects
        if table is not source
    }
    return [source for key, source in froms.items() if key not in inside]


def ungrouped(source: Any) -> Any:
    """Return a source of rows without the parentheses around it."""
    while isinstance(source, FromGrouping):
        source = source.element
    return source


def unlabelled(column: Any) -> Any:
    """Return an expression without label and parentheses."""
    while isinstance(column, Label | Grouping):
        column = column.element
    return column


def mapped_expressions(column: Any) -> Iterable[Any]:
    """Return what an entity in the columns loads beside its table's columns."""
    entity: Any = column._annotations.get("parententity")
    if entity is None or not isinstance(column, FromClause):
        return []
    names = expressions_of(entity.mapper)
    return [getattr(entity.entity, name).__clause_element__() for name in names]


@lru_cache(maxsize=4096)
def expressions_of(mapper: Mapper[Any]) -> tuple[str, ...]:
    """Return the attributes of a class that are expressions instead of columns."""
    return tuple(
        attribute.key
        for attribute in mapper.column_attrs
        if not isinstance(attribute.columns[0], Column)
    )
