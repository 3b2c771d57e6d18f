"""What sessions need of the servers: connections, who owns what, and statements of its own.

Sessions ask here for connections, which `shardkit.engines` opens, if the guard of the server lets
them through; and where logical shards lie, which the watch of the shard map finds out. What a
server does not do is told to those who have to know: guards, replicas, listeners.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import socket
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import psycopg
from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolExhaustedError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.util import await_only, greenlet_spawn
from sqlalchemy.util.concurrency import in_greenlet

from shardkit import fences, gates, parallel, races
from shardkit.checks import connection_error
from shardkit.clock import SYSTEM, Clock
from shardkit.config import (
    FAILOVER_PATIENCE,
    MAP_AGE,
    MAX_ROWS,
    STATEMENT_TIMEOUT,
    CacheConfig,
    PoolConfig,
    ReplicasConfig,
)
from shardkit.directories import Directories
from shardkit.engines import ADMITTED, Engines, Purpose, connects
from shardkit.errors import (
    ConfigurationError,
    EndpointUnavailableError,
    InvalidShardKeyError,
    ShardFencedError,
    UnsupportedStatementError,
)
from shardkit.events import EndpointFailed, Listeners, PrimaryChanged
from shardkit.fingerprints import Fingerprints
from shardkit.freshness import Knowledge
from shardkit.guards import guards
from shardkit.hedging import Hedges
from shardkit.heldmap import HeldMap
from shardkit.keys import shown
from shardkit.leasing import lease_ids
from shardkit.loads import loads
from shardkit.lookup import Lookups
from shardkit.mapwatch import AsyncMapWatch, MapWatch
from shardkit.minting import IdMinter
from shardkit.owners import Owners
from shardkit.placement import Placement, Policy, anywhere, bound
from shardkit.plans import Plans
from shardkit.pools import AsyncDeadlinePool, DeadlinePool
from shardkit.probes import AsyncProbes, Probes
from shardkit.replicas import ReplicaSet
from shardkit.retry import MOVED
from shardkit.router import Router
from shardkit.topology import Endpoint, Role, ShardMap, Topology

if TYPE_CHECKING:  # the `cache` extra
    from shardkit.rowcache import AsyncRowCache, RowCache

__all__ = ["AsyncConnections", "Connections", "Purpose"]

T = TypeVar("T")

# What was committed on another connection, durably, lies before the end of what is flushed.
_WRITTEN = """
SELECT (SELECT system_identifier FROM pg_catalog.pg_control_system()),
    pg_catalog.pg_current_wal_flush_lsn()::text,
    pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_insert_lsn())
