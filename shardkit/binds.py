"""How a session holds its connections: one per physical shard, seen as each logical shard.

A logical shard is a view of its server's connection in which unqualified tables are those of its
schema. A reader's connection that breaks is replaced by one to another endpoint. The base of
`shardkit.session`, which decides what runs where.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar, NoReturn, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Mapper, Session

from shardkit import deadlines
from shardkit.checks import connection_error, late_error
from shardkit.connections import AsyncConnections, Connections, Purpose
from shardkit.errors import (
    BreakerOpenError,
    EndpointUnavailableError,
    NoShardKeyError,
    OverloadedError,
    PoolTimeoutError,
    ShardFencedError,
    ShardMovedError,
    UnavailableError,
)
from shardkit.events import ReplicaPassedOver
from shardkit.freshness import Freshness, driver_of
from shardkit.races import Race
from shardkit.streams import Streams
from shardkit.topology import Endpoint, Role, ShardMap

__all__ = ["BoundSession"]

T = TypeVar("T")

_NUMBERS = itertools.count(1)

_SHARE = 0.5
"""Of the time left, for the connection to a replica, so that another server can be asked."""


class BoundSession(Session):
    """A session bound to the servers of a cluster.

    *Invariant:* at most one connection per physical shard.
    """

    role: ClassVar[Role] = Role.REPLICA
    purpose: ClassVar[Purpose] = Purpose.READ

    def __init__(
        self,
        connections: Connections | AsyncConnections,
        *,
        after: str | None = None,
        max_lag: float | None = None,
        **options: Any,
    ) -> None:
        options.setdefault("expire_on_commit", False)
        super().__init__(**options)
        self._cluster = connections
        self._number = next(_NUMBERS)
        self._fresh = Freshness(connections, after, max_lag)
        self._after = after or ""
        # Whether somebody whose token this one has knows of moves that this process does not.
        self._is_behind = after is not None and self._fresh.is_ahead_of(
            connections.topology.shard_map
        )
        self._roots: dict[str, tuple[Endpoint, Connection]] = {}
        self._shard_views: dict[Engine, tuple[Connection, Connection]] = {}
        self._streams = Streams()
        # What failed the running statement; None for what cannot be told.
        self._avoided: frozenset[Endpoint | None] = frozenset()

    def __init_subclass__(cls, **options: Any) -> None:
        """Have SQLAlchemy collect the listeners of the class now.

        It does so for the first object of a class and without a lock: a thread that makes the
        second one meanwhile would run statements that nobody routes.
        """
        super().__init_subclass__(**options)
        _ = cls.__new__(cls).dispatch

    def close(self) -> None:
        """Return the connections to their pools; the session can be used again."""
        super().close()
        self._release()

    def endpoint_of(self, physical: str) -> Endpoint | None:
        """Return the server that this session reads a physical shard from.

        Args:
            physical: name of the physical shard.

        Returns:
            None as long as the session has no connection to it.
        """
        held = self._roots.get(physical)
        return None if held is None else held[0]

    # -- who owns what

    def _physical_of(self, logical_shard: int) -> str:
        """Return the owner of a logical shard that is about to be used."""
        cluster = self._cluster
        physical = cluster.physical_of(logical_shard)
        if self._is_behind or cluster.clock.monotonic() >= cluster.held.good_until:
            return self._map_of((logical_shard,)).owners[logical_shard]
        return physical

    def _map_of(self, logical_shards: Sequence[int]) -> ShardMap:
        """Return the shard map by which logical shards are about to be used."""
        cluster = self._cluster
        if self._is_behind:
            self._is_behind = self._fresh.is_ahead_of(cluster.owners.ask())
        return cluster.owners.opened(logical_shards, writes=False)

    def _group(self, logical_shards: Sequence[int]) -> Mapping[str, tuple[int, ...]]:
        """Return logical shards that are about to be used by physical shard."""
        self._map_of(logical_shards)
        return self._cluster.grouped(logical_shards)

    def _has_moved(
        self,
        failures: Mapping[str, Exception],
        groups: Mapping[str, Sequence[int]],
        shards: Sequence[int],
    ) -> bool:
        """Tell whether logical shards were asked for where they are no more, and may be again."""
        fenced = [name for name, e in failures.items() if isinstance(e, ShardFencedError)]
        if not fenced or not self._can_retry():
            return False
        for name in fenced:
            self._cluster.owners.distrust(name)
        return self._group(shards) != groups

    # -- connections

    def get_bind(self, mapper: Any = None, *, logical_shard: int | None = None, **_: Any) -> Engine:
        """Return the engine of a logical shard; called by SQLAlchemy."""
        if logical_shard is None:
            raise NoShardKeyError(
                "the operation names no logical shard",
                hint="use objects of sharded classes, or select() with a shard key",
            )
        physical = self._physical_of(logical_shard)
        endpoint = (self._roots.get(physical) or self._open(physical, logical_shard))[0]
        if isinstance(mapper, Mapper):
            self._cluster.fingerprints.check(mapper)
        return self._cluster.view(endpoint, self.purpose, logical_shard)

    def _connection_to(self, logical_shard: int) -> Connection:
        """Return this session's connection to a logical shard, opening it on first use."""
        physical = self._physical_of(logical_shard)
        if physical not in self._roots:
            return self._open(physical, logical_shard)[1]
        return self._connection_for_bind(self.get_bind(logical_shard=logical_shard))

    def _scattering(self, physical: str) -> Connection:
        """Return this session's connection to a physical shard, for statements over schemas."""
        if physical not in self._roots:
            return self._open(physical, None)[1]
        endpoint, _ = self._roots[physical]
        return self._connection_for_bind(self._cluster.view(endpoint, self.purpose, None))

    def _open(self, physical: str, logical_shard: int | None) -> tuple[Endpoint, Connection]:
        """Open this session's connection to a physical shard.

        Args:
            physical: name of the physical shard.
            logical_shard: the logical shard it shows first, or None for many at once.
        """
        cluster, fresh = self._cluster, self._fresh
        replicas = cluster.replica_sets[physical]
        tried = {endpoint for endpoint in self._avoided if endpoint is not None}
        if fresh.is_asked and replicas.replicas:
            cluster.probes.start()
        while True:
            endpoint = replicas.choose(fresh.need(physical), excluding=tried)
            engine = cluster.view(endpoint, self.purpose, logical_shard)
            is_last = endpoint.role is Role.PRIMARY
            try:
                with nullcontext() if is_last else deadlines.share(_SHARE):
                    connection = cluster.connect(engine, endpoint)
            except UnavailableError as error:
                may_go_on = self._may_go_on(endpoint, error)
                if is_last or deadlines.is_over() or not may_go_on:
                    raise
                tried.add(endpoint)
                continue
            replicas.answered(endpoint)
            driver = driver_of(connection)
            # Always set: a session that was never closed may have left its own.
            driver.gate = fresh.gate(endpoint, driver)
            if driver.gate is None:
                connection.close()
                fresh.leave(physical)
                continue
            hedges = cluster.hedges.get(physical)
            driver.race = None
            if hedges is not None and endpoint.role is Role.REPLICA:
                driver.race = Race(self, physical, hedges)
            self._roots[physical] = (endpoint, connection)
            return endpoint, connection

    def _connection_for_bind(self, engine: Any, *_: Any, **__: Any) -> Connection:
        """Return the view of this session's connection that shows one logical shard."""
        root = self._root_of(engine)
        if root.engine is engine:
            return root
        cached = self._shard_views.get(engine)
        if cached is not None and cached[0] is root:
            return cached[1]
        shown = _View(engine, root)
        self._shard_views[engine] = (root, shown)
        return shown

    def _root_of(self, engine: Engine) -> Connection:
        for _, root in self._roots.values():
            if engine.pool is root.engine.pool:
                return root
        raise NoShardKeyError("not an engine of this session")

    def _release(self) -> None:
        self._streams.close()
        self._shard_views.clear()
        for physical in list(self._roots):
            self._let_go(physical)

    def _let_go(self, physical: str) -> Endpoint:
        """Give the connection to a physical shard back."""
        endpoint, connection = self._roots.pop(physical)
        self._fresh.let_go(physical)
        connection.close()
        return endpoint

    # -- races

    def _second(self, physical: str, waited: float) -> tuple[Endpoint, Connection] | None:
        """Open a connection to a second replica; None when there is none worth asking.

        Args:
            physical: name of the physical shard.
            waited: seconds for which the first one has not answered.
        """
        cluster, fresh = self._cluster, self._fresh
        replicas = cluster.replica_sets[physical]
        first = self._roots[physical][0]
        if (member := replicas.members.get(first)) is None:
            return None  # it is the primary by now
        member.overdue(waited)
        endpoint = replicas.choose(fresh.need(physical), excluding={first})
        if endpoint.role is Role.PRIMARY or not cluster.guards[endpoint].breaker.is_closed:
            return None
        connection = cluster.connect(cluster.view(endpoint, self.purpose, None), endpoint)
        driver = driver_of(connection)
        driver.race = None
        driver.gate = fresh.second_gate(endpoint, driver)
        if driver.gate is None:
            connection.close()
            return None
        return endpoint, connection

    def _won(self, physical: str, endpoint: Endpoint, connection: Connection) -> Connection:
        """Go on with a second replica, which was quicker; return the connection to the first."""
        _, slow = self._roots[physical]
        first, second = driver_of(slow), driver_of(connection)
        second.race, first.race, first.gate = first.race, None, None
        assert second.gate is not None, "it was opened with one"
        self._fresh.let_go(physical)
        self._fresh.keep_gate(physical, second.system, second.gate)
        self._roots[physical] = (endpoint, connection)
        return slow

    # -- failures

    def _execute_internal(self, statement: Any, *args: Any, **options: Any) -> Any:
        """Run a statement, and again on other endpoints.

        On another one when its connection broke, as far as the budget allows, and on the primary
        of each physical shard whose replica could not answer.
        """
        run = super()._execute_internal
        if options.get("_parent_execute_state") is not None:
            return run(statement, *args, **options)  # for the statement that it is a part of
        return self._elsewhere(partial(run, statement, *args, **options))

    def _elsewhere(self, work: Callable[[], T]) -> T:
        """Do what reads, and do it again on other endpoints; see `_execute_internal`."""
        before, has_moved = self._avoided, False
        try:
            while True:
                try:
                    return work()
                except ShardMovedError as error:
                    # It has said where to; a second time it is for the caller to try again.
                    if has_moved or not self._can_retry():
                        raise
                    has_moved = error.retryable
                except DBAPIError as error:
                    if self._leave_refusing():
                        continue
                    lost = error.connection_invalidated
                    if not lost or not self._can_retry() or deadlines.is_over():
                        self._raise(error)
                    broken = self._abandon_broken()
                    if not self._avoid(broken):
                        if not broken:
                            self._raise(error)
                        raise connection_error(error, broken[0]) from error
        finally:
            self._avoided = before

    def _avoid(self, broken: Sequence[Endpoint]) -> bool:
        """Have the running statement go elsewhere; tell whether it may be run once more.

        Behind a pooler connections look alive whose servers are gone, so several endpoints may
        break one after the other; each is asked once again at most, and pays from its budget.
        """
        failed = frozenset(broken) or {None}
        if not self._avoided.isdisjoint(failed) or not self._may_retry(broken):
            return False
        self._avoided |= failed
        return True

    def _leave_refusing(self) -> bool:
        """Leave the replicas that could not answer for their primaries; tell whether any did."""
        refused = self._fresh.refused()
        for physical in refused:
            self._fresh.leave(physical)
            is_lost = self._roots[physical][1].invalidated
            endpoint = self._let_go(physical)
            if is_lost:
                self._cluster.failed(endpoint, _lost(endpoint))
            if self._cluster.listeners:
                self._cluster.listeners.emit(
                    ReplicaPassedOver(self._number, physical, str(endpoint))
                )
        return bool(refused)

    def _can_retry(self) -> bool:
        """Tell whether a statement may run again by itself after its connection broke."""
        return True

    def _may_go_on(self, endpoint: Endpoint, error: UnavailableError) -> bool:
        """Note why a server gave no connection; tell whether another one may be asked."""
        is_own = isinstance(error, PoolTimeoutError) and not isinstance(error.__cause__, DBAPIError)
        if is_own or isinstance(error, BreakerOpenError | OverloadedError):
            return True  # the server was not even asked
        self._cluster.failed(endpoint, error)
        return endpoint.role is Role.REPLICA and self._may_retry([endpoint])

    def _may_retry(self, broken: Sequence[Endpoint]) -> bool:
        """Tell whether the budget of servers that failed allows one more attempt for all."""
        return not broken or self._cluster.guards[broken[0]].budget.spend()

    def _abandon_broken(self) -> list[Endpoint]:
        """Let go of connections that broke; return their servers."""
        broken = []
        for physical, (endpoint, connection) in list(self._roots.items()):
            views = [v for root, v in self._shard_views.values() if root is connection]
            if connection.invalidated or any(view.invalidated for view in views):
                self._cluster.failed(endpoint, _lost(endpoint))
                self._let_go(physical)
                broken.append(endpoint)
        return broken

    def _note_lost(self) -> None:
        """Have the connections know what their views lost: a transaction is not to be committed."""
        for _, root in self._roots.values():
            if not root.closed and not root.invalidated and not root.connection.is_valid:
                root.invalidate()

    def _leave_lost(self) -> None:
        """Let go of lost connections, so that the next statement of a reader opens others.

        Views of them do not know, and would fail in a way that says nothing about a server.
        """
        if self._can_retry():
            for physical, (_, root) in list(self._roots.items()):
                if root.invalidated:
                    self._let_go(physical)

    def _raise(self, error: DBAPIError) -> NoReturn:
        """Raise the shardkit error of a lost connection, or the error itself."""
        if not error.connection_invalidated or not self._roots:
            late = late_error(error)
            if late is None:
                raise error
            raise late from error
        self._note_lost()
        endpoints = [endpoint for endpoint, _ in self._roots.values()]
        broken = [e for e, root in self._roots.values() if root.invalidated or root.closed]
        endpoint = (broken or endpoints)[0]
        found = connection_error(error, endpoint)
        self._cluster.failed(endpoint, found)
        self._leave_lost()
        raise found from error


def _lost(endpoint: Endpoint) -> EndpointUnavailableError:
    return EndpointUnavailableError("connection lost", endpoint=str(endpoint))


class _View(Connection):
    """A connection as one logical shard sees it; it shares the transaction of the whole.

    *Invariant:* it neither begins a transaction nor ends one: SQLAlchemy rolls back after an
    error where it sees none, which would undo what other logical shards have written.
    """

    def __init__(self, engine: Engine, root: Connection) -> None:
        super().__init__(engine, connection=root.connection, _allow_autobegin=False)
        self._whole = root

    def in_transaction(self) -> bool:
        return self._whole.in_transaction()
