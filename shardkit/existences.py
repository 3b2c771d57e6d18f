"""EXISTS as a column: questions about other rows than those of the statement itself.

`SELECT EXISTS (…)` asks whether a query has a row, and over several logical shards any of them may
have it. So the query is walked, and judged, like a statement of its own. Pure; called by the
walker and by what plans a gather.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

from sqlalchemy import Exists, Label, Select, UnaryExpression, exists
from sqlalchemy.sql import operators
from sqlalchemy.sql.selectable import Join
from sqlalchemy.sql.visitors import iterate

from shardkit.shapes import sources_of, ungrouped, unlabelled

__all__ = ["Existence", "existences_of"]


@dataclass(frozen=True, slots=True)
class Existence:
    """One column that is EXISTS or NOT EXISTS of a query about other rows.

    Attributes:
        query: what is asked for.
        is_negated: whether it is NOT EXISTS.
    """

    query: Select[Any]
    is_negated: bool

    @property
    def judged(self) -> Select[Any]:
        """What has to be exact of the query: equal rows may count once or more often."""
        query: Any = self.query._generate()
        query._distinct, query._distinct_on = False, ()
        return cast("Select[Any]", query)

    def whole(self, parts: Iterable[bool]) -> bool:
        """Return the answer that the answers of all logical shards make."""
        return all(parts) if self.is_negated else any(parts)

    def column(self, query: Select[Any], like: Any) -> Any:
        """Return the column that asks for another query, under the name of an old column."""
        found: Any = ~exists(query) if self.is_negated else exists(query)
        return found.label(like.name) if isinstance(like, Label) else found


def existences_of(select: Select[Any]) -> dict[int, Existence]:
    """Return the columns of a SELECT that ask about other rows than its own, by position.

    None of a SELECT with GROUP BY: a group is shown by the logical shards that have rows of it,
    and the others are not asked. Nor of one without FROM that is more than such columns.
    """
    if select._group_by_clauses:
        return {}
    found = {}
    for i, column in enumerate(select._raw_columns):
        existence = _existence(column)
        if existence is not None:
            found[i] = existence
    if not found:
        return {}
    around = _tables(sources_of(select))
    if not around:
        is_bare = len(found) == len(select._raw_columns) and not (
            select._where_criteria or select._having_criteria or select._order_by_clauses
        )
        return found if is_bare else {}
    # A query that names a table of the SELECT is, or may be, about the rows of that table.
    return {i: one for i, one in found.items() if around.isdisjoint(_named(one.query))}


def _existence(column: Any) -> Existence | None:
    inner, is_negated = unlabelled(column), False
    while isinstance(inner, UnaryExpression) and inner.operator is operators.inv:
        inner, is_negated = unlabelled(inner.element), not is_negated
    if not isinstance(inner, Exists):
        return None
    query: Any = inner.element
    query = unlabelled(query.element)
    return Existence(query, is_negated) if isinstance(query, Select) else None


def _tables(sources: Iterable[Any]) -> set[int]:
    """Return what stands in a FROM, down to the sides of joins, by identity."""
    found, remaining = set(), list(sources)
    while remaining:
        source = ungrouped(remaining.pop())
        found.add(hash(source))
        if isinstance(source, Join):
            remaining += [source.left, source.right]
    return found


def _named(query: Select[Any]) -> set[int]:
    """Return every table that a query names anywhere, by identity."""
    found = _tables(sources_of(query))
    for part in iterate(query):
        found |= _tables(getattr(part, "_from_objects", ()))
    return found
