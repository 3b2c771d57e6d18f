"""Placement policies: where a row goes that nothing places yet.

Asked for rows placed by an id of their own and for new keys of a directory; everything else lies
where its shard key says. A policy is a small value; a cluster binds it to its topology and to a
way of measuring load. Pure: the measuring is the cluster's.
"""

from __future__ import annotations

import math
import random
import threading
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from heapq import heapify, heapreplace
from itertools import accumulate
from typing import Final, Protocol, runtime_checkable

from shardkit.clock import SYSTEM, Clock
from shardkit.errors import ConfigurationError
from shardkit.keys import shown
from shardkit.topology import Topology

__all__ = [
    "LeastLoaded",
    "Loads",
    "Pinned",
    "Placement",
    "Policy",
    "Weighted",
    "anywhere",
    "bound",
]

Placement = Callable[[int], int]
"""Chooses the logical shard, below its argument, of a row that nothing places yet."""

Loads = Callable[[], Mapping[int, float]]
"""Measures the load of logical shards; those it leaves out cannot be measured now."""


@runtime_checkable
class Policy(Protocol):
    """A policy that needs to know the cluster."""

    def bind(self, topology: Topology, loads: Loads, clock: Clock) -> Placement:
        """Return the placement of one cluster.

        Args:
            topology: the cluster.
            loads: measures rows by logical shard.
            clock: where the time comes from.

        Raises:
            ConfigurationError: the policy names what the cluster does not have.
        """


def anywhere(n_logical_shards: int) -> int:
    """Place at random: even on average, and no process needs to know what others chose."""
    return random.randrange(n_logical_shards)  # noqa: S311 - spreads load, guards nothing


def bound(
    placement: Placement | Policy, topology: Topology, loads: Loads, *, clock: Clock = SYSTEM
) -> Placement:
    """Return the placement of one cluster, whichever way it was given.

    Raises:
        ConfigurationError: it is neither, or names what the cluster does not have.
    """
    if isinstance(placement, type) or not isinstance(placement, Policy | Callable):
        raise ConfigurationError(
            f"placement {shown(placement)} is no placement",
            hint="give anywhere, Pinned(…), Weighted(…), LeastLoaded() or a function",
        )
    if isinstance(placement, Policy):
        return placement.bind(topology, loads, clock)
    return _Checked(placement)


@dataclass(frozen=True, slots=True)
class Pinned:
    """Everything new goes to one place: for tests, imports, and tenants with a server of their own.

    Args:
        place: number of a logical shard, or name of a physical shard.
    """

    place: int | str

    def bind(self, topology: Topology, loads: Loads, clock: Clock) -> Placement:
        """Return the placement of one cluster; see `Policy`."""
        return Weighted({self.place: 1.0}).bind(topology, loads, clock)


class Weighted:
    """New rows go to places in proportion to their weights.

    Args:
        weights: by number of a logical shard, or by name of a physical shard, which its logical
            shards share evenly. What is not named gets nothing new.

    Raises:
        ConfigurationError: a weight is no number from 0 up, or all are 0.

    Example:
        >>> cluster = Cluster(topology, placement=Weighted({"old": 1, "new": 3}))  # doctest: +SKIP
    """

    def __init__(self, weights: Mapping[int | str, float]) -> None:
        for place, weight in weights.items():
            if type(weight) not in {int, float} or not (math.isfinite(weight) and weight >= 0):
                raise ConfigurationError(
                    f"placement: weight {shown(weight)} of {shown(place)} is no weight",
                    hint="give numbers from 0 up",
                )
        if not any(weights.values()):
            raise ConfigurationError("placement: no place has a weight above 0")
        self.weights: Final = dict(weights)

    def bind(self, topology: Topology, loads: Loads, clock: Clock) -> Placement:
        """Return the placement of one cluster; see `Policy`."""
        del loads, clock
        weights = [0.0] * topology.n_logical_shards
        for place, weight in self.weights.items():
            shards = _shards_of(place, topology)
            for shard in shards:
                weights[shard] += weight / len(shards)
        steps = list(accumulate(weights))
        # Rounding must not lead past the last place that has a weight.
        last = max(shard for shard, weight in enumerate(weights) if weight)

        def choose(_: int) -> int:
            point = random.random() * steps[-1]  # noqa: S311 - spreads load, guards nothing
            return min(bisect_right(steps, point), last)

        return choose


class LeastLoaded:
    """New rows go to the logical shard with the fewest rows.

    Loads are measured at most every `max_age` seconds, by the row that finds them too old; what
    this process places meanwhile is counted on top, and equals are taken at random. A measurement
    that fails keeps the last one. Before the first one, rows go anywhere.

    Args:
        max_age: seconds a measurement is used, above 0.

    Raises:
        ConfigurationError: max_age is not above 0.
    """

    def __init__(self, *, max_age: float = 60.0) -> None:
        if type(max_age) not in {int, float} or not (math.isfinite(max_age) and max_age > 0):
            raise ConfigurationError(
                f"placement: max_age={shown(max_age)}", hint="give seconds above 0"
            )
        self.max_age: Final = max_age

    def bind(self, topology: Topology, loads: Loads, clock: Clock) -> Placement:
        """Return the placement of one cluster; see `Policy`."""
        del topology
        return _LeastLoaded(loads, self.max_age, clock)


class _LeastLoaded:
    """`LeastLoaded` with the loads of one cluster."""

    def __init__(self, loads: Loads, max_age: float, clock: Clock) -> None:
        self._loads = loads
        self._max_age = max_age
        self._clock = clock
        self._lock = threading.Lock()
        self._heap: list[tuple[float, float, int]] = []  # load, tie-breaker, logical shard
        self._due = -math.inf

    def __call__(self, n_logical_shards: int) -> int:
        with self._lock:
            now = self._clock.monotonic()
            due = now >= self._due
            if due:
                self._due = now + self._max_age  # others go on with what there is
        if due and (measured := self._loads()):
            heap = [(load, random.random(), shard) for shard, load in measured.items()]  # noqa: S311
            heapify(heap)
            with self._lock:
                self._heap = heap
        with self._lock:
            if not self._heap:
                return anywhere(n_logical_shards)
            load, _, shard = self._heap[0]
            heapreplace(self._heap, (load + 1, random.random(), shard))  # noqa: S311
            return shard


class _Checked:
    """A function of the user's, whose answers are looked at."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement

    def __call__(self, n_logical_shards: int) -> int:
        shard = self._placement(n_logical_shards)
        if type(shard) is not int or not 0 <= shard < n_logical_shards:
            raise ConfigurationError(
                f"the placement function returned {shown(shard)}",
                hint=f"return a logical shard, 0 to {n_logical_shards - 1}",
            )
        return shard


def _shards_of(place: int | str, topology: Topology) -> tuple[int, ...]:
    """Return the logical shards of a place that a policy names."""
    if isinstance(place, str):
        if place not in topology.physical:
            raise ConfigurationError(
                f"placement: there is no physical shard {shown(place)}",
                hint=f"one of: {', '.join(topology.physical)}",
            )
        shards = topology.shard_map.owned_by(place)
        if not shards:
            raise ConfigurationError(f"placement: {place} holds no logical shard")
        return shards
    if type(place) is not int or not 0 <= place < topology.n_logical_shards:
        raise ConfigurationError(
            f"placement: there is no logical shard {shown(place)}",
            hint=f"numbers from 0 to {topology.n_logical_shards - 1}",
        )
    return (place,)
