"""Mints ids for any logical shard, from blocks leased in that shard's own database.

The default owner of ids: the session mints through it at flush, and so does `shardkit ids mint`.
A block is a range of states that the database has counted past before it answers, so any number
of processes mint without duplicates, across fork, kill, restart and lost answers. It fetches
blocks through a function it is given and never talks to a database itself.
Source: docs/ids.md.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from shardkit.clock import SYSTEM, Clock
from shardkit.errors import IdRequestError
from shardkit.ids import MAX_LEASE, SEQUENCE_BITS, compose, expand, in_child

__all__ = [
    "CLOCK_BEHIND",
    "MAX_MINT",
    "NOT_ACTIVE",
    "NOT_HERE",
    "IdBlock",
    "IdMinter",
    "Lease",
]

MAX_MINT = 1_000_000
"""The most ids one call mints for a logical shard: about a second of its cap."""

CLOCK_BEHIND, NOT_HERE, NOT_ACTIVE = "SK001", "SK002", "SK003"
"""What `shardkit.lease_ids` refuses with: the clock is too far behind the last id; the logical
shard is not on this server; it may not be written here now. Source: SQL leaves SQLSTATE classes
from I to Z to implementations, and PostgreSQL uses none that begins with S."""


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

    __slots__ = ("_end", "_next", "expires", "first", "logical_shard")

    def __init__(self, logical_shard: int, first: int, n: int, *, expires: float) -> None:
        compose((first + n - 1) >> SEQUENCE_BITS, logical_shard, 0)  # checks the ranges once
        self.logical_shard = logical_shard
        self.first = first
        self._next = first
        self._end = first + n
        self.expires = expires

    def take(self, n: int, *, now: float) -> list[int]:
        """Return the next ids, ascending: n of them, or fewer when the block ends."""
        if now >= self.expires:
            return []
        first, self._next = self._next, min(self._next + n, self._end)
        return expand(first, self._next - first, self.logical_shard)


Lease = Callable[[Mapping[int, int]], Mapping[int, int]]
"""Reserves ranges: number of ids by logical shard in, first generator state by shard out.

Each number is at most `MAX_LEASE`; states of a logical shard never fall from call to call.
"""


class IdMinter:
    """Mints ids for any logical shard from blocks leased in that shard's database.

    Thread-safe, and safe to share between tasks of an event loop: no lock is held while a
    lease is fetched, so two callers may each fetch a block, which wastes ids but repeats none.
    A child process forgets the blocks of its parent.

    *Invariant:* ids of a call are larger than those of every call that returned before it
    began, for the same logical shard.

    Args:
        lease: fetches ranges, one round trip per physical shard.
        block_size: ids leased ahead for a shard that mints one at a time.
        block_ttl: seconds a block may be used; also the most that ids of two processes can be
            out of time order. Source: docs/ids.md.
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
        self.after_fork()
        in_child(self)

    def mint(self, counts: Mapping[int, int]) -> dict[int, list[int]]:
        """Return new ids by logical shard, ascending within each.

        Args:
            counts: how many ids each logical shard needs, 1 to `MAX_MINT`.

        Raises:
            IdRequestError: a number is out of range, or a logical shard does not exist.
            ClockMovedBackError: the server's clock is far behind its last id (retryable).
            UnavailableError: a lease could not be fetched (retryable).
        """
        minted: dict[int, list[int]] = {}
        missing: dict[int, int] = {}
        now = self._clock.monotonic()
        with self._lock:
            for shard, n in counts.items():
                if not 1 <= n <= MAX_MINT:
                    raise IdRequestError(
                        f"cannot mint {n} ids: give 1 to {MAX_MINT}", logical_shard=shard
                    )
                block = self._blocks.get(shard)
                taken = minted[shard] = [] if block is None else block.take(n, now=now)
                if len(taken) < n:
                    missing[shard] = n - len(taken)
        while missing:
            missing = self._fetch(missing, minted)
        return minted

    def _fetch(self, missing: Mapping[int, int], minted: dict[int, list[int]]) -> dict[int, int]:
        """Add ids of fresh blocks to those minted; return how many are missing still."""
        sizes = {shard: min(max(n, self._block_size), MAX_LEASE) for shard, n in missing.items()}
        # A block's life counts from before the request: its values are from then.
        asked = self._clock.monotonic()
        still: dict[int, int] = {}
        for shard, first in self._lease(sizes).items():
            block = IdBlock(shard, first, sizes[shard], expires=float("inf"))
            taken = block.take(missing[shard], now=asked)
            minted[shard] += taken
            if len(taken) < missing[shard]:
                still[shard] = missing[shard] - len(taken)
            block.expires = asked + self._block_ttl
            with self._lock:
                # A lease that was overtaken by a later one must not lead back to older ids.
                kept = self._blocks.get(shard)
                if kept is None or kept.first < first:
                    self._blocks[shard] = block
        return still

    def after_fork(self) -> None:
        """Forget the parent's blocks in a child process."""
        self._lock = threading.Lock()
        self._blocks: dict[int, IdBlock] = {}
