"""What a walk over a statement finds: occurrences of tables, and the queries they stand in.

Every table occurrence is a node. Nodes whose rows must lie on one shard are joined to groups, and
at the end each group has one answer. Filled by `shardkit.walk`. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from shardkit.errors import NoShardKeyError, UnsupportedStatementError

__all__ = ["CO_LOCATE", "Frame", "Node", "Outer", "shards_of"]

CO_LOCATE: Final = (
    "join on the shard key, or read one table first and pass its values to the other with in_()"
)
"""What to do where rows may lie apart."""


class Node:
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
        self.group: Node = self

    def root(self) -> Node:
        """Return the oldest node of the group it belongs to."""
        node = self
        while node.group is not node:
            node = node.group
        return node

    def confine(self, shards: frozenset[int] | None) -> None:
        """Note that its rows lie on some logical shards only; None says nothing."""
        if shards is not None:
            self.confined = shards if self.confined is None else self.confined & shards


@dataclass(slots=True)
class Frame:
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
    nodes: dict[int, Node] = field(default_factory=dict)
    derived: dict[int, Frame | None] = field(default_factory=dict)
    row_by_row: bool = True


@dataclass(frozen=True, slots=True)
class Outer:
    """The sides of an outer join whose ON clause is being read: rows appear without it."""

    left: set[Node]
    right: set[Node]
    full: bool


def shards_of(nodes: Iterable[Node], *, reads_reference: bool) -> frozenset[int] | None:
    """Return the logical shards that the rows of all nodes lie on; None for all.

    Args:
        nodes: of a walk.
        reads_reference: whether tables were met that are the same everywhere.

    Raises:
        NoShardKeyError: nothing tells where to run it.
        UnsupportedStatementError: rows of several groups may lie on different logical shards.
    """
    groups = {id(node.root()): node.root() for node in nodes}
    if not groups:
        if reads_reference:
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
