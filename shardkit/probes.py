"""Asks every server, ten times a second, how far its log is; what `shardkit.replicas` knows.

Runs beside the sessions: a thread with an event loop of its own for `Cluster`, a task for
`AsyncCluster`. Started by the first reader that has a token or a bound, one small connection for
each server. An old answer loses reads to the primary and never makes one stale, because the
server that answers a read is asked again with it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import psycopg
from psycopg import AsyncConnection

from shardkit.clock import SYSTEM, Clock
from shardkit.gates import lsn_of
from shardkit.replicas import ReplicaSet, Sample
from shardkit.runners import AsyncBackground, Background
from shardkit.topology import Endpoint, Topology, libpq_options

__all__ = ["AsyncProbes", "PausedError", "Probes", "answered"]

_LOG: Final = logging.getLogger(__name__)

# Takes no lock.
_SYSTEM = "SELECT system_identifier FROM pg_catalog.pg_control_system()"
_STATE = """
SELECT r, CASE WHEN r THEN pg_catalog.pg_last_wal_replay_lsn()
        ELSE pg_catalog.pg_current_wal_flush_lsn() END,
    CASE WHEN r THEN pg_catalog.pg_last_wal_receive_lsn() END,
    CASE WHEN r THEN pg_catalog.split_part(shardkit.replayed('0/0', 0), ' ', 2)
        ELSE pg_catalog.substr(
            pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_insert_lsn()), 1, 8) END
FROM pg_catalog.pg_is_in_recovery() AS r
"""


class PausedError(TimeoutError):
    """This process did not run for a while, so no server is to blame for the silence."""


class _Prober:
    """Asks the servers of a cluster until it is cancelled."""

    def __init__(
        self,
        topology: Topology,
        replica_sets: Mapping[str, ReplicaSet],
        *,
        interval: float,
        timeout: float,
        clock: Clock,
    ) -> None:
        self._targets: list[tuple[Endpoint, ReplicaSet]] = [
            (endpoint, replica_sets[endpoint.physical])
            for endpoint in topology.endpoints
            if replica_sets[endpoint.physical].replicas
        ]
        self._interval = interval
        self._timeout = timeout
        self._clock = clock

    async def run(self) -> None:
        """Ask until cancelled."""
        async with asyncio.TaskGroup() as group:
            for endpoint, replicas in self._targets:
                group.create_task(self._watch(endpoint, replicas))

    async def _watch(self, endpoint: Endpoint, replicas: ReplicaSet) -> None:
        while True:
            try:
                await self._follow(endpoint, replicas)
            except (psycopg.Error, OSError, TimeoutError) as error:
                _LOG.debug("%s does not answer: %s", endpoint, type(error).__name__)
                now = replicas.now(endpoint)
                if not isinstance(error, PausedError) and not replicas.is_down(now):
                    replicas.failed(now)
            await asyncio.sleep(self._interval * 5)  # nobody is to be flooded with logins

    async def _follow(self, endpoint: Endpoint, replicas: ReplicaSet) -> None:
        connection: AsyncConnection[Any] | None = None
        try:
            async with answered(self._timeout, self._clock):
                connection = await AsyncConnection.connect(
                    autocommit=True,
                    prepare_threshold=None,
                    **{"application_name": "shardkit probe", **libpq_options(endpoint.url)},
                )
                row = await (await connection.execute(_SYSTEM)).fetchone()
            system: int = row[0] if row is not None else 0
            while True:
                at = self._clock.monotonic()
                async with answered(self._timeout, self._clock):
                    state: Any = await (await connection.execute(_STATE)).fetchone()
                now = replicas.now(endpoint)
                replicas.observed(now, _sample(at, system, state))
                replicas.answered(now)
                await asyncio.sleep(self._interval)
        finally:
            if connection is not None:
                connection.pgconn.finish()  # at once: nothing is under way that matters


@asynccontextmanager
async def answered(seconds: float, clock: Clock) -> AsyncIterator[None]:
    """Bound the wait for a server.

    Args:
        seconds: how long at most.
        clock: source of monotonic time.

    Raises:
        PausedError: it took twice as long to notice, so that this process was not running.
        TimeoutError: the server did not answer in time.
    """
    began = clock.monotonic()
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        if clock.monotonic() - began > 2 * seconds:
            raise PausedError from None
        raise


def _sample(
    at: float, system: int, state: tuple[bool, str | None, str | None, str | None]
) -> Sample:
    in_recovery, lsn, received, timeline = state
    position = lsn_of(lsn or "0/0")
    return Sample(
        at,
        system,
        int(timeline, 16) if timeline else None,
        position,
        max(position, lsn_of(received)) if received else position,
        in_recovery,
    )


class Probes(Background):
    """The probes of a `Cluster`: one daemon thread. Thread-safe; a fork starts anew."""

    def __init__(self, topology: Topology, replica_sets: Mapping[str, ReplicaSet], *,
                 interval: float, timeout: float, clock: Clock = SYSTEM) -> None:  # fmt: skip
        prober = _Prober(topology, replica_sets, interval=interval, timeout=timeout, clock=clock)
        super().__init__(prober.run, "shardkit probes")


class AsyncProbes(AsyncBackground):
    """The probes of an `AsyncCluster`: one task of its event loop."""

    def __init__(self, topology: Topology, replica_sets: Mapping[str, ReplicaSet], *,
                 interval: float, timeout: float, clock: Clock = SYSTEM) -> None:  # fmt: skip
        prober = _Prober(topology, replica_sets, interval=interval, timeout=timeout, clock=clock)
        super().__init__(prober.run)
