"""Decides where: a shard key or an id to a logical shard, a set of them to a `Route`.

Pure: no connection, no clock, no randomness but the one passed in. A route is one, some or all
logical shards and a role, and nothing downstream asks again.
"""

from __future__ import annotations

import hashlib
import random
import unicodedata
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from shardkit import ids
from shardkit.errors import InvalidShardKeyError
from shardkit.topology import Role

__all__ = ["Placement", "Route", "Router", "Strategy", "anywhere"]


class Strategy(StrEnum):
    """How a key value names its logical shard.

    `EMBEDDED`: the value is a shardkit id and carries the shard. `HASH`: any text, number, UUID
    or bytes, hashed.
    """

    EMBEDDED = "embedded"
    HASH = "hash"


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


Placement = Callable[[int], int]
"""Chooses the logical shard, below its argument, of a row that nothing places yet."""


def anywhere(n_logical_shards: int) -> int:
    """Place at random: even on average, and no process needs to know what others chose."""
    return random.randrange(n_logical_shards)  # noqa: S311 - spreads load, guards nothing


class Router:
    """Maps key values to logical shards.

    Args:
        n_logical_shards: the fixed number of logical shards, 1 to 8192.
    """

    __slots__ = ("total",)

    def __init__(self, n_logical_shards: int) -> None:
        self.total = n_logical_shards

    def shard(self, strategy: Strategy, value: object) -> int:
        """Return the logical shard that a key value names.

        Raises:
            InvalidShardKeyError: the value is None, of a wrong type, or names a shard that
                does not exist.
        """
        if strategy is Strategy.HASH:
            digest = hashlib.blake2b(canonical(value), digest_size=8).digest()
            return int.from_bytes(digest) % self.total
        if type(value) is not int or not 0 <= value <= ids.MAX_ID:
            raise InvalidShardKeyError(
                f"{value!r} is not an id, so it cannot place a row",
                hint="ids are whole numbers from 0 to 2^63 - 1; hash other keys",
            )
        shard = (value >> ids.SEQUENCE_BITS) & ids.SHARD_MASK
        if shard >= self.total:
            raise InvalidShardKeyError(
                f"id {value} carries logical shard {shard}; the last one is {self.total - 1}"
            )
        return shard

    def shards(self, strategy: Strategy, values: Iterable[object]) -> frozenset[int]:
        """Return the logical shards that several key values name."""
        return frozenset(self.shard(strategy, value) for value in values)


def canonical(value: object) -> bytes:
    """Return the one byte string of a key value, the same in every process and version.

    The first byte tells the type, so that 1 and "1" differ on purpose: a column has one type.
    Text is NFC-normalised, a UUID is its 16 bytes whatever its spelling.

    Raises:
        InvalidShardKeyError: not text, a whole number, a UUID or bytes.
    """
    if isinstance(value, str):
        return b"s" + unicodedata.normalize("NFC", value).encode("utf-8", "surrogatepass")
    if type(value) is int:
        return b"i" + str(value).encode("ascii")
    if isinstance(value, uuid.UUID):
        return b"u" + value.bytes
    if isinstance(value, bytes):
        return b"b" + value
    raise InvalidShardKeyError(
        f"{value!r} cannot be a shard key: give text, a whole number, a UUID or bytes"
    )
