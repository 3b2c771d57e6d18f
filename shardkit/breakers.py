"""The breakers of one physical shard, and which of them may open.

A breaker leaves a server alone; this sees to it that enough servers are left. It also tells the
listeners of a cluster when a breaker changes. Holds values only, as the breaker does.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pybreaker import CircuitBreakerListener

from shardkit.breaker import Breaker, OpenState
from shardkit.clock import SYSTEM, Clock
from shardkit.events import BreakerChanged, Listeners
from shardkit.forks import ForkSafeLock
from shardkit.topology import Endpoint, PhysicalShard, Role
from shardkit.windows import BreakerRules, Cause

__all__ = ["Breakers", "may_eject"]


def may_eject(role: Role, cause: Cause, *, n_replicas: int, n_ejected: int) -> bool:
    """Tell whether one more server of a physical shard may be left alone.

    At most half of the replicas are, whatever they do: when more of them look ill it is more
    likely the network or the load, and the rest would fall to the load of all. The primary is
    the only one; while it answers at all, it is not given up for being slow. When it fails, its
    calls fail fast instead of slowly, and nothing is lost by it.

    Args:
        role: of the server.
        cause: why its breaker would open.
        n_replicas: how many replicas the physical shard has.
        n_ejected: how many of them are left alone already. A single replica may be: the primary
            answers its reads.

    Source: Envoy, outlier detection, max_ejection_percent, of which one host is always allowed.
    """
    if role is Role.PRIMARY:
        return cause is not Cause.SLOW
    return n_ejected < max(1, n_replicas // 2)


class Breakers(Mapping[Endpoint, Breaker]):
    """The breaker of each endpoint of a physical shard.

    Args:
        shard: the physical shard.
        rules: when they trip.
        listeners: told `BreakerChanged`.
        clock: source of time.
        uniform: draws the jitter; see `Breaker`.

    *Invariant:* by the rules alone never more than half of the replicas are not closed, or one.
    """

    def __init__(
        self,
        shard: PhysicalShard,
        *,
        rules: BreakerRules | None = None,
        listeners: Listeners | None = None,
        clock: Clock = SYSTEM,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        lock = ForkSafeLock()  # one for all, so that two replicas do not open at the same time
        self._n_replicas = len(shard.replicas)
        self._breakers = {
            endpoint: Breaker(
                str(endpoint),
                rules=rules,
                may_trip=self._rule_for(endpoint),
                lock=lock,
                clock=clock,
                uniform=uniform,
                listeners=() if listeners is None else (_Announcer(endpoint, listeners),),
            )
            for endpoint in shard.endpoints
        }

    def __getitem__(self, endpoint: Endpoint) -> Breaker:
        return self._breakers[endpoint]

    def __iter__(self) -> Iterator[Endpoint]:
        return iter(self._breakers)

    def __len__(self) -> int:
        return len(self._breakers)

    def _rule_for(self, endpoint: Endpoint) -> Callable[[Cause], bool]:
        def may_trip(cause: Cause) -> bool:  # called with the lock held
            ejected = sum(
                not breaker.is_closed
                for other, breaker in self._breakers.items()
                if other.role is Role.REPLICA and other != endpoint
            )
            return may_eject(endpoint.role, cause, n_replicas=self._n_replicas, n_ejected=ejected)

        return may_trip


class _Announcer(CircuitBreakerListener):
    """Turns pybreaker's callback into an event."""

    def __init__(self, endpoint: Endpoint, listeners: Listeners) -> None:
        self._endpoint = endpoint
        self._listeners = listeners

    def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
        if self._listeners:
            endpoint = self._endpoint
            self._listeners.emit(
                BreakerChanged(
                    endpoint.physical,
                    endpoint.role.value,
                    str(endpoint),
                    old_state.name,
                    new_state.name,
                    str(new_state.cause) if isinstance(new_state, OpenState) else None,
                    new_state.seconds if isinstance(new_state, OpenState) else None,
                )
            )
