"""Time-sortable 64-bit ids that carry their logical shard: layout, parsing and a generator.

    bit offset  field                         width  range
    63          sign, always 0                1      0
    23-62       milliseconds since EPOCH_MS   40     0 to 2^40 - 1, ends in November 2060
    10-22       logical shard                 13     0 to 8191
    0-9         sequence                      10     0 to 1023, carries into the millisecond

Ids of one logical shard sort by the time they were minted; ids of different shards sort by
millisecond. Two owners of one logical shard must not mint from their own clocks: they lease
ranges from its database, see `shardkit.minting`. `IdGenerator` is for a logical shard that one
process has to itself. Both count a *state*, `milliseconds << 10 | sequence`, that never falls.
This module never talks to a database. In JSON an id is a string: JavaScript numbers end at
2^53. Source: docs/ids.md.
"""

from __future__ import annotations

import datetime as dt
import os
import threading
import weakref
from dataclasses import dataclass
from typing import Protocol

from shardkit.clock import SYSTEM, Clock
from shardkit.errors import ClockMovedBackError, IdError, IdRequestError, InvalidIdError

__all__ = [
    "EPOCH_MS",
    "MAX_AHEAD_MS",
    "MAX_ID",
    "MAX_LEASE",
    "IdGenerator",
    "IdParts",
    "compose",
    "expand",
    "in_child",
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

MAX_AHEAD_MS = 50
"""How far ids may run ahead of the clock, in milliseconds. Source: docs/ids.md."""

MAX_LEASE = MAX_AHEAD_MS << SEQUENCE_BITS
"""The most ids reserved at once: what the clock allows ahead of itself."""

_AHEAD = MAX_AHEAD_MS << TIME_SHIFT
_CARRY = (1 << TIME_SHIFT) - (1 << SEQUENCE_BITS)
"""From the id one past the end of a millisecond to the first of the next."""


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
        InvalidIdError: not an `int` from 1 to 2^63 - 1.
    """
    if type(id) is not int or not 0 < id <= MAX_ID:
        raise InvalidIdError(f"{id!r} is not an id: ids are whole numbers from 1 to 2^63 - 1")
    return (id >> SEQUENCE_BITS) & SHARD_MASK


def parse(id: int, /) -> IdParts:
    """Return the time, logical shard and sequence of an id.

    Raises:
        InvalidIdError: not an `int` from 1 to 2^63 - 1.

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


def expand(first: int, n: int, logical_shard: int) -> list[int]:
    """Return the ids of n generator states, ascending.

    Args:
        first: the first state, `milliseconds << 10 | sequence`.
        n: how many; within a millisecond ids are next to each other.
        logical_shard: the shard they carry.
    """
    made: list[int] = []
    while n > 0:
        sequence = first & SEQUENCE_MASK
        here = min(n, (1 << SEQUENCE_BITS) - sequence)
        start = (first >> SEQUENCE_BITS) << TIME_SHIFT | logical_shard << SEQUENCE_BITS | sequence
        made += range(start, start + here)
        first += here
        n -= here
    return made


class Forkable(Protocol):
    """What must know that it has become a child process's copy."""

    def after_fork(self) -> None:
        """Give up what belongs to the parent."""


_forkable: weakref.WeakSet[Forkable] = weakref.WeakSet()


def in_child(owner: Forkable) -> None:
    """Have `after_fork` called in every child process, as long as its object lives."""
    _forkable.add(owner)


def _after_fork() -> None:
    for owner in list(_forkable):
        owner.after_fork()


os.register_at_fork(after_in_child=_after_fork)


class IdGenerator:
    """Mints ids of one logical shard from this process's clock, without a database.

    For a logical shard that one process has to itself, such as a loader; where several may
    mint, use `shardkit.minting`. Thread-safe. A child process cannot use its parent's generator.

    *Invariant:* each id is larger than the one before, whatever the clock does, and less than
    `MAX_AHEAD_MS` ahead of the clock when it is handed out.

    Args:
        logical_shard: the shard the ids will carry, 0 to 8191.
        clock: source of wall time.
        after: the last id an earlier owner minted, when one did; new ids are larger.
        patience: seconds a call may wait for the clock to catch up.

    Raises:
        InvalidIdError: the logical shard or `after` is out of range.

    Example:
        >>> new = IdGenerator(42).next()
        >>> shard_of(new)
        42
    """

    def __init__(
        self,
        logical_shard: int,
        *,
        clock: Clock = SYSTEM,
        after: int | None = None,
        patience: float = 1.0,
    ) -> None:
        self._shard_bits = compose(0, logical_shard, 0)
        self.logical_shard = logical_shard
        self._clock = clock
        self._unix_ms = clock.unix_ms
        self._patience = patience
        # The id before the next. Of an earlier owner's millisecond nothing is left to use.
        self._last = self._shard_bits
        if after is not None:
            shard_of(after)
            self._last = (after >> TIME_SHIFT) << TIME_SHIFT | self._shard_bits | SEQUENCE_MASK
        # unix_ms << TIME_SHIFT, plus this, is the first id of that millisecond.
        self._origin = self._shard_bits - (EPOCH_MS << TIME_SHIFT)
        self._is_inherited = False
        self._lock = threading.Lock()
        in_child(self)

    def next(self) -> int:
        """Return a new id.

        Raises:
            ClockMovedBackError: the clock is too far behind the last id to wait (retryable).
            IdError: the generator belongs to the parent process.
        """
        # max(state + 1, now) on whole ids: next to each other within a millisecond.
        with self._lock:
            now = (self._unix_ms() << TIME_SHIFT) + self._origin
            new = self._last + 1
            if new < now:
                new = now
            elif not new & SEQUENCE_MASK:
                new += _CARRY
            if new < now + _AHEAD and new <= MAX_ID:
                self._last = new
                return new
        return self.many(1)[0]

    def many(self, k: int) -> list[int]:
        """Return k new ids, ascending, reserved at once.

        Args:
            k: 1 to `MAX_LEASE`.

        Raises:
            IdRequestError: k is out of range.
            ClockMovedBackError: the clock is too far behind the last id to wait (retryable).
            IdError: the generator belongs to the parent process.
        """
        if type(k) is not int or not 1 <= k <= MAX_LEASE:
            raise IdRequestError(
                f"cannot mint {k!r} ids at once: give 1 to {MAX_LEASE}",
                logical_shard=self.logical_shard,
            )
        give_up = None
        while True:
            with self._lock:
                now = (self._unix_ms() - EPOCH_MS) << SEQUENCE_BITS
                last = self._last
                state = (last >> TIME_SHIFT) << SEQUENCE_BITS | last & SEQUENCE_MASK
                first = max(state + 1, now)
                too_far = first + k - now - MAX_LEASE
                if too_far <= 0:
                    minted = expand(first, k, self.logical_shard)
                    if minted[-1] > MAX_ID:
                        raise IdError("the clock is past the end of this id layout")
                    self._last = minted[-1]
                    return minted
            if self._is_inherited:
                raise IdError(
                    "this generator belongs to the parent process",
                    hint="mint with IdMinter, or make one generator after the fork",
                    logical_shard=self.logical_shard,
                )
            wait = (too_far + SEQUENCE_MASK >> SEQUENCE_BITS) / 1000
            monotonic = self._clock.monotonic()
            give_up = monotonic + self._patience if give_up is None else give_up
            if monotonic + wait > give_up:
                raise ClockMovedBackError(
                    f"the clock is {wait:.3f} s too far behind the last id",
                    logical_shard=self.logical_shard,
                )
            self._clock.sleep(wait)

    def after_fork(self) -> None:
        """Refuse to mint in a child process."""
        self._lock = threading.Lock()
        self._is_inherited = True
        self._last = MAX_ID  # sends every call to the check in `many`


def _ms(time: dt.datetime) -> int:
    if time.tzinfo is None:
        raise InvalidIdError(f"{time!r} has no time zone; ids count UTC milliseconds")
    origin = dt.datetime.fromtimestamp(EPOCH_MS / 1000, dt.UTC)
    return (time - origin) // dt.timedelta(milliseconds=1)
