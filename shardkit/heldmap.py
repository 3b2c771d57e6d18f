"""The shard map as this process holds it: what the servers said, when, and whether that will do.

What a primary said counts for `max_age` seconds on the monotonic clock, from when it was asked;
whoever uses one of its logical shards later has it asked first. Only a logical shard's owner can
give it away, so it is the owner's answer that has to be young. A server that is silent keeps what
it owns: silence changes no owner. Opens no connection: `shardkit.mapwatch` asks.
Thread-safe. Source: docs/moves.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Final

from shardkit.clock import SYSTEM, Clock
from shardkit.forks import ForkSafeLock
from shardkit.ownership import Answer, accepted, arriving, merged
from shardkit.topology import Hold, ShardMap

__all__ = ["HeldMap", "closed"]

_SOON: Final = 5.0
"""Seconds after which a server that did not answer is asked again before it is used: longer than
`shardkit.mapwatch` takes to ask it by itself, so that nobody else waits for one that is gone."""


Tell = Callable[[], None]


def closed(shard_map: ShardMap, logical_shards: Collection[int], *, writes: bool) -> list[int]:
    """Return which of some logical shards cannot be used now.

    Args:
        shard_map: who owns what.
        logical_shards: that are about to be used.
        writes: whether they are to be written to: readers pass a fence.
    """
    held = shard_map.held
    return [n for n in logical_shards if n in held and (writes or held[n] is Hold.HANDED_OVER)]


@dataclass(slots=True)
class _Asked:
    """What is known of asking one server.

    Attributes:
        wanted: number of the last question that somebody waits for.
        answered: number of the last question that was answered, or given up.
        trusted_from: number of the first question whose answer is believed for its full time.
    """

    wanted: int = 0
    answered: int = 0
    trusted_from: int = 0


class HeldMap:
    """The shard map of one cluster.

    Args:
        first: the first placement.
        physical: names of all physical shards.
        max_age: seconds for which an answer counts.
        on_change: told the new map, with the lock held; not to wait for anything.
        clock: source of monotonic time.

    Attributes:
        map: the map now.
        expires: monotonic time until which what a physical shard said counts, by name.
        heard_at: monotonic time at which a primary was last asked that then answered, by name.
        good_until: monotonic time until which every logical shard can be used, for anything; what
            each use of one looks at.
        arriving: logical shards that are on their way, by where from and where to.
    """

    def __init__(
        self,
        first: ShardMap,
        physical: Collection[str],
        *,
        max_age: float,
        on_change: Callable[[ShardMap], None] = lambda _map: None,
        clock: Clock = SYSTEM,
    ) -> None:
        self.map = first
        self.max_age = max_age
        self.expires = dict.fromkeys(physical, -math.inf)
        self.good_until = -math.inf
        self.heard_at = dict.fromkeys(physical, -math.inf)
        self.arriving: Mapping[tuple[str, str], frozenset[int]] = {}
        self._first = first
        self._physical = frozenset(physical)
        self._answers: dict[str, Answer] = {}
        self._asked = {name: _Asked() for name in physical}
        self._waiting: list[tuple[Mapping[str, int], Tell]] = []
        self._openings: dict[Tell, tuple[Collection[int], bool]] = {}
        self._on_change = on_change
        self._clock = clock
        self._guard = ForkSafeLock(self._forget)

    def is_current(self, physical: str) -> bool:
        """Tell whether what a physical shard said still counts."""
        return self._clock.monotonic() < self.expires[physical]

    def distrust(self, physical: str) -> None:
        """Have a physical shard asked before it is used again: it may have lost something."""
        with self._guard.lock:
            asked = self._asked[physical]
            asked.wanted += 1
            asked.trusted_from = asked.wanted
            self.expires[physical] = self.good_until = -math.inf

    # -- who waits

    def wanted(self, physical: Collection[str]) -> dict[str, int]:
        """Note that somebody waits for fresh answers; return which, for `when_answered`."""
        with self._guard.lock:
            for name in physical:
                self._asked[name].wanted += 1
            return {name: self._asked[name].wanted for name in physical}

    def when_answered(self, wanted: Mapping[str, int], tell: Tell) -> None:
        """Call a function as soon as questions have been answered, or given up; perhaps now."""
        with self._guard.lock:
            if not self._is_answered(wanted):
                self._waiting.append((wanted, tell))
                return
        tell()

    def when_open(self, logical_shards: Collection[int], tell: Tell, *, writes: bool) -> None:
        """Call a function, once, as soon as logical shards can all be used; perhaps now."""
        with self._guard.lock:
            if closed(self.map, logical_shards, writes=writes):
                self._openings[tell] = (logical_shards, writes)
                return
        tell()

    def forget(self, tell: Tell) -> None:
        """Call a function of `when_answered` or `when_open` no more."""
        with self._guard.lock:
            self._openings.pop(tell, None)
            self._waiting = [pair for pair in self._waiting if pair[1] is not tell]

    def awaited(self) -> set[str]:
        """Return the physical shards that somebody waits for to open a logical shard."""
        if not self._openings:
            return set()
        with self._guard.lock:
            return {
                self.map.owners[number]
                for shards, writes in self._openings.values()
                for number in closed(self.map, shards, writes=writes)
            }

    # -- who asks

    def asking(self, physical: str) -> int:
        """Return the number of the question that is about to be asked."""
        return self._asked[physical].wanted

    def believed(self, physical: str) -> Answer | None:
        """Return what is believed of a physical shard, None before its primary has answered."""
        return self._answers.get(physical)

    def told(self, physical: str, question: int, at: float, answer: Answer) -> bool:
        """Take what a primary has said.

        Args:
            physical: name of the physical shard.
            question: from `asking`.
            at: monotonic time at which it was asked.
            answer: what it said.

        Returns:
            Whether it is believed: another server may have become the primary.
        """
        with self._guard.lock:
            believed = accepted(self._answers.get(physical), answer)
            if believed is None:
                return False
            if believed != self._answers.get(physical):
                self._answers[physical] = believed
                found = merged(self._first, self._answers, self.map, self._physical)
                self.arriving = arriving(self._answers, found)
                if found != self.map:
                    self._on_change(found)
                    self.map = found
                    self._open()
            self.heard_at[physical] = at
            self._heard(physical, question, at + self.max_age)
            return True

    def silent(self, physical: str, question: int) -> None:
        """Note that a primary did not answer: what it said last goes on counting."""
        with self._guard.lock:
            self._heard(physical, question, self._clock.monotonic() + _SOON)

    def _heard(self, physical: str, question: int, until: float) -> None:
        asked = self._asked[physical]
        if question >= asked.trusted_from:
            self.expires[physical] = max(self.expires[physical], until)
        self.good_until = -math.inf if self.map.held else min(self.expires.values())
        asked.answered = max(asked.answered, question)
        ready = [pair for pair in self._waiting if self._is_answered(pair[0])]
        for pair in ready:
            self._waiting.remove(pair)
            pair[1]()

    def _open(self) -> None:
        """Tell those whose logical shards can be used now."""
        for tell, (shards, writes) in tuple(self._openings.items()):
            if not closed(self.map, shards, writes=writes):
                del self._openings[tell]
                tell()

    def _is_answered(self, wanted: Mapping[str, int]) -> bool:
        return all(self._asked[name].answered >= number for name, number in wanted.items())

    def _forget(self) -> None:
        """Run in a forked child: who asks is in the parent."""
        self._waiting, self._openings = [], {}
        self.expires = dict.fromkeys(self.expires, -math.inf)
        self.good_until = -math.inf
