"""What a condition says about where rows lie: comparisons of columns with values, and AND and OR.

A comparison confines the node of its column to the logical shards of its values. Source:
docs/statements.md. Called by `shardkit.walk` only, which knows what the columns are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Protocol, cast

from sqlalchemy import BinaryExpression, BindParameter, BooleanClauseList, Tuple
from sqlalchemy.sql import operators
from sqlalchemy.sql.elements import Grouping

from shardkit.nodes import Node
from shardkit.router import Router
from shardkit.shapes import listed_by_any, tuples_of
from shardkit.strategies import Rule
from shardkit.uniques import Lookup, Value

__all__ = ["Confined", "Confinements", "value_of"]

_ORDERED: Final = {operators.lt, operators.le, operators.gt, operators.ge}

Confined = dict[int, tuple[Node, frozenset[int]]]
"""Nodes and the logical shards they are confined to, by identity of the node."""


class Columns(Protocol):
    """Who knows what expressions stand for."""

    def placing(self, element: Any) -> tuple[Node, Rule] | None:
        """Return node and rule of a column that places its row, or None for anything else."""

    def unique(self, element: Any) -> tuple[Node, Lookup] | None:
        """Return node and lookup of a unique column that can be looked up, or None."""


class Confinements:
    """Reads the conditions of one statement.

    Args:
        router: places key values.
        params: values passed beside the statement.
        columns: says what columns are.

    Attributes:
        wanted: unique values that a column is compared with and nobody has looked up yet.
    """

    def __init__(self, router: Router, params: Mapping[str, Any], columns: Columns) -> None:
        self.wanted: set[Value] = set()
        self._router = router
        self._params = params
        self._columns = columns

    def of(self, clause: Any) -> Confined:
        """Return what a condition confines: node and shards, by identity of the node."""
        if isinstance(clause, Grouping):
            return self.of(clause.element)
        if isinstance(clause, BooleanClauseList):
            parts = [self.of(part) for part in clause.clauses]
            if clause.operator is operators.or_:
                common = set(parts[0]).intersection(*parts[1:])
                return {
                    key: (parts[0][key][0], frozenset().union(*(part[key][1] for part in parts)))
                    for key in common
                }
            if clause.operator is not operators.and_:
                return {}
            merged: Confined = {}
            for part in parts:
                for key, (node, shards) in part.items():
                    merged[key] = (node, merged[key][1] & shards if key in merged else shards)
            return merged
        return self._comparing(clause) if isinstance(clause, BinaryExpression) else {}

    def _comparing(self, clause: BinaryExpression[Any]) -> Confined:
        """Return what a comparison of a column, or of several, with values confines."""
        column: Any = clause.left
        value: Any = clause.right
        if clause.operator is operators.eq and isinstance(column, BindParameter):
            column, value = value, column
        if isinstance(value, Grouping):
            value = value.element
        if isinstance(column, Tuple):
            return self._confining_tuple(clause, column, value)
        listed = listed_by_any(clause)
        value = value if listed is None else listed
        if clause.operator is operators.between_op:
            return self._between(clause, column)
        if not isinstance(value, BindParameter):
            return {}
        found = self._columns.placing(column)
        if not found:
            return self._comparing_unique(clause, value, is_list=listed is not None)
        node, rule = found
        shards: frozenset[int] | None = None
        if clause.operator is operators.in_op or listed is not None:
            shards = self._router.shards(rule, self._value(value) or ())
        elif clause.operator is operators.eq:
            shards = frozenset({self._router.shard(rule, self._value(value))})
        elif clause.operator in _ORDERED:
            shards = self._router.shards_compared(
                rule, clause.operator.__name__, self._value(value)
            )
        return {} if shards is None else {id(node): (node, shards)}

    def _between(self, clause: BinaryExpression[Any], column: Any) -> Confined:
        """Return what `column BETWEEN low AND high` confines: what both of its sides do."""
        ends = list(clause.right.get_children())
        values = all(isinstance(end, BindParameter) for end in ends)
        if (
            clause.modifiers.get("symmetric")
            or not values
            or not (found := self._columns.placing(column))
        ):
            return {}
        node, rule = found
        low, high = (
            self._router.shards_compared(rule, operator, self._value(cast("Any", end)))
            for operator, end in zip(("ge", "le"), ends, strict=True)
        )
        return {} if low is None or high is None else {id(node): (node, low & high)}

    def _comparing_unique(
        self, clause: BinaryExpression[Any], parameter: BindParameter[Any], *, is_list: bool
    ) -> Confined:
        """Return what a comparison of a unique column with values confines, if they are known."""
        is_list = is_list or clause.operator is operators.in_op
        if not is_list and clause.operator is not operators.eq:
            return {}
        column = clause.right if clause.left is parameter else clause.left
        found = self._columns.unique(column)
        if found is None:
            return {}
        node, lookup = found
        given = self._value(parameter)
        values = [lookup.value(v) for v in (given or () if is_list else [given]) if v is not None]
        if unknown := [value for value in values if value not in self._router.values]:
            self.wanted.update(unknown)
            return {}
        shards = frozenset(shard for value in values for shard in self._router.values[value])
        if not shards and values:  # no row: any shard can say so, and this one was just asked
            shards = frozenset({values[0].home(self._router.total)})
        return {id(node): (node, shards)}

    def _confining_tuple(
        self, clause: BinaryExpression[Any], columns: Tuple, value: Any
    ) -> Confined:
        """Return what `(a, b) IN ((1, 2), …)` confines, where a or b places its row."""
        if clause.operator is not operators.in_op or not isinstance(value, BindParameter):
            return {}
        found: Confined = {}
        rows = tuples_of(columns, self._value(value))
        for i, column in enumerate(columns.clauses):
            placing = self._columns.placing(column)
            if placing is not None:
                node, rule = placing
                shards = self._router.shards(rule, [row[i] for row in rows])
                known = found.get(id(node))
                found[id(node)] = (node, shards if known is None else known[1] & shards)
        return found

    def _value(self, parameter: BindParameter[Any]) -> Any:
        return value_of(parameter, self._params)


def value_of(parameter: BindParameter[Any], params: Mapping[str, Any]) -> Any:
    """Return the value of a parameter, in the statement or beside it."""
    if parameter.key in params:  # else it may have to be computed, which is not for nothing
        return params[parameter.key]
    return parameter.effective_value
