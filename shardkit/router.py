"""Decides where: a shard key or an id to a logical shard, a set of them to a `Route`.

Pure: no connection, no clock, no randomness. A route is one, some or all logical shards and a
role, and nothing downstream asks again. How a single key names its shard is
`shardkit.strategies`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from shardkit.keys import Key, KeyType
from shardkit.strategies import Directory, Range, Rule
from shardkit.topology import Role

__all__ = ["Entry", "Route", "Router", "UnknownEntriesError", "UnknownValuesError"]

Entry = tuple[Directory, Key]
"""A key of a directory."""


@dataclass(frozen=True, slots=True)
class Route:
    """The router's answer.

    Attributes:
        shards: the logical shards concerned, ascending; never empty.
        total: how many logical shards there are.
        role: the role of the servers asked: replicas for readers, primaries for writers.
        statements: SQL text per physical shard, by name; filled by `session.route`.
    """

    shards: tuple[int, ...]
    total: int
    role: Role
    statements: tuple[tuple[str, str], ...] = ()

    @property
    def kind(self) -> Literal["one", "some", "all"]:
        """How wide the route is."""
        if len(self.shards) == 1:
            return "one"
        return "all" if len(self.shards) == self.total else "some"


class UnknownEntriesError(LookupError):
    """Keys of directories have to be looked up before a decision; never leaves a session.

    Attributes:
        entries: the keys.
    """

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.entries = tuple(entries)
        super().__init__(self.entries)


class UnknownValuesError(LookupError):
    """Unique values have to be looked up before a decision; never leaves a session.

    Attributes:
        values: the values, of `shardkit.uniques`.
    """

    def __init__(self, values: Iterable[Any]) -> None:
        self.values = tuple(values)
        super().__init__(self.values)


class Router:
    """Maps key values to logical shards.

    Args:
        n_logical_shards: the fixed number of logical shards, 1 to 8192.
        entries: logical shards of the directory keys that were looked up.
        values: logical shards of the rows that may have the unique values that were looked up.
    """

    __slots__ = ("entries", "total", "values")

    def __init__(
        self,
        n_logical_shards: int,
        entries: Mapping[Entry, int] | None = None,
        values: Mapping[Any, frozenset[int]] | None = None,
    ) -> None:
        self.total = n_logical_shards
        self.entries = entries or {}
        self.values = values or {}

    def shard(self, rule: Rule, value: object) -> int:
        """Return the logical shard that a key value names.

        Raises:
            InvalidShardKeyError: the value is None, of a wrong type, or names a shard that
                does not exist.
            UnknownEntriesError: it is the key of a directory and was not looked up.
        """
        key = rule.key(value)
        strategy = rule.strategy
        if not isinstance(strategy, Directory):
            return strategy.shard(key, self.total)
        try:
            return self.entries[strategy, key]
        except KeyError:
            raise UnknownEntriesError([(strategy, key)]) from None

    def shards(self, rule: Rule, values: Iterable[object]) -> frozenset[int]:
        """Return the logical shards that several key values name."""
        strategy = rule.strategy
        if isinstance(strategy, Directory):
            values = list(values)
            wanted = dict.fromkeys((strategy, rule.key(value)) for value in values)
            if unknown := [entry for entry in wanted if entry not in self.entries]:
                raise UnknownEntriesError(unknown)
        return frozenset(self.shard(rule, value) for value in values)

    def shards_compared(self, rule: Rule, operator: str, value: object) -> frozenset[int] | None:
        """Return the logical shards of the keys on one side of a value.

        Args:
            rule: of the column on the left.
            operator: `lt`, `le`, `gt` or `ge`.
            value: on the right.

        Returns:
            None when the comparison confines nothing: keys are not placed in order, or are text,
            whose order in the database is its collation's.
        """
        strategy = rule.strategy
        if not isinstance(strategy, Range) or rule.key_type is KeyType.TEXT:
            return None
        key = rule.key(value)
        low, high = (None, key) if operator in {"lt", "le"} else (key, None)
        return strategy.shards_between(low, high, self.total, below=operator == "lt")
