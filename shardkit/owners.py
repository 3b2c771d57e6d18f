"""Who owns the logical shards that are about to be used: asked in time, and waited for.

Sessions and shardkit's own statements come here before they use a logical shard. What this process
knows is `shardkit.heldmap`; who asks the servers is `shardkit.mapwatch`. Made by
`shardkit.connections`. Source: docs/moves.md.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Final

from shardkit import deadlines, fences
from shardkit.clock import SYSTEM, Clock
from shardkit.heldmap import HeldMap, closed
from shardkit.mapwatch import AsyncMapWatch, MapWatch
from shardkit.topology import Hold, ShardMap

__all__ = ["FENCE_PATIENCE", "Owners"]

FENCE_PATIENCE: Final = 10.0
"""Seconds that a session without a deadline waits for a logical shard that is being moved; a fence
lasts half of that at most (`shardkit.ownership.LIFT_AFTER`)."""


class Owners:
    """The owners of the logical shards of one cluster.

    Args:
        held: the shard map as it is known.
        watch: asks the servers.
        clock: source of monotonic time.

    Attributes:
        held: the shard map as it is known.
    """

    def __init__(
        self,
        held: HeldMap,
        watch: MapWatch | AsyncMapWatch,
        *,
        clock: Clock = SYSTEM,
    ) -> None:
        self.held = held
        self._watch = watch
        self._clock = clock

    def current(self, logical_shards: Collection[int]) -> ShardMap:
        """Return the shard map; what it says of some logical shards is no older than it may be."""
        held = self.held
        asked: set[str] = set()
        while True:
            found = held.map
            if len(logical_shards) == len(found):
                owners = set(found.owners)
            else:
                owners = {found.owners[n] for n in logical_shards}
            stale = [name for name in owners - asked if not held.is_current(name)]
            if not stale:
                return found
            asked.update(stale)
            # At the start each may know of the others' shards what the first placement does not.
            is_first = all(math.isinf(until) for until in held.expires.values())
            self._watch.refresh([*held.expires] if is_first else stale)

    def opened(self, logical_shards: Collection[int], *, writes: bool) -> ShardMap:
        """Return the shard map as soon as logical shards can be used, for which it waits.

        Args:
            logical_shards: that are about to be used.
            writes: whether they are to be written to.

        Raises:
            ShardFencedError: one stays closed beyond the deadline, or `FENCE_PATIENCE` (retryable).
        """
        until: float | None = None
        while True:
            found = self.current(logical_shards)
            if not found.held:
                return found
            waited = closed(found, logical_shards, writes=writes)
            if not waited:
                return found
            now = self._clock.monotonic()
            until = now + deadlines.left(FENCE_PATIENCE) if until is None else until
            if now >= until or not self._watch.wait(waited, until - now, writes=writes):
                raise fences.still_closed(waited[0], found)

    def ask(self, physical: Collection[str] | None = None) -> ShardMap:
        """Ask physical shards, or all of them, and return the shard map that this makes."""
        self._watch.refresh([*self.held.expires] if physical is None else physical)
        return self.held.map

    def whereabouts(self, logical_shard: int) -> tuple[str, Hold | None]:
        """Return the owner of a logical shard, and why it cannot be used as ever."""
        found = self.current((logical_shard,))
        return found.owners[logical_shard], found.held.get(logical_shard)

    def distrust(self, physical: str) -> None:
        """Have a physical shard asked what it owns before it is used again."""
        self.held.distrust(physical)
        self._watch.hurry([physical])

    def doubt(self, physical: str) -> None:
        """Have a physical shard asked what it owns soon; nobody waits for that."""
        self._watch.hurry([physical])
