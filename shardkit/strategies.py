"""How a shard key names its logical shard: embedded id, hash, range or directory.

A strategy is a small value that a model declares. Together with the type of its column it makes
a `Rule`; columns with equal rules hold equal keys on one logical shard, so their rows may be
joined. The text of a rule is stored with the data, and data placed by another rule is refused.
Pure: a directory is looked up elsewhere, before routing.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from shardkit import ids
from shardkit.errors import ConfigurationError, InvalidShardKeyError
from shardkit.keys import Key, KeyType, canonical, checked, shown
from shardkit.topology import MAX_LOGICAL_SHARDS

__all__ = [
    "EMBEDDED",
    "Directory",
    "Embedded",
    "Hash",
    "Range",
    "Rule",
    "Strategy",
    "hash_shard",
    "strategy_named",
]


@dataclass(frozen=True, slots=True)
class Embedded:
    """The key is a shardkit id and carries its logical shard."""

    name = "embedded"

    def shard(self, key: Key, total: int) -> int:
        """Return the logical shard of a key.

        Raises:
            InvalidShardKeyError: it is no id, or carries a shard that does not exist.
        """
        if type(key) is not int or not 0 < key <= ids.MAX_ID:
            raise InvalidShardKeyError(
                f"{shown(key)} is not an id, so it cannot place a row",
                hint="ids are whole numbers from 1 to 2^63 - 1; hash other keys",
            )
        shard = (key >> ids.SEQUENCE_BITS) & ids.SHARD_MASK
        if shard >= total:
            raise InvalidShardKeyError(
                f"id {key} carries logical shard {shard}; the last one is {total - 1}"
            )
        return shard


@dataclass(frozen=True, slots=True)
class Hash:
    """The key is any text, whole number, UUID or bytes; its hash names the logical shard."""

    name = "hash"

    def shard(self, key: Key, total: int) -> int:
        """Return the logical shard of a key."""
        return hash_shard(canonical(key), total)


@dataclass(frozen=True, slots=True)
class Range:
    """The key lies in one of consecutive ranges, each on a logical shard.

    Numbers are ordered as numbers, UUIDs and bytes by their bytes, text by code point.

    Args:
        bounds: `(upper bound, logical shard)` pairs, ascending. A range ends before its bound
            and begins where the one before it ends, so ranges neither overlap nor leave gaps;
            the first has no lower end. Several ranges may share a logical shard.
        rest: logical shard of the keys from the last bound on; None refuses them.

    Raises:
        ConfigurationError: no bounds, bounds of several types, bounds that do not ascend, or a
            logical shard that cannot exist.

    Example:
        >>> Range([(1_000, 0), (2_000, 1)], rest=2).shard(1_000, 64)
        1
    """

    bounds: Sequence[tuple[Key, int]]
    rest: int | None = None

    name = "range"

    def __post_init__(self) -> None:
        try:
            pairs = tuple((bound, shard) for bound, shard in self.bounds)
        except (TypeError, ValueError):
            raise ConfigurationError(
                "Range: give (upper bound, logical shard) pairs, ascending"
            ) from None
        if not pairs:
            raise ConfigurationError("Range: give at least one upper bound")
        shards = [shard for _, shard in pairs] + ([] if self.rest is None else [self.rest])
        for shard in shards:
            if type(shard) is not int or not 0 <= shard < MAX_LOGICAL_SHARDS:
                raise ConfigurationError(
                    f"Range: {shown(shard)} is not a logical shard",
                    hint=f"logical shards are numbers from 0 to {MAX_LOGICAL_SHARDS - 1}",
                )
        key_type = _type_of(pairs[0][0])
        try:
            bounds = [checked(key_type, bound) for bound, _ in pairs]
        except InvalidShardKeyError as error:
            raise ConfigurationError(
                f"Range: upper bound {error.message}", hint=error.hint
            ) from None
        for lower, upper in itertools.pairwise(bounds):
            if not lower < upper:  # type: ignore[operator]  # of one type, as checked
                raise ConfigurationError(
                    f"Range: upper bound {shown(upper)} follows {shown(lower)}",
                    hint="sort the bounds and name each once",
                )
        object.__setattr__(self, "bounds", pairs)

    @property
    def key_type(self) -> KeyType:
        """The type of the bounds, which the column must have too."""
        return _type_of(self.bounds[0][0])

    def shard(self, key: Key, total: int) -> int:
        """Return the logical shard of a key.

        Raises:
            InvalidShardKeyError: it lies beyond the last bound.
            ConfigurationError: its range names a logical shard that does not exist.
        """
        position = bisect_right(self.bounds, key, key=lambda pair: pair[0])
        shard = self.rest if position == len(self.bounds) else self.bounds[position][1]
        if shard is None:
            raise InvalidShardKeyError(
                f"{shown(key)} lies beyond the last range, which ends before "
                f"{shown(self.bounds[-1][0])}",
                hint="add a range, or give Range(rest=…)",
            )
        return _existing(shard, total, self)

    def shards_between(
        self, low: Key | None, high: Key | None, total: int, *, below: bool = False
    ) -> frozenset[int]:
        """Return the logical shards of the keys from one to another.

        Unlike a single key, an end beyond the last range is no error: nothing lies there.

        Args:
            low: the first key; None for no lower end.
            high: the last key; None for no upper end.
            total: how many logical shards there are.
            below: whether `high` itself is left out.
        """
        values = [bound for bound, _ in self.bounds]
        first = 0 if low is None else bisect_right(values, low)
        last = len(values)
        if high is not None:
            last = bisect_left(values, high) if below else bisect_right(values, high)
        named = [shard for _, shard in self.bounds] + ([] if self.rest is None else [self.rest])
        return frozenset(_existing(shard, total, self) for shard in named[first : last + 1])


@dataclass(frozen=True, slots=True)
class Directory:
    """The logical shard of each key is chosen when it is first written, and looked up afterwards.

    Args:
        directory: name under which keys are kept; tables that name one directory are co-located.

    Raises:
        ConfigurationError: the name is not lower-case letters, digits and underscores, 63 at most.
    """

    directory: str

    name = "directory"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]{0,62}", self.directory):
            raise ConfigurationError(
                f"Directory: {shown(self.directory)} is not a name",
                hint="lower-case letters, digits and underscores, at most 63, a letter first",
            )


Strategy = Embedded | Hash | Range | Directory
"""How key values name logical shards; what `__shard_strategy__` takes, or a name of one."""

_NAMED: Final[dict[str, Strategy]] = {"embedded": Embedded(), "hash": Hash()}


@dataclass(frozen=True, slots=True)
class Rule:
    """How the values of one column name logical shards.

    Columns with equal rules are co-located: equal values lie on one logical shard.

    Attributes:
        strategy: how.
        key_type: of which type the values are.
    """

    strategy: Strategy
    key_type: KeyType

    def __post_init__(self) -> None:
        wanted = KeyType.INTEGER if isinstance(self.strategy, Embedded) else None
        if isinstance(self.strategy, Range):
            wanted = self.strategy.key_type
        if wanted not in {None, self.key_type}:
            raise ConfigurationError(
                f"the strategy {self.strategy.name} places {wanted} keys; the column holds "
                f"{self.key_type} ones",
                hint='change the column, or choose __shard_strategy__ = "hash"',
            )

    def key(self, value: object) -> Key:
        """Return a value as a key; see `shardkit.keys.checked`."""
        return checked(self.key_type, value)

    def text(self, column: str) -> str:
        """Return the rule of a column as text: what is stored, and equal where rules are equal."""
        parts: dict[str, Any] = {
            "column": column, "strategy": self.strategy.name, "type": self.key_type.value,
        }  # fmt: skip
        if isinstance(self.strategy, Hash | Directory):  # entries lie where the hash says
            parts["version"] = HASH_VERSION
        if isinstance(self.strategy, Range):
            parts["bounds"] = [[_written(bound), shard] for bound, shard in self.strategy.bounds]
            parts["rest"] = self.strategy.rest
        elif isinstance(self.strategy, Directory):
            parts["directory"] = self.strategy.directory
        return json.dumps(parts, sort_keys=True)

    @classmethod
    def read(cls, text: str) -> Rule:
        """Return the rule of a text that `text` made.

        Raises:
            ConfigurationError: it was made by a version of shardkit that knows more.
        """
        try:
            parts = json.loads(text)
            key_type = KeyType(parts["type"])
            strategy: Strategy
            match parts["strategy"]:
                case "hash" if parts["version"] == HASH_VERSION:
                    strategy = Hash()
                case "range":
                    bounds = [(_read(key_type, b), shard) for b, shard in parts["bounds"]]
                    strategy = Range(bounds, rest=parts["rest"])
                case "directory" if parts["version"] == HASH_VERSION:
                    strategy = Directory(parts["directory"])
                case "embedded":
                    strategy = Embedded()
                case _:
                    raise ValueError(text)
            return cls(strategy, key_type)
        except (ValueError, KeyError, TypeError):
            raise ConfigurationError(
                f"the stored rule {shown(text)} cannot be read",
                hint="it was written by a newer shardkit; upgrade this one",
            ) from None


HASH_VERSION: Final = 1
"""Version of `hash_shard`; stored with the data, so that another one is refused."""

EMBEDDED: Final = Rule(Embedded(), KeyType.INTEGER)
"""The rule of ids."""


def hash_shard(key: bytes, total: int) -> int:
    """Return the logical shard that the hash of a canonical key names.

    Never changes: rows lie where it says. Source: golden vectors in tests/unit/test_router.py.
    """
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) % total


def strategy_named(given: object) -> Strategy:
    """Return the strategy of a `__shard_strategy__`: itself, or the one of that name.

    Raises:
        ConfigurationError: it is none, or takes parameters and was only named.
    """
    if isinstance(given, Strategy):
        return given
    found = _NAMED.get(given) if isinstance(given, str) else None
    if found is None:
        raise ConfigurationError(
            f"__shard_strategy__ {shown(given)} is unknown",
            hint='one of: "embedded", "hash", Range(…), Directory(…)',
        )
    return found


def _existing(shard: int, total: int, strategy: Range) -> int:
    if shard >= total:
        raise ConfigurationError(
            f"{strategy.name} names logical shard {shard}; the last one is {total - 1}",
            hint="correct the bounds in the model",
        )
    return shard


def _type_of(bound: object) -> KeyType:
    types = {"int": KeyType.INTEGER, "str": KeyType.TEXT, "UUID": KeyType.UUID,
             "bytes": KeyType.BYTES}  # fmt: skip
    try:
        return types[type(bound).__name__]
    except KeyError:
        raise ConfigurationError(
            f"Range: {shown(bound)} is no bound", hint="bounds are int, str, uuid.UUID or bytes"
        ) from None


def _written(bound: Key) -> int | str:
    if isinstance(bound, bytes):
        return bound.hex()
    return bound if isinstance(bound, int) else str(bound)


def _read(key_type: KeyType, bound: Any) -> Key:
    return bytes.fromhex(bound) if key_type is KeyType.BYTES else checked(key_type, bound)
