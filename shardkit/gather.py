"""What a statement over several logical shards becomes: a plan, or a refusal.

Pure. `plan` decides from the statement alone: what every logical shard runs (the branch), what
each server does with the union of its branches, and how the answers of the servers combine into
the rows one unsharded server would have given. It refuses whatever it cannot combine exactly.
`shardkit.scatter` runs the plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

from sqlalchemy import Column, Over, Select, Table, TextClause
from sqlalchemy.sql.elements import ColumnClause, ColumnElement
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.selectable import CTE, AliasedReturnsRows, FromClause, SelectBase
from sqlalchemy.sql.visitors import iterate

from shardkit.aggregates import ROW_FUNCTIONS, aggregation, is_aggregate
from shardkit.existences import existences_of
from shardkit.keylists import KeyLists, split
from shardkit.ordering import (
    EQUATABLE_TYPES,
    Combine,
    Merge,
    Row,
    SortKey,
    alike,
    count_of,
    direction,
    merging,
    ordering,
    refuse_unordered,
    refused,
    same,
)
from shardkit.router import Router
from shardkit.shapes import sources_of, unlabelled
from shardkit.statements import Params

__all__ = ["Plan", "plan", "plan_of_one"]

_SORT: Final = "shardkit_sort_{}"


@dataclass(frozen=True, slots=True)
class Plan:
    """How a statement runs over several logical shards.

    Attributes:
        branch: what each logical shard runs.
        union: what joins the branches: `UNION ALL`, or `UNION` where equal rows become one.
        tail: what each server puts after the union of its branches.
        combine: makes the final rows of the rows of all servers, as the driver returned them.
        n_columns: elements of a result row that the statement asked for.
        adds: whether the branch has further columns after those.
        lists: the keys that each logical shard is asked for.
        n_rows: rows that a server may return at most, as the tail has it; None for any number.
        merge: makes the final rows of the rows of each server as they come; None where all of
            them have to be there first.
    """

    branch: Select[Any]
    union: str
    tail: str
    combine: Combine
    n_columns: int
    adds: bool
    lists: KeyLists
    n_rows: int | None
    merge: Merge | None = None


def plan_of_one(statement: Any) -> Plan:
    """Return the plan of a statement that one logical shard answers as it is."""
    return Plan(statement, "", "", ordering((), None, None), 0, adds=False, lists=KeyLists(),
                n_rows=None, merge=merging((), None, None))  # fmt: skip


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
        raise refused(f"{type(statement).__name__} over several logical shards")
    columns = statement._raw_columns
    existences = existences_of(statement)
    _refuse_unmergeable(statement, [c for i, c in enumerate(columns) if i not in existences])
    limit, offset = _counts(statement, params)
    bare, lists = split(statement.order_by(None).limit(None).offset(None), params, router)
    if existences and not _has_aggregates(statement) and sources_of(statement):
        raise refused("rows beside EXISTS of other rows", "ask for it by itself")
    for i, existence in existences.items():
        _refuse_inexact(existence.judged, params)
        query, more = split(existence.query, params, router, first=len(lists.values))
        if more.values:
            lists = KeyLists({**lists.values, **more.values})
            bare = bare._generate()
            bare._raw_columns = [*bare._raw_columns]
            bare._raw_columns[i] = existence.column(query, columns[i])
    is_orm = statement._propagate_attrs.get("compile_state_plugin") == "orm"
    n_columns = (
        sum(_width(column) for column in columns)
        if is_orm
        else len(list(statement.selected_columns))
    )
    if existences or _has_aggregates(statement):
        whole = aggregation(statement, bare, params, limit, offset)
        adds = whole.branch is not bare
        return Plan(whole.branch, "UNION ALL", "", whole.combine, n_columns, adds, lists, None)
    sort, branch, tail = [], bare, []
    for i, clause in enumerate(statement._order_by_clauses):
        expression, descending, nulls_first = direction(clause)
        refuse_unordered(expression)
        _refuse_beyond_row(expression, statement)
        if statement._distinct and not _is_selected(expression, statement):
            raise refused(f"DISTINCT with ORDER BY {expression}, which is not selected")
        name = _SORT.format(i)
        branch = branch.add_columns(expression.label(name))
        sort.append(SortKey(i - len(statement._order_by_clauses), descending, nulls_first))
        tail.append(
            f"{name} {'DESC' if descending else 'ASC'} NULLS {'FIRST' if nulls_first else 'LAST'}"
        )
    text = f" ORDER BY {', '.join(tail)}" if tail else ""
    n_rows = None if limit is None else limit + (offset or 0)
    if n_rows is not None:
        text += f" LIMIT {n_rows}"
    combine = ordering(sort, limit, offset)
    union = "UNION" if statement._distinct else "UNION ALL"
    if statement._distinct:
        combine = _distinct(combine)
    # Equal rows follow each other where the order looks at all of what they have.
    merge = None
    if not statement._distinct or _is_ordered_whole(statement):
        merge = merging(sort, limit, offset, once=statement._distinct)
    return Plan(branch, union, text, combine, n_columns, bool(sort), lists, n_rows, merge)


def _counts(statement: Select[Any], params: Params) -> tuple[int | None, int | None]:
    """Return LIMIT and OFFSET."""
    return count_of(statement._limit_clause, params), count_of(statement._offset_clause, params)


def _has_aggregates(statement: Select[Any]) -> bool:
    if statement._group_by_clauses or statement._having_criteria:
        return True
    return any(is_aggregate(unlabelled(column)) for column in statement._raw_columns)


def _distinct(combine: Combine) -> Combine:
    def distinct(rows: list[Row]) -> list[Row]:
        return combine(list({same(row): row for row in reversed(rows)}.values())[::-1])

    return distinct


def _is_selected(expression: ColumnElement[Any], statement: Select[Any]) -> bool:
    selected: Iterable[Any] = statement.selected_columns
    return any(alike(unlabelled(column), expression) for column in selected)


def _is_ordered_whole(statement: Select[Any]) -> bool:
    """Tell whether ORDER BY names every column that is selected."""
    named = [direction(clause)[0] for clause in statement._order_by_clauses]
    selected: Iterable[Any] = statement.selected_columns
    return all(any(alike(unlabelled(c), one) for one in named) for c in selected)


def _width(column: Any) -> int:
    """Return how many elements of an ORM row a column becomes; a plain table is many."""
    is_plain = isinstance(column, FromClause) and "parententity" not in column._annotations
    return len(column.c) if is_plain else 1


# -- what can be merged


def _refuse_inexact(query: Select[Any], params: Params) -> None:
    """Refuse a query that may have a row though no logical shard has one, or the other way round.

    GROUP BY makes a group of any row, and LIMIT leaves one unless it leaves none.
    """
    shown = [c for c in query._raw_columns if not _is_constant(unlabelled(c))]
    _refuse_unmergeable(query, shown)
    _, offset = _counts(query, params)
    if offset:
        raise refused("EXISTS of rows after an OFFSET")
    if query._having_criteria:
        raise refused("EXISTS of groups that HAVING chooses", "select the groups, with LIMIT 1")


def _is_constant(column: Any) -> bool:
    """Tell whether a column is `*`, or the `1` that is written where nothing is read."""
    is_text = isinstance(column, TextClause) or getattr(column, "is_literal", False)
    text = str(column.text if isinstance(column, TextClause) else getattr(column, "name", ""))
    return is_text and (text == "*" or text.isdecimal())


def _refuse_unmergeable(statement: Select[Any], columns: Sequence[Any]) -> None:
    """Refuse what is not merged, in a statement or in the columns given of it."""
    reasons = {
        "DISTINCT beside aggregates over several logical shards": (
            statement._distinct and _has_aggregates(statement)
        ),
        "DISTINCT ON over several logical shards": statement._distinct_on,
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
            raise refused(what, "filter on one shard key")
    if any(isinstance(part, CTE) for part in iterate(statement)):
        raise refused("a statement with CTEs over several logical shards", "use subquery()")
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
                raise refused("a subquery in FROM over several logical shards")
    for column in columns:
        inner = unlabelled(column)
        if not isinstance(inner, Column | Table) and not is_aggregate(inner):
            _refuse_beyond_row(inner, statement)
    if statement._distinct:
        for selected in cast("Iterable[Any]", statement.selected_columns):
            if not isinstance(selected.type, EQUATABLE_TYPES):
                raise refused(f"DISTINCT of {selected} of type {selected.type}")


def _refuse_beyond_row(expression: Any, statement: Select[Any]) -> None:
    """Refuse an expression that may be about more than one row of a statement."""
    within = _about_subqueries(expression, statement)
    for part in iterate(expression):
        if id(part) in within:
            continue
        if isinstance(part, Over):
            raise refused("a window function over several logical shards")
        if isinstance(part, FunctionElement) and part.name.lower() not in ROW_FUNCTIONS:
            raise refused(
                f"{part.name}() over several logical shards",
                "count, sum, avg, min, max, bool_and, bool_or, array_agg and string_agg alone in "
                "their columns are merged",
            )
        if isinstance(part, TextClause) or getattr(part, "is_literal", False):
            raise refused(f"the SQL text {part} over several logical shards", "name columns")


def _about_subqueries(expression: Any, statement: Select[Any]) -> set[int]:
    """Return the functions that subqueries apply to their own rows, and `*`, by identity.

    For the row around it a subquery is one value, and the walker has seen that its rows lie with
    that row. An aggregate that names only columns of the query around belongs to that query.
    Source: PostgreSQL manual, 4.2.7, aggregate expressions.
    """
    queries = [part for part in iterate(expression) if isinstance(part, Select)]
    if not queries:
        return set()
    around = {hash(table) for source in sources_of(statement) for table in source._from_objects}
    within = set()
    for query in queries:
        part: Any
        for part in iterate(query):
            if getattr(part, "is_literal", False) and part.name == "*":
                within.add(id(part))
            elif isinstance(part, FunctionElement):
                inside = list(iterate(part))
                columns = [c for c in inside if isinstance(c, ColumnClause)]
                named = {hash(c.table) for c in columns if c.table is not None}
                is_plain = not any(isinstance(c, SelectBase) for c in inside)
                if is_plain and (not named or named - around):
                    within.add(id(part))
    return within
