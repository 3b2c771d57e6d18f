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
from typing import Any

from sqlalchemy import (
    BinaryExpression,
    BooleanClauseList,
    CompoundSelect,
    Delete,
    Label,
    Select,
    Table,
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

from shardkit.confinements import Confinements
from shardkit.errors import NoShardKeyError, UnsupportedStatementError
from shardkit.existences import existences_of
from shardkit.models import REFERENCE_SCHEMA, sharding_of
from shardkit.nodes import CO_LOCATE, Frame, Node, Outer, shards_of
from shardkit.router import Router, UnknownValuesError
from shardkit.shapes import (
    base_sharding,
    base_table,
    extensions,
    is_row_by_row,
    mapped_expressions,
    outermost,
    plain_select,
    refuse_ctes,
    sources_of,
    ungrouped,
)
from shardkit.strategies import Rule
from shardkit.uniques import Lookup, lookups_of

__all__ = ["Walk"]


class Walk:
    """One pass over one statement.

    Args:
        router: places key values.
        params: values passed beside the statement.
    """

    def __init__(self, router: Router, params: Mapping[str, Any]) -> None:
        self.router = router
        self.params = params
        self.frames: list[Frame] = []
        self.nodes: list[Node] = []
        self.n_reference = 0
        self._confinements = Confinements(router, params, self)
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
            shards = shards_of(self.nodes, reads_reference=bool(self.n_reference))
        except UnsupportedStatementError:
            if self._confinements.wanted:
                raise UnknownValuesError(self._confinements.wanted) from None
            raise
        if shards is None and self._confinements.wanted:
            raise UnknownValuesError(self._confinements.wanted)
        return shards

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

    def query(self, query: Any, *, asfrom: bool, equal_to: tuple[Node, Rule] | None = None) -> None:
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
        frame: Frame,
        *,
        equal_to: tuple[Node, Rule] | None = None,
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

    def _frame(self, select: Select[Any], *, asfrom: bool, lateral: bool = False) -> Frame:
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

    def _open(self, froms: list[Any]) -> Frame:
        """Return a frame over a FROM list, with the nodes of its tables."""
        frame = Frame(len(self.nodes), froms)
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

    def sources(self, frame: Frame) -> None:
        """Walk what stands in the FROM of the current frame."""
        for source in frame.froms:
            self.source(source, frame)

    def source(self, source: Any, frame: Frame, *, nullable: bool = False) -> set[Node]:
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
                    outer=Outer(left, right, source.full) if outer else None,
                )
            return left | right
        if base_table(source) is not None:
            node = frame.nodes.get(hash(source))
            return set() if node is None else {node}
        before = len(self.nodes)
        self._derive(source, frame)
        return set(self.nodes[before:])

    def _derive(self, source: Any, frame: Frame) -> None:
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

    def criterion(self, clause: Any, *, confines: bool = True, outer: Outer | None = None) -> None:
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
            for node, shards in self._confinements.of(clause).values():
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
        left: tuple[Node, Rule] | None,
        right: tuple[Node, Rule] | None,
        outer: Outer | None = None,
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

    def _meet(self, a: Node, b: Node, outer: Outer) -> bool:
        """Tell whether the ON clause of an outer join may join two groups."""
        if outer.full:
            sides = [{node.root() for node in side} for side in (outer.left, outer.right)]
            return sides in ([{a}, {b}], [{b}, {a}])
        others = {node.root() for node in self.nodes if node not in outer.right}
        return a not in others or b not in others

    def placing(self, element: Any) -> tuple[Node, Rule] | None:
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

    def unique(self, element: Any) -> tuple[Node, Lookup] | None:
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

    def _stored(self, element: Any) -> tuple[str, FromClause, Frame | None] | None:
        """Return the column of a table that an expression shows: name, occurrence and frame.

        Returns:
            None for anything else; the frame is that of a subquery that passes the column on.
        """
        frame: Frame | None = None
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

    def node(self, table: FromClause) -> Node | None:
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

    def _note(self, frame: Frame, table: FromClause) -> Node | None:
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
            node = Node(base.name, len(self.frames), len(self.nodes))
            frame.nodes[hash(table)] = node
            self.nodes.append(node)
        return frame.nodes[hash(table)]
