"""Walks SQL expressions and finds what confines their rows to logical shards.

Every table occurrence is a node. An equality between two columns that place their rows by the
same rule says that matching rows lie on one shard, so it joins their nodes. A comparison of such
a column with values confines its node. At the end each group of joined nodes has one answer.

Every SELECT has a frame of its own, so that an uncorrelated subquery over a table is not taken
for the rows of the query around it. Values inside a subquery confine the subquery alone: under
`NOT EXISTS` they say nothing about the outer rows. Called by `shardkit.statements` only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import (
    BinaryExpression,
    BindParameter,
    BooleanClauseList,
    Column,
    CompoundSelect,
    Delete,
    Label,
    Select,
    Table,
    Update,
)
from sqlalchemy.sql import operators
from sqlalchemy.sql.elements import ColumnElement, Grouping
from sqlalchemy.sql.selectable import (
    AliasedReturnsRows,
    FromClause,
    Join,
    Lateral,
    SelectBase,
)
from sqlalchemy.sql.visitors import ExternallyTraversible

from shardkit.errors import NoShardKeyError, UnsupportedStatementError
from shardkit.models import REFERENCE_SCHEMA, Sharding, sharding_of
from shardkit.router import Router
from shardkit.strategies import Rule

__all__ = ["Walk", "base_sharding"]

_ORDERED: Final = {operators.lt, operators.le, operators.gt, operators.ge}

CO_LOCATE: Final = (
    "join on the shard key, or read one table first and pass its values to the other with in_()"
)


class _Node:
    """One occurrence of a sharded table in a statement."""

    __slots__ = ("confined", "depth", "group", "name")

    def __init__(self, name: str, depth: int) -> None:
        self.name = name
        self.depth = depth
        self.confined: frozenset[int] | None = None
        self.group: _Node = self

    def root(self) -> _Node:
        node = self
        while node.group is not node:
            node = node.group
        return node

    def join(self, other: _Node) -> None:
        a, b = self.root(), other.root()
        if a is not b:
            # The root of a group is of its outermost query, whose values count.
            deep, shallow = (a, b) if a.depth > b.depth else (b, a)
            if deep.depth == shallow.depth:
                shallow.confine(deep.confined)
            deep.group = shallow

    def confine(self, shards: frozenset[int] | None) -> None:
        if shards is not None:
            self.confined = shards if self.confined is None else self.confined & shards


@dataclass(slots=True)
class _Frame:
    """The tables that one SELECT, UPDATE or DELETE reads rows of, by identity."""

    nodes: dict[int, _Node] = field(default_factory=dict)
    known: set[int] = field(default_factory=set)


class Walk:
    """One pass over one statement.

    Args:
        router: places key values.
        params: values passed beside the statement.
    """

    def __init__(self, router: Router, params: Mapping[str, Any]) -> None:
        self.router = router
        self.params = params
        self.frames: list[_Frame] = []
        self.nodes: list[_Node] = []
        self.subqueries: dict[int, _Frame] = {}
        self.n_reference = 0

    def answer(self) -> frozenset[int] | None:
        """Return the logical shards of what was walked; see `shardkit.statements.shards_of`."""
        groups = {id(node.root()): node.root() for node in self.nodes}
        if not groups:
            if self.n_reference:
                return frozenset({0})
            raise NoShardKeyError(
                "the statement names no sharded table",
                hint='pass bind_arguments={"logical_shard": n} to run it on one logical shard',
            )
        confined = [group.confined for group in groups.values()]
        if len(confined) == 1:
            # Values that exclude each other select no row; any one shard can say so.
            return confined[0] if confined[0] is None or confined[0] else frozenset({0})
        together = frozenset().union(*(shards or () for shards in confined))
        if None in confined or len(together) > 1:
            names = sorted({group.name for group in groups.values()})
            raise UnsupportedStatementError(
                f"rows of {' and '.join(names)} may lie on different logical shards",
                hint=CO_LOCATE,
            )
        return together or frozenset({0})

    # -- statements

    def statement(self, statement: Any) -> None:
        """Walk a SELECT, UPDATE or DELETE."""
        if isinstance(statement, Update | Delete):
            self.frames.append(_Frame())
            self.element(statement.table)
            for clause in statement._where_criteria:
                self.criterion(clause)
            if isinstance(statement, Update):
                self.elements((statement._values or {}).values())
            self.frames.pop()
        else:
            self.query(statement, asfrom=True)

    def query(
        self, query: Any, *, asfrom: bool, equal_to: tuple[_Node, Rule] | None = None
    ) -> None:
        """Walk a SELECT or a union of them.

        Args:
            query: the SELECT.
            asfrom: whether it stands in FROM, where it cannot see the tables around it.
            equal_to: column that its only column is compared with by IN.
        """
        if isinstance(query, CompoundSelect):
            for part in query.selects:
                self.query(part.element if isinstance(part, Grouping) else part, asfrom=asfrom)
        elif isinstance(query, Select):
            self.frames.append(self._frame(query, asfrom=asfrom))
            if equal_to is not None:
                self.join(equal_to, self.placing(query._raw_columns[0]))
            self.select(query)
            self.frames.pop()
        elif isinstance(query, SelectBase):
            inner = getattr(query, "element", None)
            if inner is None:
                raise UnsupportedStatementError(
                    f"{type(query).__name__} inside a statement is not routed", hint=CO_LOCATE
                )
            self.query(inner, asfrom=asfrom)
        else:
            raise NoShardKeyError(f"{type(query).__name__} is not routed")

    def select(self, select: Select[Any]) -> None:
        """Walk a SELECT whose frame is open."""
        froms: Iterable[Any] = select._from_obj
        if select._setup_joins:
            # The ORM knows how relationships join; let it spell the ON clauses out.
            froms = select.get_final_froms()
        self.elements(froms)
        self.elements(select._raw_columns)
        for clause in select._where_criteria:
            self.criterion(clause)
        self.elements(select._having_criteria)
        self.elements(select._order_by_clauses)
        self.elements(select._group_by_clauses)

    def _frame(self, select: Select[Any], *, asfrom: bool) -> _Frame:
        """Return the frame of a SELECT with the tables of its own FROM list.

        A table that an enclosing query has too is that query's where SQLAlchemy correlates, and
        a second occurrence where it does not. Source: `Select.correlate` in SQLAlchemy's manual.
        """
        found = [
            table
            for element in (*select._from_obj, *select._raw_columns, *select._where_criteria)
            for table in element._from_objects
        ]
        found += [table for target, *_ in select._setup_joins for table in target._from_objects]
        around = set() if asfrom or not self.frames else self.frames[-1].known
        everywhere = {key for frame in self.frames for key in frame.known}
        keys = {hash(table) for table in found}
        if select._correlate:
            correlated = keys & everywhere & {hash(table) for table in select._correlate}
        elif select._correlate_except is not None:
            correlated = keys & everywhere - {hash(table) for table in select._correlate_except}
        else:
            correlated = keys & around if select._auto_correlate and keys - around else set()
        frame = _Frame()
        self.frames.append(frame)
        for table in found:
            if hash(table) not in correlated:
                frame.known.add(hash(table))
                if _base_table(table) is not None:
                    self._note(frame, table)
        self.frames.pop()
        return frame

    # -- expressions

    def elements(self, elements: Iterable[Any]) -> None:
        """Note the tables of several expressions."""
        for element in elements:
            self.element(element)

    def element(self, element: Any) -> None:
        """Note the tables of any expression, and walk the subqueries in it."""
        if isinstance(element, Column):
            if element.table is not None:
                self.node(element.table)
        elif isinstance(element, Table):
            self.node(element)
        elif isinstance(element, Join):
            self.element(element.left)
            self.element(element.right)
            if element.onclause is not None:
                self.criterion(element.onclause, outer=element.isouter or element.full)
        elif isinstance(element, SelectBase):
            self.query(element, asfrom=False)
        elif isinstance(element, AliasedReturnsRows):
            if _base_table(element) is not None:
                self.node(element)
            elif isinstance(element.element, SelectBase) and not self._seen(element):
                self.query(element.element, asfrom=not isinstance(element, Lateral))
        elif isinstance(element, ExternallyTraversible):
            self.elements(element.get_children())

    def _seen(self, subquery: AliasedReturnsRows) -> bool:
        """Tell whether a subquery in FROM was walked; else open its frame to its columns."""
        if hash(subquery) in self.subqueries:
            return True
        inner = subquery.element
        if isinstance(inner, Select):
            frame = self._frame(inner, asfrom=not isinstance(subquery, Lateral))
            self.subqueries[hash(subquery)] = frame
            self.frames.append(frame)
            self.select(inner)
            self.frames.pop()
            return True
        return False

    def criterion(self, clause: Any, *, outer: bool = False) -> None:
        """Read one condition that every row of the query meets.

        Args:
            clause: the condition.
            outer: whether it is the ON clause of an outer join, whose values confine nothing.
        """
        if isinstance(clause, Grouping):
            self.criterion(clause.element, outer=outer)
            return
        if isinstance(clause, BooleanClauseList) and clause.operator is operators.and_:
            for part in clause.clauses:
                self.criterion(part, outer=outer)
            return
        if not outer:
            for node, shards in self.confining(clause).values():
                # A value of a subquery says nothing about the rows of the query around it.
                if node.root().depth == len(self.frames):
                    node.root().confine(shards)
        if isinstance(clause, BinaryExpression):
            inner = _plain_select(clause.right) if clause.operator is operators.in_op else None
            if inner is not None:
                self.element(clause.left)
                self.query(inner, asfrom=False, equal_to=self.placing(clause.left))
                return
            if clause.operator is operators.eq:
                self.join(self.placing(clause.left), self.placing(clause.right))
        self.element(clause)

    def join(self, left: tuple[_Node, Rule] | None, right: tuple[_Node, Rule] | None) -> None:
        """Join the nodes of two equal columns that place their rows by the same rule."""
        if left and right and left[1] == right[1]:
            left[0].join(right[0])

    def confining(self, clause: Any) -> dict[int, tuple[_Node, frozenset[int]]]:
        """Return what a condition confines: node and shards, by identity of the node."""
        if isinstance(clause, Grouping):
            return self.confining(clause.element)
        if isinstance(clause, BooleanClauseList):
            parts = [self.confining(part) for part in clause.clauses]
            if clause.operator is operators.or_:
                common = set(parts[0]).intersection(*parts[1:])
                return {
                    key: (parts[0][key][0], frozenset().union(*(part[key][1] for part in parts)))
                    for key in common
                }
            if clause.operator is not operators.and_:
                return {}
            merged: dict[int, tuple[_Node, frozenset[int]]] = {}
            for part in parts:
                for key, (node, shards) in part.items():
                    merged[key] = (node, merged[key][1] & shards if key in merged else shards)
            return merged
        if not isinstance(clause, BinaryExpression):
            return {}
        column: Any = clause.left
        value: Any = clause.right
        if clause.operator is operators.eq and isinstance(column, BindParameter):
            column, value = value, column
        if isinstance(value, Grouping):
            value = value.element
        if not isinstance(value, BindParameter) or not (found := self.placing(column)):
            return {}
        node, rule = found
        if clause.operator is operators.eq:
            return {id(node): (node, frozenset({self.router.shard(rule, self.value(value))}))}
        if clause.operator is operators.in_op:
            return {id(node): (node, self.router.shards(rule, self.value(value)))}
        if clause.operator in _ORDERED:
            compared = self.router.shards_compared(
                rule, clause.operator.__name__, self.value(value)
            )
            return {} if compared is None else {id(node): (node, compared)}
        return {}

    def placing(self, element: Any) -> tuple[_Node, Rule] | None:
        """Return node and rule of a column that places its row, or None for anything else."""
        frame = None
        while True:
            while isinstance(element, Label | Grouping):
                element = element.element
            table = getattr(element, "table", None)
            if not isinstance(element, ColumnElement) or table is None:
                return None
            if _base_table(table) is not None:
                break
            # A column of a subquery in FROM is the column it passes on.
            self.element(table)
            frame = self.subqueries.get(hash(table))
            if frame is None or len(element._proxies) != 1:
                return None
            element = element._proxies[0]
        sharding = base_sharding(table)
        rule = sharding.placing.get(element.name) if sharding else None
        if rule is None:
            return None
        node = self.node(table) if frame is None else frame.nodes.get(hash(table))
        return (node, rule) if node else None

    def node(self, table: FromClause) -> _Node | None:
        """Return the node of a table occurrence, or None when it is not sharded."""
        key = hash(table)  # annotated copies of one table share their hash
        for frame in reversed(self.frames):
            if key in frame.known:
                return frame.nodes.get(key)
        if _base_table(table) is None:
            self.element(table)
            return None
        self.frames[-1].known.add(key)
        return self._note(self.frames[-1], table)

    def _note(self, frame: _Frame, table: FromClause) -> _Node | None:
        base = _base_table(table)
        assert base is not None, "subqueries have no node"
        if sharding_of(base) is None:
            if base.schema != REFERENCE_SCHEMA:
                raise UnsupportedStatementError(
                    f"table {base.name} is neither Sharded nor Reference, so it lives nowhere",
                    hint="add the mixin to its class",
                )
            self.n_reference += 1
            return None
        if hash(table) not in frame.nodes:
            node = frame.nodes[hash(table)] = _Node(base.name, len(self.frames))
            self.nodes.append(node)
        return frame.nodes[hash(table)]

    def value(self, parameter: BindParameter[Any]) -> Any:
        """Return the value of a parameter, wherever it was given."""
        if parameter.key in self.params:
            return self.params[parameter.key]
        return parameter.effective_value


def _base_table(element: Any) -> Table | None:
    """Return the table under aliases, or None for a subquery."""
    while isinstance(element, AliasedReturnsRows):
        element = element.element
    return element if isinstance(element, Table) else None


def base_sharding(element: Any) -> Sharding | None:
    """Return how the rows of a table are placed, also behind an alias, or None."""
    table = _base_table(element)
    return None if table is None else sharding_of(table)


def _plain_select(element: Any) -> Select[Any] | None:
    """Return the SELECT of `IN (SELECT …)` when every one of its rows counts by itself."""
    while isinstance(element, Grouping) or hasattr(element, "element"):
        element = element.element
    if (
        isinstance(element, Select)
        and len(element._raw_columns) == 1
        and element._limit_clause is None
        and element._offset_clause is None
        and element._fetch_clause is None
        and not element._group_by_clauses
    ):
        return element
    return None
