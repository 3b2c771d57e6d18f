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
from typing import Any, Final, cast

from sqlalchemy import (
    BinaryExpression,
    BindParameter,
    BooleanClauseList,
    CompoundSelect,
    Delete,
    Label,
    Select,
    Table,
    Tuple,
    Update,
)
from sqlalchemy.sql import operators
from sqlalchemy.sql.dml import UpdateBase
from sqlalchemy.sql.elements import ColumnClause, ColumnElement, Grouping
from sqlalchemy.sql.selectable import (
    AliasedReturnsRows,
    FromClause,
    Join,
    Lateral,
    SelectBase,
)
from sqlalchemy.sql.visitors import ExternallyTraversible

from shardkit.errors import NoShardKeyError, UnsupportedStatementError
from shardkit.existences import existences_of
from shardkit.models import REFERENCE_SCHEMA, sharding_of
from shardkit.router import Router, UnknownValuesError
from shardkit.shapes import (
    base_sharding,
    base_table,
    extensions,
    is_row_by_row,
    listed_by_any,
    mapped_expressions,
    outermost,
    plain_select,
    refuse_ctes,
    sources_of,
    tuples_of,
    ungrouped,
)
from shardkit.strategies import Rule
from shardkit.uniques import Lookup, Value, lookups_of

__all__ = ["Walk"]

_ORDERED: Final = {operators.lt, operators.le, operators.gt, operators.ge}

CO_LOCATE: Final = (
    "join on the shard key, or read one table first and pass its values to the other with in_()"
)


class _Node:
    """One occurrence of a sharded table in a statement.

    Attributes:
        depth: number of queries around it, its own included.
        order: position among the nodes of the walk; the root of a group is its oldest node, and
            those of an outer query are older.
        confined: for the root, the logical shards that the group's rows can lie on.
    """

    __slots__ = ("confined", "depth", "group", "name", "order")

    def __init__(self, name: str, depth: int, order: int) -> None:
        self.name = name
        self.depth = depth
        self.order = order
        self.confined: frozenset[int] | None = None
        self.group: _Node = self

    def root(self) -> _Node:
        node = self
        while node.group is not node:
            node = node.group
        return node

    def confine(self, shards: frozenset[int] | None) -> None:
        if shards is not None:
            self.confined = shards if self.confined is None else self.confined & shards


@dataclass(slots=True)
class _Frame:
    """One SELECT, UPDATE or DELETE: the tables it reads rows of, by identity.

    Attributes:
        first: order of its first node; older ones belong to the queries around it.
        froms: what stands in its FROM.
        known: everything in its FROM, down to the sides of joins.
        nodes: the sharded tables among those.
        derived: the frames of the subqueries among those; None for one that is no SELECT.
        row_by_row: whether each of its rows is made of rows of its WHERE alone, so that those of
            one shard can be told without the others.
    """

    first: int
    froms: list[Any] = field(default_factory=list)
    known: set[int] = field(default_factory=set)
    nodes: dict[int, _Node] = field(default_factory=dict)
    derived: dict[int, _Frame | None] = field(default_factory=dict)
    row_by_row: bool = True