"""


class _Core(Engines):
    """What both kinds share; everything here runs in a thread or in a greenlet alike."""

    _probes_class: type[Probes | AsyncProbes]
    _watch_class: type[MapWatch | AsyncMapWatch]

    def __init__(
        self,
        topology: Topology,
        *,
        pool: PoolConfig | None = None,
        placement: Placement | Policy = anywhere,
        max_rows: int = MAX_ROWS,
        statement_timeout: float = STATEMENT_TIMEOUT,
        adaptive: bool = False,
        replicas: ReplicasConfig | None = None,
        cache: CacheConfig | None = None,
        map_age: float = MAP_AGE,
        failover_wait: float = FAILOVER_PATIENCE,
        is_sync: bool = False,
        clock: Clock = SYSTEM,
    ) -> None:
        reading = replicas or ReplicasConfig()
        super().__init__(pool or PoolConfig(), patience=statement_timeout, is_sync=is_sync)
        self.topology = topology
        self.cache_config = cache or CacheConfig()
        self.max_rows = max_rows
        self.clock = clock
        self.listeners = Listeners()
        ceiling = self._pool.size + self._pool.overflow
        self._guards = partial(
            guards,
            listeners=self.listeners,
            ceiling=max(2, ceiling) if adaptive else None,
            clock=clock,
        )
        self.guards = dict(self._guards(topology))
        self.router = Router(topology.n_logical_shards)
        self.everything = tuple(range(topology.n_logical_shards))
        self.plans = Plans()
        self.replica_sets = {
            name: ReplicaSet(shard, region=reading.here, patience=reading.patience, clock=clock)
            for name, shard in topology.physical.items()
        }
        self.hedges = {name: Hedges() for name in topology.physical} if reading.hedge else {}
        self._reading_patience = reading.patience
        held = HeldMap(
            topology.shard_map,
            topology.physical,
            max_age=map_age,
            on_change=self._changed,
            clock=clock,
        )
        self.map_watch = self._watch_class(
            topology, held, follow=self._led, hear=self._heard, receive=self.receive, clock=clock
        )
        self.held = held
        self.owners = Owners(held, self.map_watch, clock=clock)
        self.probes = self._probes_class(
            topology,
            self.replica_sets,
            interval=reading.probe_interval,
            timeout=1.0,
            clock=clock,
        )
        self._policy = placement
        self.placement = bound(placement, topology, self._loads, clock=clock)
        self.directories = Directories(self, self._place, clock=clock)
        self.lookups = Lookups(self, topology.n_logical_shards)
        self.ids = IdMinter(self.lease_ids, clock=clock)
        self.fingerprints = Fingerprints()
        self._failover_wait = failover_wait
        self._away_since: dict[str, float] = {}
        self.physical = frozenset(topology.physical)
        self._changed(topology.shard_map)
        reference = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _forget_connections(reference()))

    def physical_of(self, logical_shard: int) -> str:
        """Return the name of the physical shard that holds a logical shard.

        Raises:
            InvalidShardKeyError: there is none of that number.
        """
        total = self.router.total
        if type(logical_shard) is not int or not 0 <= logical_shard < total:
            raise InvalidShardKeyError(
                f"{shown(logical_shard)} is not a logical shard",
                hint=f"logical shards are numbers from 0 to {total - 1}",
            )
        return self.topology.shard_map.owner(logical_shard)

    def _changed(self, shard_map: ShardMap) -> None:
        """Take a new shard map; called from where it is asked for, and waits for nothing."""
        topology = Topology(self.topology.name, self.topology.physical, shard_map)
        owned = {name: shard_map.owned_by(name) for name in topology.physical}
        with suppress(ConfigurationError):  # it names a place that has no logical shard any more
            self.placement = bound(self._policy, topology, self._loads, clock=self.clock)
        self.knowledge = Knowledge.of(topology, self.replica_sets, self._reading_patience)
        self._everything = {name: shards for name, shards in owned.items() if shards}
        self.topology = topology

    def _led(self, physical: str, primary: Endpoint) -> Topology:
        """Take another server as a primary; called from where that is found, and waits for nothing.

        What runs on the old one is cut: a server that is frozen answers nobody, and one that goes
        on without its standbys must not be written to.
        """
        before = self.topology.physical[physical]
        shard = before.led_by(primary.address)
        alone = Topology(self.topology.name, {physical: shard}, self.topology.shard_map)
        for endpoint, guard in self._guards(alone).items():
            self.guards.setdefault(endpoint, guard)
        self.guards[shard.primary].breaker.close()
        self.replica_sets[physical].follow(shard)
        servers = {**self.topology.physical, physical: shard}
        self.topology = Topology(self.topology.name, servers, self.topology.shard_map)
        self._changed(self.topology.shard_map)
        with suppress(RuntimeError):  # one was opened meanwhile, which will find out by itself
            for driver in tuple(self._opened.get(before.primary, ())):
                _cut(driver)
        if self.listeners:
            self.listeners.emit(PrimaryChanged(physical, str(before.primary), str(shard.primary)))
        return self.topology

    def _heard(self, physical: str, *, is_another: bool) -> None:
        """Have a primary tried that was away and answers; waits for nothing.

        Behind a pooler a failover changes no address: what the old primary did is held against its
        successor else, for a minute. Where replicas are led to has changed, too.
        """
        shard = self.topology.physical[physical]
        self.guards[shard.primary].breaker.expect(is_another=is_another)
        if is_another and shard.pooler is not None:
            for endpoint in shard.replicas:
                self.guards[endpoint].breaker.expect()

    async def receive(self, source: str, target: str, n_moving: int) -> None:
        """Make ready for logical shards that are on their way, beside the sessions."""
        raise NotImplementedError

    def waits_for(self, error: BaseException) -> float:
        """Return for how many seconds from now another primary is waited for after an error.

        All that wait for one primary give it up at the same time, and who comes later does not
        wait at all: an outage without a failover holds nobody for long.
        """
        where = getattr(error, "endpoint", None)
        names = [
            name
            for name, shard in self.topology.physical.items()
            if (shard.replicas or shard.pooler)
            and (where is None or where.startswith(f"{name}/{Role.PRIMARY}@"))
        ]
        if not names or self._failover_wait <= 0:
            return 0.0
        now = self.clock.monotonic()
        longest = 0.0
        for name in names:
            self.owners.doubt(name)
            since = self._away_since.get(name)
            if since is None or self.held.heard_at[name] > since:
                since = self._away_since[name] = now
            longest = max(longest, since + self._failover_wait - now)
        return longest

    def group(self, logical_shards: Sequence[int]) -> Mapping[str, tuple[int, ...]]:
        """Return logical shards that are about to be read by physical shard.

        Raises:
            ShardFencedError: one has moved and does not open in time (retryable).
        """
        self.owners.opened(logical_shards, writes=False)
        return self.grouped(logical_shards)

    def grouped(self, logical_shards: Sequence[int]) -> Mapping[str, tuple[int, ...]]:
        """Return logical shards by physical shard, each group in the order given.

        As far as this process knows; asks nobody.
        """
        if len(logical_shards) == self.router.total:
            return self._everything
        groups: dict[str, list[int]] = {}
        for shard in logical_shards:
            groups.setdefault(self.physical_of(shard), []).append(shard)
        return {physical: tuple(shards) for physical, shards in groups.items()}

    def failed(self, endpoint: Endpoint, error: Exception) -> None:
        """Note that an endpoint did not answer, and tell the listeners."""
        if endpoint.role is Role.REPLICA:
            self.replica_sets[endpoint.physical].failed(endpoint)
        else:
            self.owners.doubt(endpoint.physical)
        if self.listeners:
            self.listeners.emit(
                EndpointFailed(endpoint.physical, endpoint.role.value, str(endpoint), error)
            )

    def connect(self, engine: Engine, endpoint: Endpoint) -> Connection:
        """Check a connection out that begins no transaction by itself.

        Raises:
            PoolTimeoutError: none came free in time (retryable).
            BreakerOpenError: the server failed too often and is left alone (retryable).
            OverloadedError: the server has enough to do (retryable).
            EndpointUnavailableError: the server refuses connections (retryable).
        """
        try:
            return self.admitted(endpoint, lambda: Connection(engine, _allow_autobegin=False))
        except (PoolExhaustedError, DBAPIError) as error:
            raise connection_error(error, endpoint) from error

    def admitted(self, endpoint: Endpoint, check_out: Callable[[], Connection]) -> Connection:
        """Check a connection out if the guard of its server allows.

        Raises:
            BreakerOpenError: the server failed too often and is left alone (retryable).
            OverloadedError: the server has enough to do (retryable).
        """
        guard = self.guards[endpoint]
        guard.admit()
        if guard.limit is None:
            return check_out()
        try:
            connection = check_out()
            connection.info[ADMITTED] = guard  # whoever returns it tells the limit
        except BaseException:
            guard.released()
            raise
        return connection

    def parallel(self, tasks: Sequence[Callable[[], T]]) -> list[T | Exception]:
        """Run tasks at the same time; return result or exception of each, in order."""
        raise NotImplementedError

    # -- statements of shardkit's own

    def lease_ids(self, counts: Mapping[int, int]) -> dict[int, int]:
        """Reserve ranges of ids; see `shardkit.leasing.lease_ids`."""
        self.owners.opened([n for n in counts if 0 <= n < self.router.total], writes=True)
        return lease_ids(self, counts, self.router.total)

    def ask(
        self, physical: str, query: str, parameters: Mapping[str, Any], *, primary: bool
    ) -> Sequence[Sequence[Any]]:
        """Run one statement by itself, apart from any session, and return its rows.

        Args:
            physical: name of the physical shard.
            query: for the driver.
            parameters: of the query.
            primary: whether only the primary may answer.

        Raises:
            UnavailableError: the server does not answer (retryable).
        """
        endpoint = self.primary_of(physical)
        if not primary:
            endpoint = self.replica_sets[physical].choose(excluding=set())
        try:
            with self.connect(self.engine(endpoint, Purpose.LEASE), endpoint) as connection:
                result = connection.exec_driver_sql(query, dict(parameters))
                return result.all() if result.returns_rows else []
        except EndpointUnavailableError as error:
            self.failed(endpoint, error)
            raise
        except DBAPIError as error:
            found = self._told(error, endpoint)
            if found is error:
                raise
            raise found from error

    def written(self, physical: str) -> tuple[int, gates.Position]:
        """Return which server a primary is, and a log position beyond all that it has committed.

        Raises:
            UnavailableError: the server does not answer (retryable).
        """
        [(system, lsn, file)] = self.ask(physical, _WRITTEN, {}, primary=True)
        return int(system), gates.Position(int(file[:8], 16), gates.lsn_of(lsn.encode()))

    @contextmanager
    def borrow(self, logical_shard: int, *, waits: bool) -> Iterator[Connection]:
        """Lend a connection to the primary of a logical shard; nothing is open on it.

        It is apart from any session.

        Args:
            logical_shard: that it is lent for.
            waits: whether it will wait for transactions of others.

        Raises:
            UnavailableError: the server does not answer, or the logical shard is being moved
                (retryable).
        """
        self.awaited("a unique value has to be looked up")
        endpoint = self.primary_of(self.physical_of(logical_shard))
        purpose = Purpose.WAIT if waits else Purpose.LOOKUP
        try:
            with self.connect(self.engine(endpoint, purpose), endpoint) as connection:
                yield connection
        except EndpointUnavailableError as error:
            self.failed(endpoint, error)
            raise
        except DBAPIError as error:
            found = self._told(error, endpoint, (logical_shard,))
            if found is error:
                raise
            raise found from error

    def settle(self, error: BaseException) -> None:
        """Wait until a logical shard that is not open, as an error says, can be used.

        A session waits for its own, and not for those that its lookups ask.

        Raises:
            ShardFencedError: it stays closed beyond the deadline, or ten seconds (retryable).
        """
        if isinstance(error, ShardFencedError) and error.logical_shard is not None:
            self.owners.opened((error.logical_shard,), writes=True)

    def _told(
        self, error: DBAPIError, endpoint: Endpoint, about: Sequence[int] | None = None
    ) -> Exception:
        """Return what an error of a statement of shardkit's own means.

        Args:
            error: what the driver raised.
            endpoint: whom it was about.
            about: logical shards of the statement; None for any of the server.
        """
        if error.connection_invalidated:
            return connection_error(error, endpoint)
        before, physical = self.topology.shard_map, endpoint.physical
        if getattr(error.orig, "sqlstate", None) not in MOVED:
            return error
        now = self.owners.ask([physical])
        for n in before.owned_by(physical) if about is None else about:
            if now.owners[n] != physical:
                return fences.moved(n, now.owners[n])
            if n in now.held:
                return fences.still_closed(n, now)
        return error

    def awaited(self, what: str) -> None:
        """Refuse to go on where a server cannot be asked; under asyncio, in `route`."""

    def _place(self, n_logical_shards: int) -> int:
        """Choose a logical shard by the placement of the moment."""
        return self.placement(n_logical_shards)

    def _loads(self) -> dict[int, float]:
        return loads(self, range(self.router.total))


class Connections(_Core):
    """Connections for threads."""

    _probes_class = Probes
    _watch_class = MapWatch
    _cursor_class = gates.Cursor
    _writing: ClassVar[Mapping[str, Any]] = {"cursor_factory": gates.WriteCursor}
    probes: Probes
    map_watch: MapWatch

    @cached_property
    def cache(self) -> RowCache | None:
        """The cache of rows, or None when there is none; opens no connection."""
        if not self.cache_config.is_on:
            return None
        made: RowCache = _rowcache().RowCache(self.cache_config, self, clock=self.clock)
        return made

    def close(self) -> None:
        """Close every pooled connection; those in use close when they are returned."""
        self.probes.close()
        self.map_watch.close()
        if "cache" in self.__dict__ and self.cache is not None:  # not to make it now
            self.cache.close()
        races.settle()
        for engine in self._engines.values():
            engine.dispose()

    async def receive(self, source: str, target: str, n_moving: int) -> None:
        """Make ready in a thread of its own."""
        await asyncio.to_thread(self.make_ready, source, target, n_moving)

    def _create_engine(self, url: URL, options: dict[str, Any]) -> Engine:
        engine = create_engine(url, poolclass=DeadlinePool, **options)
        event.listen(engine, "do_connect", connects)
        return engine

    def parallel(self, tasks: Sequence[Callable[[], T]]) -> list[T | Exception]:
        """Run tasks at the same time, in the caller's thread."""
        return parallel.run(tasks)


