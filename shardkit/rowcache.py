"""The cache of one cluster, as its sessions use it: backend, names of entries, floors, counts.

Sessions that read, sessions that write and the relay all come here, in threads or in SQLAlchemy's
greenlet alike. Made on first use by `shardkit.connections` when `[cache]` names a backend; needs
the `cache` extra. Opens no connection before the first request.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, Protocol

from sqlalchemy.orm import Mapper
from sqlalchemy.util import await_only

from shardkit.cached import CachePlan, plan_of
from shardkit.cachereads import CacheReads, Found, Plan
from shardkit.caches.backend import AsyncBackend, Backend, Place, Underway
from shardkit.caches.copies import AsyncCopiedCache, CopiedCache
from shardkit.caches.opening import async_backend, backend
from shardkit.caching.floors import SessionFloor
from shardkit.caching.keys import cache_key
from shardkit.caching.operations import Answer, Request
from shardkit.caching.tally import CacheCounts, Tally
from shardkit.clock import SYSTEM, Clock
from shardkit.derived import Derived
from shardkit.derivedplan import DerivedPlan, derived_plan
from shardkit.flights import AsyncFlights, Flights
from shardkit.forks import ForkSafeLock
from shardkit.sections import CacheConfig
from shardkit.topology import Topology

__all__ = ["AsyncRowCache", "RowCache", "Rows"]


class _Known(Protocol):
    @property
    def topology(self) -> Topology: ...


class Rows:
    """What both kinds share.

    Attributes:
        config: `[cache]`.
        tally: counts what sessions find.
        serves_previous: whether writers let readers have the previous value meanwhile.
        is_async: whether it can be asked in SQLAlchemy's greenlet only.
    """

    backend: Any
    is_async = False
    _flights: Flights[Found]

    def __init__(self, config: CacheConfig, source: _Known, *, clock: Clock = SYSTEM) -> None:
        self.config = config
        self.tally = Tally()
        self.serves_previous = config.serve_previous
        self._source = source
        self._clock = clock
        self._generation = f"{source.topology.name}.{config.generation}"
        self._guard = ForkSafeLock()
        self._floor = SessionFloor(clock=clock)

    @property
    def counts(self) -> CacheCounts:
        """How often the cache had what sessions of this process looked for."""
        return self.tally.counts

    def plan(self, mapper: Mapper[Any]) -> CachePlan | None:
        """Return how the rows of a class are cached, or None when they are not.

        Raises:
            NotCacheableError: the class says that they are, and they cannot be.
        """
        return plan_of(mapper)

    def derived_plan(self, derived: Derived[Any]) -> DerivedPlan:
        """Return how a list or count is cached.

        Raises:
            NotCacheableError: it cannot be.
        """
        return derived_plan(derived)

    def key(self, plan: Plan, logical_shard: int, identity: Sequence[Any]) -> str:
        """Return the name of an entry.

        Args:
            plan: of its class, or of the list or count.
            logical_shard: where it lies.
            identity: its primary key, for which `plan.names_row` holds.
        """
        return self.key_of(plan.entry, logical_shard, identity)

    def key_of(self, table: str, logical_shard: int, identity: Sequence[Any]) -> str:
        """Return the name of the entry of a row of a table, or of a list by its own name."""
        epoch = self._source.topology.shard_map.epochs[logical_shard]
        return cache_key(self._generation, epoch, logical_shard, table, identity)

    def group(self, logical_shards: Sequence[int]) -> dict[str, list[int]]:
        """Return logical shards by physical shard."""
        owner, found = self._source.topology.shard_map.owner, dict[str, list[int]]()
        for shard in logical_shards:
            found.setdefault(owner(shard), []).append(shard)
        return found

    @cached_property
    def reads(self) -> CacheReads:
        """What reads through this cache, for all sessions."""
        return CacheReads(self, self._flights)

    # -- what this process has written

    def raise_floor(self, key: str, version: int) -> None:
        """Remember what was committed here: sessions of this process are shown nothing older."""
        with self._guard.lock:
            self._floor.raise_to(key, version)

    def floor(self, key: str) -> int:
        """Return the least version of an entry that a session may be shown; 0 for any."""
        if not len(self._floor):  # as nearly always in processes that only read
            return 0
        with self._guard.lock:
            return self._floor.of(key)

    # -- to be provided

    def run(self, requests: Sequence[Request], *, place: Place = Place.USUAL) -> list[Answer]:
        """Carry out requests on different keys; see `shardkit.caches.backend.Backend.run`."""
        raise NotImplementedError

    def start(self, requests: Sequence[Request]) -> Underway:
        """Send requests on different keys, whose answers are wanted later."""
        raise NotImplementedError

    def copies_end(self, keys: Iterable[str]) -> float:
        """Return in how many seconds no process has a copy of these entries from before."""
        backend = self.backend
        if isinstance(backend, CopiedCache | AsyncCopiedCache):
            return backend.copies.wait(keys)
        return 0.0

    def wait(self, seconds: float) -> None:
        """Wait."""
        raise NotImplementedError

    def pause(self, longest: float) -> None:
        """Wait a while, at most so many seconds: not all that wait shall ask at once."""
        raise NotImplementedError


class _PutOff:
    """Requests that are sent when their answers are wanted."""

    def __init__(self, rows: Rows, requests: Sequence[Request]) -> None:
        self._rows = rows
        self._requests = requests

    def answers(self) -> list[Answer]:
        """Carry the requests out."""
        return self._rows.run(self._requests)


class RowCache(Rows):
    """The cache for threads. Thread-safe and fork-safe."""

    backend: Backend

    def __init__(self, config: CacheConfig, source: _Known, *, clock: Clock = SYSTEM) -> None:
        super().__init__(config, source, clock=clock)
        self.backend = backend(config)
        if config.copies:
            self.backend = CopiedCache(self.backend, config.copies, clock=clock)
        self._flights = Flights()

    def run(self, requests: Sequence[Request], *, place: Place = Place.USUAL) -> list[Answer]:
        """Carry out requests on different keys, in the backend's deadline."""
        return self.backend.run(requests, place=place)

    def start(self, requests: Sequence[Request]) -> Underway:
        """Send requests on different keys, whose answers are wanted later by this thread."""
        return self.backend.start(requests)

    def wait(self, seconds: float) -> None:
        """Wait in this thread."""
        self._clock.sleep(seconds)

    def pause(self, longest: float) -> None:
        """Wait a while in this thread."""
        self._clock.sleep(random.uniform(0.0, longest))  # noqa: S311 - nobody gains by guessing

    def close(self) -> None:
        """Close every connection; later requests open new ones."""
        self.backend.close()