@dataclass(frozen=True, slots=True)
class _Outer:
    """The sides of an outer join whose ON clause is being read: rows appear without it."""

    left: set[_Node]
    right: set[_Node]
    full: bool


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
        self.n_reference = 0
        # Unique values that a column is compared with and nobody has looked up yet.
        self.wanted: set[Value] = set()
        # Whether each row of the outermost query shows a row of a sharded table. Other rows are
        # found on every shard.
        self.is_anchored = True
        # The questions that the outermost query asks about other rows, and whether it only asks.
        self.apart: list[Walk] = []
        self.only_asks = False

    def answer(self) -> frozenset[int] | None:
        """Return the logical shards of what was walked; see `shardkit.statements.shards_of`.

        Raises:
            UnknownValuesError: only unique values can tell, which have to be looked up.
        """
        shards = frozenset() if self.only_asks else self._shards_known()
        for walk in self.apart:
            theirs = walk.answer()
            shards = None if shards is None or theirs is None else shards | theirs
        if not (self.is_anchored or self.only_asks) and (shards is None or len(shards) > 1):
            raise UnsupportedStatementError(
                "rows without one of a sharded table would be found on every logical shard",
                hint="start from a sharded table, or filter on one shard key",
            )
        return shards

    def _shards_known(self) -> frozenset[int] | None:
        try:
            shards = self._shards()
        except UnsupportedStatementError:
            if self.wanted:
                raise UnknownValuesError(self.wanted) from None
            raise
        if shards is None and self.wanted:
            raise UnknownValuesError(self.wanted)
        return shards

    def _shards(self) -> frozenset[int] | None:
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
        if not isinstance(statement, Update | Delete):
            self.query(statement, asfrom=True)
            return
        refuse_ctes(statement)
        values = [*(statement._values or {}).values()] if isinstance(statement, Update) else []
        extra = getattr(statement, "_extra_froms", ())  # DELETE has USING
        froms = {
            hash(table): table
            for element in (
                statement.table, *extra, *statement._where_criteria, *values
            )
            for table in getattr(element, "_from_objects", ())
        }  # fmt: skip
        frame = self._open(outermost(froms))
        self.frames.append(frame)
        self.sources(frame)
        for clause in statement._where_criteria:
            self.criterion(clause)
        self.elements((*values, *statement._returning))
        self.frames.pop()

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
            refuse_ctes(query)
            for part in query.selects:
                self.query(part.element if isinstance(part, Grouping) else part, asfrom=asfrom)
        elif isinstance(query, Select):
            frame = self._frame(query, asfrom=asfrom)
            self.select(query, frame, equal_to=equal_to)
        elif isinstance(query, SelectBase):
            inner = getattr(query, "element", None)
            if inner is None:
                raise UnsupportedStatementError(
                    f"{type(query).__name__} inside a statement is not routed", hint=CO_LOCATE
                )
            self.query(inner, asfrom=asfrom)
        else:
            raise NoShardKeyError(f"{type(query).__name__} is not routed")

    def select(
        self,
        select: Select[Any],
        frame: _Frame,
        *,
        equal_to: tuple[_Node, Rule] | None = None,
    ) -> None:
        """Walk a SELECT in its frame."""
        refuse_ctes(select)
        outermost = not self.frames
        self.frames.append(frame)
        self.sources(frame)
        columns = select._raw_columns
        if outermost:
            self.is_anchored = any(self._has_sharded_rows(source) for source in frame.froms)
            columns = self._asked(select)
            self.only_asks = not columns and not frame.froms
        if equal_to is not None:
            self.join(equal_to, self.placing(select._raw_columns[0]))
        self.elements(columns)
        for column in columns:
            self.elements(mapped_expressions(column))
        for clause in select._where_criteria:
            self.criterion(clause)
        self.elements(select._having_criteria)
        self.elements(select._order_by_clauses)
        self.elements(select._group_by_clauses)
        self.elements(select._distinct_on)
        self.elements(clause for clause in extensions(select) if clause is not None)
        self.frames.pop()

    def _asked(self, select: Select[Any]) -> list[Any]:
        """Walk the questions of the outermost query by themselves; return the other columns."""
        existences = existences_of(select)
        for existence in existences.values():
            walk = Walk(self.router, self.params)
            walk.query(existence.query, asfrom=True)
            self.apart.append(walk)
        return [column for i, column in enumerate(select._raw_columns) if i not in existences]

    # -- FROM

    def _frame(self, select: Select[Any], *, asfrom: bool, lateral: bool = False) -> _Frame:
        """Return the frame of a SELECT with the tables of its own FROM list.

        What an enclosing query has in its FROM too is that query's where SQLAlchemy correlates,
        and a second occurrence where it does not: inside a join, for one. Source:
        `SelectState._correlate_froms` in SQLAlchemy.
        """
        froms = sources_of(select)
        keys = {hash(source) for source in froms}
        around = self.frames[-1].known if self.frames and (lateral or not asfrom) else set()
        reach = self.frames if lateral or not asfrom else self.frames[:-1]
        everywhere = {key for frame in reach for key in frame.known}
        if select._correlate:
            keys -= everywhere & {hash(table) for table in select._correlate}
        if select._correlate_except is not None:
            keys -= everywhere - {hash(table) for table in select._correlate_except}
        if select._auto_correlate and len(keys) > 1:
            keys -= around
        frame = self._open([source for source in froms if hash(source) in keys])
        frame.row_by_row = is_row_by_row(select)
        return frame

    def _open(self, froms: list[Any]) -> _Frame:
        """Return a frame over a FROM list, with the nodes of its tables."""
        frame = _Frame(len(self.nodes), froms)
        remaining = list(froms)
        self.frames.append(frame)
        while remaining:
            source = ungrouped(remaining.pop(0))
            frame.known.add(hash(source))
            if isinstance(source, Join):
                remaining += [source.left, source.right]
            elif base_table(source) is not None:
                self._note(frame, source)
        self.frames.pop()
        return frame

    def sources(self, frame: _Frame) -> None:
        """Walk what stands in the FROM of the current frame."""
        for source in frame.froms:
            self.source(source, frame)

    def source(self, source: Any, frame: _Frame, *, nullable: bool = False) -> set[_Node]:
        """Walk one source of rows and return its nodes.

        Args:
            source: a table, subquery or join.
            frame: the current frame.
            nullable: whether an outer join around it can show rows without one of it.
        """
        source = ungrouped(source)
        if isinstance(source, Join):
            outer = source.isouter or source.full
            left = self.source(source.left, frame, nullable=nullable or source.full)
            right = self.source(source.right, frame, nullable=nullable or outer)
            if source.onclause is not None:
                self.criterion(
                    source.onclause,
                    confines=not (nullable or outer),
                    outer=_Outer(left, right, source.full) if outer else None,
                )
            return left | right
        if base_table(source) is not None:
            node = frame.nodes.get(hash(source))
            return set() if node is None else {node}
        before = len(self.nodes)
        self._derive(source, frame)
        return set(self.nodes[before:])

    def _derive(self, source: Any, frame: _Frame) -> None:
        """Walk a subquery in FROM, or any other source that is no table, once for its frame."""
        key = hash(source)
        if key in frame.derived:
            return
        frame.derived[key] = None
        if getattr(source, "recursive", False):
            raise UnsupportedStatementError("a recursive CTE is not routed", hint=CO_LOCATE)
        inner = source
        while isinstance(inner, AliasedReturnsRows):
            inner = inner.element
        lateral = isinstance(source, Lateral)
        if isinstance(inner, UpdateBase):
            raise UnsupportedStatementError(f"{type(inner).__name__} inside a statement")
        if isinstance(inner, Select):
            frame.derived[key] = found = self._frame(inner, asfrom=True, lateral=lateral)
            self.select(inner, found)
        elif isinstance(inner, SelectBase):
            self.query(inner, asfrom=not lateral)
        elif isinstance(inner, ExternallyTraversible):
            self.elements(inner.get_children())

    def _has_sharded_rows(self, source: Any) -> bool:
        """Tell whether every row of a source shows a row of a sharded table."""
        source = ungrouped(source)
        if isinstance(source, Join):
            left = self._has_sharded_rows(source.left)
            if source.isouter and not source.full:
                return left
            right = self._has_sharded_rows(source.right)
            return (left and right) if source.full else (left or right)
        return base_sharding(source) is not None

    # -- expressions

    def elements(self, elements: Iterable[Any]) -> None:
        """Walk the subqueries in several expressions."""
        for element in elements:
            self.element(element)

    def element(self, element: Any) -> None:
        """Walk the subqueries in any expression."""
        if isinstance(element, ColumnClause):
            if element.table is not None:
                self.node(element.table)
        elif isinstance(element, Join):
            self.source(element, self.frames[-1])
        elif isinstance(element, SelectBase):
            self.query(element, asfrom=False)
        elif isinstance(element, Table | AliasedReturnsRows):
            self.node(element)
        elif isinstance(element, UpdateBase):
            raise UnsupportedStatementError(f"{type(element).__name__} inside a statement")
        elif isinstance(element, ExternallyTraversible):
            self.elements(element.get_children())

    def criterion(self, clause: Any, *, confines: bool = True, outer: _Outer | None = None) -> None:
        """Read one condition that every row of the query meets.

        Args:
            clause: the condition.
            confines: whether the rows of its tables cannot appear without it.
            outer: the outer join it is the ON clause of.
        """
        if isinstance(clause, Grouping):
            self.criterion(clause.element, confines=confines, outer=outer)
            return
        if isinstance(clause, BooleanClauseList) and clause.operator is operators.and_:
            for part in clause.clauses:
                self.criterion(part, confines=confines, outer=outer)
            return
        if confines:
            for node, shards in self.confining(clause).values():
                # A value of a subquery says nothing about the rows of the query around it.
                if node.root().order >= self.frames[-1].first:
                    node.root().confine(shards)
        if isinstance(clause, BinaryExpression):
            inner = plain_select(clause.right) if clause.operator is operators.in_op else None
            if inner is not None:
                self.element(clause.left)
                self.query(inner, asfrom=False, equal_to=self.placing(clause.left))
                return
            if clause.operator is operators.eq:
                self.join(self.placing(clause.left), self.placing(clause.right), outer)
        self.element(clause)

    def join(
        self,
        left: tuple[_Node, Rule] | None,
        right: tuple[_Node, Rule] | None,
        outer: _Outer | None = None,
    ) -> None:
        """Join the nodes of two equal columns that place their rows by the same rule."""
        if not left or not right or left[1] != right[1]:
            return
        older, newer = sorted((left[0].root(), right[0].root()), key=lambda node: node.order)
        # Two groups that have rows without this condition do not lie together because of it.
        if older is newer or newer.order < self.frames[-1].first:
            return
        if outer is not None and not self._meet(older, newer, outer):
            return
        if older.order >= self.frames[-1].first:
            here = len(self.frames)
            if newer.depth == here:
                older.confine(newer.confined)
            elif older.depth > here:  # both of subqueries in FROM
                both = older.confined is not None and newer.confined is not None
                either = (older.confined or frozenset()) | (newer.confined or frozenset())
                older.confined = either if both else None
        newer.group = older

    def _meet(self, a: _Node, b: _Node, outer: _Outer) -> bool:
        """Tell whether the ON clause of an outer join may join two groups."""
        if outer.full:
            sides = [{node.root() for node in side} for side in (outer.left, outer.right)]
            return sides in ([{a}, {b}], [{b}, {a}])
        others = {node.root() for node in self.nodes if node not in outer.right}
        return a not in others or b not in others

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
        return self._comparing(clause) if isinstance(clause, BinaryExpression) else {}

    def _comparing(self, clause: BinaryExpression[Any]) -> dict[int, tuple[_Node, frozenset[int]]]:
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
        found = self.placing(column)
        if not found:
            return self._comparing_unique(clause, value, is_list=listed is not None)
        node, rule = found
        shards: frozenset[int] | None = None
        if clause.operator is operators.in_op or listed is not None:
            shards = self.router.shards(rule, self.value(value) or ())
        elif clause.operator is operators.eq:
            shards = frozenset({self.router.shard(rule, self.value(value))})
        elif clause.operator in _ORDERED:
            shards = self.router.shards_compared(rule, clause.operator.__name__, self.value(value))
        return {} if shards is None else {id(node): (node, shards)}

    def _between(
        self, clause: BinaryExpression[Any], column: Any
    ) -> dict[int, tuple[_Node, frozenset[int]]]:
        """Return what `column BETWEEN low AND high` confines: what both of its sides do."""
        ends = list(clause.right.get_children())
        values = all(isinstance(end, BindParameter) for end in ends)
        if clause.modifiers.get("symmetric") or not values or not (found := self.placing(column)):
            return {}
        node, rule = found
        low, high = (
            self.router.shards_compared(rule, operator, self.value(cast("Any", end)))
            for operator, end in zip(("ge", "le"), ends, strict=True)
        )
        return {} if low is None or high is None else {id(node): (node, low & high)}

    def _comparing_unique(
        self, clause: BinaryExpression[Any], parameter: BindParameter[Any], *, is_list: bool
    ) -> dict[int, tuple[_Node, frozenset[int]]]:
        """Return what a comparison of a unique column with values confines, if they are known."""
        is_list = is_list or clause.operator is operators.in_op
        if not is_list and clause.operator is not operators.eq:
            return {}
        column = clause.right if clause.left is parameter else clause.left
        found = self.unique(column)
        if found is None:
            return {}
        node, lookup = found
        given = self.value(parameter)
        values = [lookup.value(v) for v in (given or () if is_list else [given]) if v is not None]
        if unknown := [value for value in values if value not in self.router.values]:
            self.wanted.update(unknown)
            return {}
        shards = frozenset(shard for value in values for shard in self.router.values[value])
        if not shards and values:  # no row: any shard can say so, and this one was just asked
            shards = frozenset({values[0].home(self.router.total)})
        return {id(node): (node, shards)}

    def _confining_tuple(
        self, clause: BinaryExpression[Any], columns: Tuple, value: Any
    ) -> dict[int, tuple[_Node, frozenset[int]]]:
        """Return what `(a, b) IN ((1, 2), …)` confines, where a or b places its row."""
        if clause.operator is not operators.in_op or not isinstance(value, BindParameter):
            return {}
        found: dict[int, tuple[_Node, frozenset[int]]] = {}
        rows = tuples_of(columns, self.value(value))
        for i, column in enumerate(columns.clauses):
            placing = self.placing(column)
            if placing is not None:
                node, rule = placing
                shards = self.router.shards(rule, [row[i] for row in rows])
                known = found.get(id(node))
                found[id(node)] = (node, shards if known is None else known[1] & shards)
        return found

    def placing(self, element: Any) -> tuple[_Node, Rule] | None:
        """Return node and rule of a column that places its row, or None for anything else."""
        found = self._stored(element)
        if found is None:
            return None
        name, table, frame = found
        sharding = base_sharding(table)
        rule = sharding.placing.get(name) if sharding else None
        if rule is None:
            return None
        node = self.node(table) if frame is None else frame.nodes.get(hash(table))
        return (node, rule) if node else None

    def unique(self, element: Any) -> tuple[_Node, Lookup] | None:
        """Return node and lookup of a unique column that can be looked up, or None."""
        found = self._stored(element)
        if found is None:
            return None
        name, table, frame = found
        lookups = lookups_of(base_table(table))
        lookup = next((k for k in lookups if k.column == name and k.complete), None)
        if lookup is None:
            return None
        node = self.node(table) if frame is None else frame.nodes.get(hash(table))
        return (node, lookup) if node else None

    def _stored(self, element: Any) -> tuple[str, FromClause, _Frame | None] | None:
        """Return the column of a table that an expression shows: name, occurrence and frame.

        Returns:
            None for anything else; the frame is that of a subquery that passes the column on.
        """
        frame: _Frame | None = None
        while True:
            while isinstance(element, Label | Grouping):
                element = element.element
            table = getattr(element, "table", None)
            if not isinstance(element, ColumnElement) or table is None:
                return None
            if base_table(table) is not None:
                return element.name, table, frame
            # A column of a subquery in FROM is the column it passes on.
            self.element(table)
            key = hash(table)
            frames = self.frames if frame is None else [frame]
            frame = next((f.derived.get(key) for f in reversed(frames) if key in f.known), None)
            if frame is None or not frame.row_by_row:
                return None
            while isinstance(table, AliasedReturnsRows):
                if len(element._proxies) != 1:
                    return None
                element = element._proxies[0]
                table = table.element

    def node(self, table: FromClause) -> _Node | None:
        """Return the node of a table occurrence, or None when it is not sharded."""
        key = hash(table)  # annotated copies of one table share their hash
        for frame in reversed(self.frames):
            if key in frame.known:
                return frame.nodes.get(key)
        frame = self.frames[-1]
        frame.known.add(key)
        if base_table(table) is not None:
            return self._note(frame, table)
        self._derive(table, frame)
        return None

    def _note(self, frame: _Frame, table: FromClause) -> _Node | None:
        base = base_table(table)
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
            node = _Node(base.name, len(self.frames), len(self.nodes))
            frame.nodes[hash(table)] = node
            self.nodes.append(node)
        return frame.nodes[hash(table)]

    def value(self, parameter: BindParameter[Any]) -> Any:
        """Return the value of a parameter, wherever it was given."""
        if parameter.key in self.params:
            return self.params[parameter.key]
        return parameter.effective_value
