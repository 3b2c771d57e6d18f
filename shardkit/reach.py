"""The part of a writer that knows where its transaction has written, and may.

`shardkit.emitter` builds on it. From what was written, and where in the servers' logs it ended,
comes the token of a commit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from shardkit import fences
from shardkit.agreement import Agreement
from shardkit.claims import Claims
from shardkit.connections import AsyncConnections, Connections
from shardkit.errors import CrossShardWriteError, UnavailableError
from shardkit.freshness import driver_of
from shardkit.gates import Position
from shardkit.session import ReadSession
from shardkit.tokens import Token, joined, mint
from shardkit.topology import ShardMap

__all__ = ["ReachingSession"]


class ReachingSession(ReadSession):
    """What `WriteSession` is, as far as the servers are concerned that it writes to."""

    def __init__(
        self, connections: Connections | AsyncConnections, *, atomic: bool = False, **options: Any
    ) -> None:
        super().__init__(connections, **options)
        self._atomic = atomic
        self._written: set[str] = set()
        self._written_shards: set[int] = set()
        self._token = Token()
        self._map: ShardMap | None = None
        self._claims = Claims(self, connections, self._physical_of, self._connection_to)
        self._agreement = Agreement(connections, self._written_roots, self._number)

    @property
    def token(self) -> str:
        """After a commit, what a later reader must have seen; an empty string before."""
        return self._token.text if self._token.marks or not self._token.is_readable else ""

    # -- who owns what

    def _physical_of(self, logical_shard: int) -> str:
        """Return the owner of a logical shard by the map that the transaction began with.

        One transaction, one map: else it could write to two physical shards without knowing.
        """
        shard_map = self._map
        if shard_map is None:
            self._cluster.physical_of(logical_shard)  # refuses what is no logical shard
            shard_map = self._map = super()._map_of((logical_shard,))
        return shard_map.owner(logical_shard)

    def _map_of(self, logical_shards: Sequence[int]) -> ShardMap:
        if self._map is None:
            self._map = super()._map_of(logical_shards)
        return self._map

    def _group(self, logical_shards: Sequence[int]) -> Mapping[str, tuple[int, ...]]:
        if self._map_of(logical_shards) is self._cluster.topology.shard_map:
            return self._cluster.grouped(logical_shards)
        groups: dict[str, list[int]] = {}
        for shard in logical_shards:
            groups.setdefault(self._physical_of(shard), []).append(shard)
        return {physical: tuple(shards) for physical, shards in groups.items()}

    def _admit(self, shards: set[int]) -> None:
        """Wait until logical shards can be written to; the transaction then keeps to their owners.

        Raises:
            ShardFencedError: one is being moved, and the deadline is over, or this transaction
                holds locks already, with which nobody waits (retryable).
            ShardMovedError: one has moved since the transaction began (retryable).
        """
        cluster, begun, found = self._cluster, self._map, self._cluster.topology.shard_map
        if cluster.clock.monotonic() < cluster.held.good_until:
            if begun is None or not self._roots:
                self._map = begun = found
            if begun is found:
                return
        closed = cluster.topology.shard_map.held.keys() & shards
        if self._written and closed:
            raise fences.still_closed(min(closed), cluster.topology.shard_map)
        found = cluster.owners.opened(shards, writes=True)
        if not self._roots or begun is None:
            self._map = found
            return
        for shard in shards:
            if found.owners[shard] != begun.owners[shard]:
                raise fences.moved(shard, found.owners[shard])

    # -- what is written

    def _note_written(
        self, shards: Iterable[int], described: Callable[[], dict[str, list[str]]] = dict
    ) -> None:
        noted = set(shards)
        self._admit(noted)
        self._note_reached(noted, described)

    def _note_reached(
        self, noted: set[int], described: Callable[[], dict[str, list[str]]] = dict
    ) -> None:
        self._written = self._allowed(noted, described)
        self._written_shards |= noted
        for physical in self._written:
            if physical in self._roots:  # COMMIT asks for its position
                driver_of(self._roots[physical][1]).mints = True

    def _note_everywhere(self) -> None:
        """Note that every server is written to: a token is for every reader of it."""
        self._note_reached(set(range(self._cluster.router.total)))
        self._written |= set(self._cluster.physical)

    def _written_roots(self) -> dict[str, Connection]:
        """Return the connections to the physical shards that were written to.

        A unit of work without net changes has opened none.
        """
        return {name: self._roots[name][1] for name in self._written if name in self._roots}

    def _prepares(self) -> bool:
        """Tell whether the transaction will be prepared: it has written to several servers."""
        return len(self._written) > 1

    def _allowed(
        self, shards: Iterable[int], described: Callable[[], dict[str, list[str]]] = dict
    ) -> set[str]:
        """Return the physical shards written to, with those of `shards`.

        Raises:
            CrossShardWriteError: they are several, and the session is not atomic.
        """
        together = {self._physical_of(shard) for shard in shards} | self._written
        if len(together) > 1 and not self._atomic:
            names = described()
            what = "; ".join(
                f"{physical} ({_shortened(names[physical])})" if physical in names else physical
                for physical in sorted(together)
            )
            raise CrossShardWriteError(
                f"the unit of work would write to {what}",
                hint="keep rows that change together under one shard key, or use "
                "cluster.writer(atomic=True), or session.emit() an event for what may follow later",
            )
        return together

    def _minted(self) -> Token:
        """Return the token of what was just committed."""
        shards_seen = sorted(self._written_shards | self._claims.shards)
        epochs = self._map_of(shards_seen).epochs
        tokens: list[Token] = []
        for physical, shards in self._group(shards_seen).items():
            found = self._position(physical)
            if found is None:
                return Token(is_readable=False)
            system, position = found
            marks = {n: epochs[n] for n in shards}
            tokens.append(mint(system, position.timeline, position.lsn, marks))
        return tokens[0] if len(tokens) == 1 else joined(tokens)

    def _position(self, physical: str) -> tuple[int, Position] | None:
        """Return the server and the end of its log, which what was committed lies before."""
        if physical in self._written:
            root = self._roots.get(physical)
            driver = None if root is None or root[1].invalidated else driver_of(root[1])
            if driver is not None and driver.committed is not None and driver.system:
                return driver.system, driver.committed
            if not self._agreement.is_needed or physical in self._agreement.pending:
                return None
        try:
            return self._cluster.written(physical)
        except (UnavailableError, DBAPIError):
            return None


def _shortened(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if names[most:] else "")