class AsyncRowCache(Rows):
    """The same for asyncio; `run` and `pause` are called inside SQLAlchemy's greenlet."""

    backend: AsyncBackend
    is_async = True

    def __init__(self, config: CacheConfig, source: _Known, *, clock: Clock = SYSTEM) -> None:
        super().__init__(config, source, clock=clock)
        self.backend = async_backend(config)
        if config.copies:
            self.backend = AsyncCopiedCache(self.backend, config.copies, clock=clock)
        self._flights = AsyncFlights()

    def run(self, requests: Sequence[Request], *, place: Place = Place.USUAL) -> list[Answer]:
        """Carry out requests on different keys, in the backend's deadline."""
        return await_only(self.backend.run(requests, place=place))

    def start(self, requests: Sequence[Request]) -> Underway:
        """Put requests off until their answers are wanted."""
        return _PutOff(self, requests)

    def wait(self, seconds: float) -> None:
        """Wait in this task."""
        await_only(asyncio.sleep(seconds))

    def pause(self, longest: float) -> None:
        """Wait a while in this task."""
        await_only(asyncio.sleep(random.uniform(0.0, longest)))  # noqa: S311 - see `RowCache`

    async def close(self) -> None:
        """Close every connection of this event loop; later requests open new ones."""
        await self.backend.close()
