"""Which server a reader asks: the replicas of one physical shard and what is known of them.

Pure: told of failures and of the time, never opens a connection. A replica that failed is left
alone for a while, then tried again by whoever comes next; with none left the primary answers.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Collection, Iterable

from shardkit.clock import SYSTEM, Clock
from shardkit.topology import Endpoint, PhysicalShard

__all__ = ["ReplicaSet", "physical_of_token", "token_of"]

_FORMAT = "0"
"""First part of a token. Version 0 names the physical shards whose primary must answer."""

_LONGEST = 4096
"""Characters of the longest token that is looked at."""


class ReplicaSet:
    """The replicas of one physical shard. Thread-safe.

    Args:
        shard: the physical shard.
        pause: seconds a replica is left alone after a failure.
        clock: source of monotonic time.
    """

    def __init__(self, shard: PhysicalShard, *, pause: float = 1.0, clock: Clock = SYSTEM) -> None:
        self.primary = shard.primary
        self.replicas = shard.replicas
        self._pause = pause
        self._clock = clock
        self._lock = threading.Lock()
        self._down_until: dict[Endpoint, float] = {}

    def choose(self, *, excluding: Collection[Endpoint] = ()) -> Endpoint:
        """Return a replica thought to be up, at random, or the primary when none is.

        Args:
            excluding: endpoints that this caller already tried in vain.
        """
        candidates = [e for e in self.replicas if e not in excluding and not self.is_down(e)]
        if not candidates:
            return self.primary
        return random.choice(candidates)  # noqa: S311 - spreads load, guards nothing

    def is_down(self, endpoint: Endpoint) -> bool:
        """Tell whether an endpoint failed less than the pause ago."""
        return self._down_until.get(endpoint, 0.0) > self._clock.monotonic()

    def failed(self, endpoint: Endpoint) -> None:
        """Note that an endpoint did not answer."""
        with self._lock:
            self._down_until[endpoint] = self._clock.monotonic() + self._pause

    def answered(self, endpoint: Endpoint) -> None:
        """Note that an endpoint accepted a connection."""
        if endpoint in self._down_until:
            with self._lock:
                self._down_until.pop(endpoint, None)


def token_of(written: Iterable[str]) -> str:
    """Return the token of a commit, given the names of the physical shards it wrote to."""
    return ":".join((_FORMAT, *sorted(written)))


def physical_of_token(token: str, everything: frozenset[str]) -> frozenset[str]:
    """Return the names of the physical shards whose primary a reader must ask.

    A token that cannot be read asks for everything: a reader may be slower, never staler.
    """
    version, *written = token.split(":") if len(token) <= _LONGEST else ("",)
    known = version == _FORMAT and everything.issuperset(written)
    return frozenset(written) if known else everything