class AsyncConnections(_Core):
    """Connections for one event loop; every method runs inside SQLAlchemy's greenlet."""

    _probes_class = AsyncProbes
    _watch_class = AsyncMapWatch
    _cursor_class = gates.AsyncCursor
    _writing: ClassVar[Mapping[str, Any]] = {
        "async_creator_fn": gates.AsyncWriter.open,
        "cursor_factory": gates.AsyncWriteCursor,
    }
    probes: AsyncProbes
    map_watch: AsyncMapWatch

    @cached_property
    def cache(self) -> AsyncRowCache | None:
        """The cache of rows, or None when there is none; opens no connection."""
        if not self.cache_config.is_on:
            return None
        made: AsyncRowCache = _rowcache().AsyncRowCache(self.cache_config, self, clock=self.clock)
        return made

    async def close(self) -> None:
        """Close every pooled connection."""
        await self.probes.close()
        await self.map_watch.close()
        if "cache" in self.__dict__ and self.cache is not None:
            await self.cache.close()
        await races.settle_tasks()
        for engine in self._engines.values():
            await greenlet_spawn(engine.dispose)

    async def receive(self, source: str, target: str, n_moving: int) -> None:
        """Make ready in a greenlet of its own."""
        await greenlet_spawn(self.make_ready, source, target, n_moving)

    def _create_engine(self, url: URL, options: dict[str, Any]) -> Engine:
        options["connect_args"].setdefault("async_creator_fn", gates.AsyncConnection.open)
        return create_async_engine(url, poolclass=AsyncDeadlinePool, **options).sync_engine

    def ask(
        self, physical: str, query: str, parameters: Mapping[str, Any], *, primary: bool
    ) -> Sequence[Sequence[Any]]:
        """Run one statement by itself; see `Connections.ask`."""
        self.awaited("the key of a directory is not known yet")
        return super().ask(physical, query, parameters, primary=primary)

    def awaited(self, what: str) -> None:
        """Refuse to go on outside SQLAlchemy's greenlet: `route` is not awaited."""
        if not in_greenlet():
            raise UnsupportedStatementError(
                what, hint="await session.run_sync(lambda sync: sync.route(statement))"
            )

    def parallel(self, tasks: Sequence[Callable[[], T]]) -> list[T | Exception]:
        """Run tasks as greenlets of one event loop."""

        async def run() -> list[T | Exception]:
            # A cancelled gather waits for all its tasks only if it may return exceptions, and no
            # connection may be let go while its task still ends the conversation.
            with parallel.together() if len(tasks) > 1 else nullcontext():
                outcomes: Any = await asyncio.gather(
                    *(greenlet_spawn(parallel.outcome, task) for task in tasks),
                    return_exceptions=True,
                )
            for outcome in outcomes:
                if isinstance(outcome, BaseException) and not isinstance(outcome, Exception):
                    raise outcome
            return cast("list[T | Exception]", outcomes)

        return await_only(run())


def _rowcache() -> Any:
    """Return the module that needs the `cache` extra.

    Raises:
        ConfigurationError: that is not installed.
    """
    try:
        return importlib.import_module("shardkit.rowcache")
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"[cache] needs {error.name}, which is not installed",
            hint="pip install 'shardkit[cache]'",
        ) from error


def _cut(driver: Any) -> None:
    """Hang up, from another thread than the one that waits for the server."""
    with suppress(OSError, psycopg.Error):
        line = socket.socket(fileno=os.dup(driver.fileno()))
        with line:
            line.shutdown(socket.SHUT_RDWR)


def _forget_connections(cluster: _Core | None) -> None:
    """Leave the parent's sockets to the parent."""
    if cluster is not None:
        for engine in cluster._engines.values():
            engine.dispose(close=False)
        cluster.probes.forget()
        cluster.map_watch.forget()
