"""`Cluster` and `AsyncCluster`: what an application opens once and asks for sessions.

Both are thin: the configuration becomes a topology, `shardkit.connections` holds the pools, and
`shardkit.session` does the work.
"""

from __future__ import annotations

import math
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Generic, Self, TypeVar

from shardkit import config, deadlines, units
from shardkit.async_session import AsyncReadSession, AsyncWriteSession
from shardkit.config import (
    FAILOVER_PATIENCE,
    MAP_AGE,
    MAX_ROWS,
    STATEMENT_TIMEOUT,
    CacheConfig,
    DurabilityConfig,
    PoolConfig,
    ReplicasConfig,
)
from shardkit.connections import AsyncConnections, Connections
from shardkit.events import Listener
from shardkit.operations import KEEP
from shardkit.placement import Placement, Policy, anywhere
from shardkit.session import ReadSession
from shardkit.topology import Topology
from shardkit.units import Near
from shardkit.writer import WriteSession

if TYPE_CHECKING:  # the `cache` extra
    from shardkit.rowcache import AsyncRowCache, RowCache

__all__ = ["AsyncCluster", "Cluster"]

T = TypeVar("T")
C = TypeVar("C", Connections, AsyncConnections)


class _Opened(Generic[C]):
    """What both kinds share: how they are made, and what they know."""

    connections: C
    _connections_class: type[C]

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
        token_keys: Sequence[str] = (),
        cache: CacheConfig | None = None,
        map_age: float = MAP_AGE,
        failover_wait: float = FAILOVER_PATIENCE,
        services: Mapping[str, str] | None = None,
        durability: DurabilityConfig | None = None,
    ) -> None:
        self.token_keys = tuple(token_keys)
        self.services = dict(services or {})
        self.connections = self._connections_class(
            topology,
            pool=pool,
            placement=placement,
            max_rows=_checked_rows(max_rows),
            statement_timeout=deadlines.positive(statement_timeout, "statement_timeout"),
            adaptive=adaptive,
            replicas=replicas,
            cache=cache,
            map_age=deadlines.positive(map_age, "map_age"),
            failover_wait=failover_wait,
            is_sync=durability is not None and durability.mode == "sync",
        )

    @classmethod
    def from_file(
        cls,
        path: str | os.PathLike[str] = "shardkit.toml",
        *,
        placement: Placement | Policy = anywhere,
    ) -> Self:
        """Return the cluster that a configuration file describes.

        Raises:
            ConfigurationError: the file is wrong, naming file, key and remedy.
        """
        settings, topology = config.load(path)
        return cls(
            topology,
            pool=settings.pool,
            placement=placement,
            max_rows=settings.limits.max_rows,
            statement_timeout=settings.limits.statement_timeout,
            adaptive=settings.limits.adaptive,
            replicas=settings.replicas,
            token_keys=settings.tokens.secrets(),
            cache=settings.found_cache,
            map_age=settings.limits.map_age,
            failover_wait=settings.failover.wait,
            services=settings.services,
            durability=settings.durability,
        )

    @property
    def topology(self) -> Topology:
        """Endpoints, and the shard map as this process knows it now."""
        return self.connections.topology

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Tell a listener, a plain function, of every event; return what ends it.

        The listener runs where the event happens, before the statement or after the commit it
        is about. It must be quick; what it raises is logged.
        """
        return self.connections.listeners.add(listener)


class Cluster(_Opened[Connections]):
    """The whole cluster, for threads.

    Thread-safe; make one per process. Sessions it returns belong to one thread each. Opens no
    connection until a session needs one.

    Args:
        topology: endpoints and shard map, usually from `from_file`.
        pool: sizes and time limits of the pools.
        placement: chooses the logical shard of rows that nothing places yet; a policy of
            `shardkit.placement`, or a function of the number of logical shards.
        max_rows: rows that a statement over several logical shards may fetch, unless it says
            otherwise with `all_shards(max_rows=…)`.
        statement_timeout: seconds a session waits for one answer of a server, where no
            `shardkit.deadline` says less.
        adaptive: whether each server gets as many sessions at a time as it answers quickly, at
            most its pool, and sheds the others: `shardkit.background` first.
        replicas: how readers use replicas.
        token_keys: what signs tokens that leave the process, the newest first; for
            `shardkit.contrib.asgi`.
        cache: where rows of classes with `__cache_ttl__` are cached; None for nowhere.
        map_age: seconds for which what a server said of the logical shards that it owns counts;
            then it is asked again before they are used, cached rows included.
        failover_wait: seconds for which `run` waits for another primary, from when the old one was
            first missed; 0 for not.
        services: addresses of other servers by name: `[services]` of the configuration.
        durability: what an acknowledged commit survives; None for `async`.

    Example:
        >>> cluster = Cluster.from_file("shardkit.toml")  # doctest: +SKIP
        >>> with cluster.writer() as session:  # doctest: +SKIP
        ...     session.add(Photo(owner_id=ana.id, caption="dawn"))
        ...     session.commit()
    """

    _connections_class = Connections

    @property
    def cache(self) -> RowCache | None:
        """The cache of rows, made on first use; None when there is none. Closed with this."""
        return self.connections.cache

    def writer(self, *, atomic: bool = False) -> WriteSession:
        """Return a session on the primaries; it writes to one physical shard per transaction.

        Args:
            atomic: let a transaction write to several: all of it holds, or none
                (`shardkit.twophase`). Costs round trips, and nothing where only one is written.
        """
        return WriteSession(self.connections, atomic=atomic)

    def reader(self, *, after: str | None = None, max_lag: float | None = None) -> ReadSession:
        """Return a read-only session on replicas.

        Args:
            after: token of a writer or of an earlier reader; what they saw is then seen, from a
                replica that has replayed it or from the primary. `shardkit.tokens.NOTHING` when
                there is none yet. Anything that is not a token asks the primaries.
            max_lag: seconds of replication delay that are acceptable, above 0. Until the delay
                has been measured, for a tenth of a second after the first such reader, the
                primaries are asked. None accepts any delay.

        Raises:
            ValueError: max_lag is not above 0, or not finite.
        """
        return ReadSession(self.connections, after=after, max_lag=_checked(max_lag))

    def run(
        self,
        fn: Callable[[WriteSession], T],
        *,
        operation: str | None = None,
        near: Near | None = None,
        fingerprint: str | None = None,
        keep: float = KEEP,
    ) -> T:
        """Run a unit of work in a writer, commit it, and run it again where that is safe.

        It is run again, up to three times in all and while the retry budget of the server and the
        deadline allow, after errors that are known to have committed nothing: servers that go
        away, deadlocks, serialization failures. While a logical shard is moved it waits, and goes
        on where that went, within the deadline or for ten seconds. With a name it is also run
        again after a lost answer to COMMIT, and does its work once however often it is run: a
        later run returns the result of the first.

        Args:
            fn: given a fresh session each time; must not commit, nor do what cannot be undone.
            operation: name of the unit, such as an Idempotency-Key of HTTP.
            near: goes with `operation`: the id, or `(Model, shard key)`, beside whose rows the
                record is kept, and what the unit writes must be.
            fingerprint: goes with `operation`: of what was asked for, such as a hash of the
                request; the same name with another one is refused.
            keep: seconds after which the name is forgotten; a day.

        Returns:
            What `fn` returned; with a name it has to be JSON and comes back as JSON has it.

        Raises:
            OutcomeUnknownError: the answer to COMMIT was lost, and the unit has no name, or no
                time or budget was left to settle it.
            OperationMismatchError: the name was used with another fingerprint.
            ValueError: `operation` without `near`, a bad name, or a result that is no JSON.

        Source: `shardkit.units`.
        """
        return units.run(
            self.writer,
            fn,
            units.named(operation, near, fingerprint, keep),
            guards=self.connections.guards,
            waits=self.connections.waits_for,
            settle=self.connections.settle,
            clock=self.connections.clock,
        )

    def close(self) -> None:
        """Close every pooled connection; sessions still open keep theirs until they close."""
        self.connections.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class AsyncCluster(_Opened[AsyncConnections]):
    """The whole cluster, for asyncio: the words of `Cluster`, awaited.

    Belongs to one event loop.

    Example:
        >>> async with AsyncCluster.from_file("shardkit.toml") as cluster:  # doctest: +SKIP
        ...     async with cluster.reader() as session:
        ...         photo = await session.get(Photo, photo_id)
    """

    _connections_class = AsyncConnections

    @property
    def cache(self) -> AsyncRowCache | None:
        """The cache of rows; see `Cluster.cache`."""
        return self.connections.cache

    def writer(self, *, atomic: bool = False) -> AsyncWriteSession:
        """Return a session on the primaries; see `Cluster.writer`."""
        return AsyncWriteSession(self.connections, atomic=atomic)

    def reader(self, *, after: str | None = None, max_lag: float | None = None) -> AsyncReadSession:
        """Return a read-only session on replicas; see `Cluster.reader`."""
        return AsyncReadSession(self.connections, after=after, max_lag=_checked(max_lag))

    async def run(
        self,
        fn: Callable[[AsyncWriteSession], Awaitable[T]],
        *,
        operation: str | None = None,
        near: Near | None = None,
        fingerprint: str | None = None,
        keep: float = KEEP,
    ) -> T:
        """Run a unit of work, a coroutine function; see `Cluster.run`."""
        return await units.run_async(
            self.writer,
            fn,
            units.named(operation, near, fingerprint, keep),
            guards=self.connections.guards,
            waits=self.connections.waits_for,
            settle=self.connections.settle,
        )

    async def close(self) -> None:
        """Close every pooled connection."""
        await self.connections.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()


def _checked(max_lag: float | None) -> float | None:
    if max_lag is not None and not (math.isfinite(max_lag) and max_lag > 0):
        raise ValueError(f"max_lag={max_lag!r}: give seconds above 0, or None for any delay")
    return max_lag


def _checked_rows(max_rows: int) -> int:
    if max_rows < 1:
        raise ValueError(f"max_rows={max_rows!r}: give a whole number above 0")
    return max_rows
