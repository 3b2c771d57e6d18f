"""Time-sortable 64-bit ids that carry their logical shard: layout, parsing and minting.

    bit offset  field                         width  range
    63          sign, always 0                1      0
    23-62       milliseconds since EPOCH_MS   40     0 to 2^40 - 1, ends in November 2060
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
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from shardkit.clock import SYSTEM, Clock
from shardkit.errors import InvalidIdError

__all__ = [
    "EPOCH_MS",
    "MAX_ID",
    "IdBlock",
    "IdMinter",
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
    """A leased range of ids of one logical shard, used up from the front.

    *Invariant:* a value is handed out at most once, and none after `expires`: what is left of
    a block then is dropped, so that ids of several owners stay at most `ttl` out of order.
    Not thread-safe: its owner locks.

    Args:
        logical_shard: the shard the ids will carry.
        first: first generator state of the range, from `shardkit.lease_ids`.
        n: length of the range.
        expires: monotonic time, in seconds, from which on it hands out nothing.
    """

    __slots__ = ("_end", "_next", "_shard_bits", "expires", "logical_shard")

    def __init__(self, logical_shard: int, first: int, n: int, *, expires: float) -> None:
        compose((first + n - 1) >> SEQUENCE_BITS, logical_shard, 0)  # checks the ranges once
        self.logical_shard = logical_shard
        self._shard_bits = logical_shard << SEQUENCE_BITS
        self._next = first
        self._end = first + n
        self.expires = expires

    def take(self, n: int, *, now: float) -> list[int]:
        """Return the next ids, ascending: n of them, or fewer when the block ends."""
        if now >= self.expires:
            return []
        first, self._next = self._next, min(self._next + n, self._end)
        return [
            (state >> SEQUENCE_BITS) << TIME_SHIFT | self._shard_bits | state & SEQUENCE_MASK
            for state in range(first, self._next)
        ]


Lease = Callable[[Mapping[int, int]], Mapping[int, int]]
"""Reserves ranges: number of ids by logical shard in, first generator state by shard out."""


class IdMinter:
    """Mints ids for any logical shard from blocks leased in that shard's database.

    Thread-safe, and safe to share between tasks of an event loop: no lock is held while a
    lease is fetched, so two callers may each fetch a block, which wastes ids but repeats none.
    A child process forgets the blocks of its parent.

    Args:
        lease: fetches ranges, one round trip per physical shard.
        block_size: ids leased ahead for a shard that mints one at a time.
        block_ttl: seconds a block may be used; also the most that ids of two processes can be
            out of time order. Source: docs/architecture.md, "Ids".
        clock: source of monotonic time.
    """

    def __init__(
        self,
        lease: Lease,
        *,
        block_size: int = 64,
        block_ttl: float = 0.2,
        clock: Clock = SYSTEM,
    ) -> None:
        self._lease = lease
        self._block_size = block_size
        self._block_ttl = block_ttl
        self._clock = clock
        self._forget()
        os.register_at_fork(after_in_child=self._forget)

    def mint(self, counts: Mapping[int, int]) -> dict[int, list[int]]:
        """Return new ids by logical shard, ascending within each.

        Args:
            counts: how many ids each logical shard needs.

        Raises:
            UnavailableError: a lease could not be fetched (retryable).
        """
        minted: dict[int, list[int]] = {}
        missing: dict[int, int] = {}
        now = self._clock.monotonic()
        with self._lock:
            for shard, n in counts.items():
                block = self._blocks.get(shard)
                taken = minted[shard] = [] if block is None else block.take(n, now=now)
                if len(taken) < n:
                    missing[shard] = n - len(taken)
        if not missing:
            return minted
        sizes = {shard: max(n, self._block_size) for shard, n in missing.items()}
        # The block's life counts from before the request: its values are from then.
        asked = self._clock.monotonic()
        for shard, first in self._lease(sizes).items():
            block = IdBlock(shard, first, sizes[shard], expires=float("inf"))
            minted[shard] += block.take(missing[shard], now=asked)
            block.expires = asked + self._block_ttl
            with self._lock:
                self._blocks[shard] = block
        return minted

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._blocks: dict[int, IdBlock] = {}


def _ms(time: dt.datetime) -> int:
    if time.tzinfo is None:
        raise InvalidIdError(f"{time!r} has no time zone; ids count UTC milliseconds")
    origin = dt.datetime.fromtimestamp(EPOCH_MS / 1000, dt.UTC)
    return (time - origin) // dt.timedelta(milliseconds=1)
