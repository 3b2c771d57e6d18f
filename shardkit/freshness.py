"""What one reader must see, and what it has seen: its token and bound, for each physical shard.

A session asks here which replicas are worth trying and what the connection it got must be asked
(`shardkit.gates`); afterwards, what a later reader must have seen. Opens no connection.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from shardkit.gates import Gate, Gated, Position
from shardkit.replicas import ReplicaSet
from shardkit.tokens import ASK_PRIMARIES, ONLY_PRIMARY, Mark, Need, Token, both, joined, parse
from shardkit.topology import Endpoint, Role, ShardMap, Topology

__all__ = ["Freshness", "Knowledge", "driver_of"]

_PRIMARY: Final = Position(0, 0)
"""Reached by no replica."""


@dataclass(frozen=True)
class Knowledge:
    """What a cluster knows that decides about replicas.

    Attributes:
        replica_sets: by name of the physical shard.
        shards: the logical shards of each.
        lowest: the lowest epoch of those.
        highest: the highest.
        patience: milliseconds a replica may wait for what it has not replayed yet.
    """

    replica_sets: Mapping[str, ReplicaSet]
    patience: int
    shards: dict[str, frozenset[int]] = field(default_factory=dict)
    lowest: dict[str, int] = field(default_factory=dict)
    highest: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls, topology: Topology, replica_sets: Mapping[str, ReplicaSet], patience: float
    ) -> Knowledge:
        """Return what a topology says; patience is in seconds."""
        found = cls(replica_sets, round(patience * 1000))
        for name in topology.physical:
            shards = topology.shard_map.owned_by(name)
            epochs = [topology.shard_map.epochs[n] for n in shards] or [1]
            found.shards[name] = frozenset(shards)
            found.lowest[name], found.highest[name] = min(epochs), max(epochs)
        return found

    @property
    def systems(self) -> frozenset[int]:
        """The system identifiers met so far."""
        return frozenset(s.system for s in self.replica_sets.values() if s.system is not None)


class _Knows(Protocol):
    @property
    def knowledge(self) -> Knowledge: ...


class Freshness:
    """What one session must see and has seen.

    Args:
        source: where its cluster keeps what it knows.
        after: the token it was given, or None.
        max_lag: seconds of delay that are acceptable, or None for any.

    Attributes:
        is_asked: whether replicas are asked anything at all.
    """

    def __init__(self, source: _Knows, after: str | None, max_lag: float | None) -> None:
        self._source = source
        self._token = None if after is None else parse(after)
        self._max_lag = max_lag
        self._left: set[str] = set()
        self._gates: dict[str, tuple[int, Gate]] = {}
        self._marks: list[Mark] = []
        self._has_lost_track = False
        self.is_asked = after is not None or max_lag is not None

    @property
    def _knowledge(self) -> Knowledge:
        return self._source.knowledge

    @property
    def token(self) -> str:
        """What a later reader must have seen; an empty string where nothing was kept track of."""
        if self._token is None:
            return ""
        if self._has_lost_track or any(gate.has_lost_track for _, gate in self._gates.values()):
            return ASK_PRIMARIES
        marks = [*self._marks, *(m for name in self._gates if (m := self._mark(name)))]
        return joined([self._token, *(Token((mark,)) for mark in marks)]).text

    def is_ahead_of(self, shard_map: ShardMap) -> bool:
        """Tell whether the token is of a time after a move that a shard map does not know of."""
        if self._token is None:
            return False
        epochs = shard_map.epochs
        return any(
            mark.epoch > epochs[n]
            for mark in self._token.marks
            for n in mark.shards or ()
            if n < len(epochs)
        )

    @property
    def asks_primaries(self) -> bool:
        """Whether only primaries may answer."""
        return self._token is not None and not self._token.is_readable

    def leave(self, physical: str) -> None:
        """Read a physical shard from its primary from now on."""
        self._left.add(physical)

    def need(self, physical: str) -> Need | None:
        """Return what a replica must have replayed, None for nothing."""
        if physical in self._left:
            return ONLY_PRIMARY
        knowledge, found = self._knowledge, None
        replicas = knowledge.replica_sets[physical]
        if self._max_lag is not None:
            found = replicas.need_of_lag(self._max_lag)
        if self._token is not None and not self._token.is_readable:
            return ONLY_PRIMARY
        if self._token is not None and self._token.marks and replicas.system is not None:
            found = both(
                found,
                self._token.need(
                    replicas.system,
                    knowledge.shards[physical],
                    epoch=knowledge.highest[physical],
                    systems=knowledge.systems,
                ),
            )
        return found

    def gate(self, endpoint: Endpoint, driver: Gated) -> Gate | None:
        """Return what a connection is asked, or None when its server may not answer at all."""
        gate = self.second_gate(endpoint, driver)
        if gate is not None:
            self.keep_gate(endpoint.physical, driver.system, gate)
        return gate

    def keep_gate(self, physical: str, system: int, gate: Gate) -> None:
        """Note whose answers count for a physical shard."""
        self._gates[physical] = (system, gate)

    def second_gate(self, endpoint: Endpoint, driver: Gated) -> Gate | None:
        """Return what a connection is asked whose answers may not count in the end; see `gate`."""
        physical = endpoint.physical
        is_replica = endpoint.role is Role.REPLICA
        replicas = self._knowledge.replica_sets[physical]
        first = self._position(physical, driver.system) if is_replica else None
        if first is _PRIMARY:
            return None

        def needed() -> Position | None:
            if not is_replica or self._max_lag is None:
                return first
            return self._position(physical, driver.system)  # the bound moves with the time

        return Gate(
            needed,
            is_replica=is_replica,
            is_silent=lambda: replicas.is_silent(endpoint),
            patience=self._knowledge.patience,
            keeps_track=self._token is not None,
            asks=self.is_asked,
        )

    def refused(self) -> list[str]:
        """Return the physical shards whose replica could not answer."""
        return [name for name, (_, gate) in self._gates.items() if gate.has_refused]

    def let_go(self, physical: str) -> None:
        """Note that the connection to a physical shard is given back."""
        if physical in self._gates:
            mark = self._mark(physical)
            if mark is not None:
                self._marks.append(mark)
            self._has_lost_track |= self._gates.pop(physical)[1].has_lost_track

    def _position(self, physical: str, system: int) -> Position | None:
        need = self.need(physical)
        if need is None:
            return None
        if need.timeline == 0 or need.system != system:
            return _PRIMARY
        return Position(need.timeline, need.lsn)

    def _mark(self, physical: str) -> Mark | None:
        system, gate = self._gates[physical]
        if gate.seen is None:
            return None
        epoch = self._knowledge.lowest[physical]
        return Mark(system, gate.seen.timeline, epoch, gate.seen.lsn)


def driver_of(connection: Any) -> Gated:
    """Return the driver's connection below one of SQLAlchemy's."""
    driver: Gated = connection.connection.driver_connection
    return driver
