"""Time-sortable 64-bit ids that carry their logical shard: layout, parsing and minting.

    bit offset  field                         width  range
    63          sign, always 0                1      0
    23-62       milliseconds since EPOCH_MS   40     0 to 2^40 - 1, ends in October 2060
    10-22       logical shard                 13     0 to 8191
    0-9         sequence                      10     0 to 1023, carries into the millisecond

Ids of one logical shard sort by the time they were minted; ids of different shards sort by
millisecond. `IdBlock` hands out a range that `shardkit.lease_ids` in the logical shard's own
database reserved, so that any number of processes mint without duplicates, across fork, kill
and restart. This module never talks to a database. In JSON an id is a string: JavaScript
numbers end at 2^53. Source: docs/architecture.md, decision 2.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass

from shardkit.clock import SYSTEM, Clock
from shardkit.errors import InvalidIdError

__all__ = [
    "EPOCH_MS",
    "MAX_ID",
    "IdBlock",
    "IdParts",
    "compose",
    "max_id_at",
    "min_id_at",
    "parse",
    "shard_of",
]

EPOCH_MS = 1_767_225_600_000
"""Origin of the millisecond field: 2026-01-01T00:00:00Z."""

TIME_BITS, SHARD_BITS, SEQUENCE_BITS = 40, 13, 10
TIME_SHIFT = SHARD_BITS + SEQUENCE_BITS
SHARD_MASK = (1 << SHARD_BITS) - 1
SEQUENCE_MASK = (1 << SEQUENCE_BITS) - 1
MAX_ID = (1 << (TIME_BITS + TIME_SHIFT)) - 1
"""The largest id; also the largest PostgreSQL `bigint`."""


@dataclass(frozen=True, slots=True)
class IdParts:
    """What an id says.

    Attributes:
        time: when it was minted, UTC, to the millisecond.
        logical_shard: where its row lives.
        sequence: position among the ids of that millisecond and shard.
    """

    time: dt.datetime
    logical_shard: int
    sequence: int


def shard_of(id: int, /) -> int:
    """Return the logical shard an id carries.

    Raises:
        InvalidIdError: not an `int` between 0 and 2^63 - 1.
    """
    if type(id) is not int or not 0 <= id <= MAX_ID:
        raise InvalidIdError(f"{id!r} is not an id: ids are whole numbers from 0 to 2^63 - 1")
    return (id >> SEQUENCE_BITS) & SHARD_MASK


def parse(id: int, /) -> IdParts:
    """Return the time, logical shard and sequence of an id.

    Raises:
        InvalidIdError: not an `int` between 0 and 2^63 - 1.

    Example:
        >>> parse(compose(1_000, 42, 7)).logical_shard
        42
    """
    shard = shard_of(id)
    time = dt.datetime.fromtimestamp(EPOCH_MS / 1000, dt.UTC) + dt.timedelta(
        milliseconds=id >> TIME_SHIFT
    )
    return IdParts(time, shard, id & SEQUENCE_MASK)


def compose(ms: int, logical_shard: int, sequence: int) -> int:
    """Return the id of the three parts.

    Args:
        ms: milliseconds since `EPOCH_MS`, 0 to 2^40 - 1.
        logical_shard: 0 to 8191.
        sequence: 0 to 1023.

    Raises:
        InvalidIdError: a part is out of range.
    """
    if not (
        0 <= ms < 1 << TIME_BITS
        and 0 <= logical_shard <= SHARD_MASK
        and 0 <= sequence <= SEQUENCE_MASK
    ):
        raise InvalidIdError(
            f"no id has time {ms} ms, logical shard {logical_shard} and sequence {sequence}"
        )
    return (ms << TIME_SHIFT) | (logical_shard << SEQUENCE_BITS) | sequence


def min_id_at(time: dt.datetime) -> int:
    """Return the smallest id, of any logical shard, minted in the millisecond of `time`."""
    return compose(_ms(time), 0, 0)


def max_id_at(time: dt.datetime) -> int:
    """Return the largest id, of any logical shard, minted in the millisecond of `time`."""
    return compose(_ms(time), SHARD_MASK, SEQUENCE_MASK)


class IdBlock:
    """A leased range of ids of one logical shard, used up one by one.

    *Invariant:* a value is handed out at most once, and none after `expires`: what is left of
    a block then is dropped, so that ids of several owners stay at most `ttl` out of order.
    Not thread-safe: its owner locks.

    Args:
        logical_shard: the shard the ids will carry.
        first: first generator state of the range, from `shardkit.lease_ids`.
        n: length of the range.
        ttl: seconds the block may be used.
        clock: source of the monotonic time that ends it.
    """

    __slots__ = ("_clock", "_end", "_next", "expires", "logical_shard")

    def __init__(
        self, logical_shard: int, first: int, n: int, *, ttl: float, clock: Clock = SYSTEM
    ) -> None:
        self.logical_shard = logical_shard
        self._next = first
        self._end = first + n
        self._clock = clock
        self.expires = clock.monotonic() + ttl

    def take(self) -> int | None:
        """Return the next id, or None when the block is used up or expired."""
        if self._next >= self._end or self._clock.monotonic() >= self.expires:
            return None
        state = self._next
        self._next += 1
        return compose(state >> SEQUENCE_BITS, self.logical_shard, state & SEQUENCE_MASK)


def _ms(time: dt.datetime) -> int:
    if time.tzinfo is None:
        raise InvalidIdError(f"{time!r} has no time zone; ids count UTC milliseconds")
    origin = dt.datetime.fromtimestamp(EPOCH_MS / 1000, dt.UTC)
    return (time - origin) // dt.timedelta(milliseconds=1)
