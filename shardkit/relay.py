"""The relay: delivers what is in the outboxes to handlers, at least once and in order by key.

One thread for each physical shard claims, has events handled and finishes them; as many relays
as you like share the work, in one process or in many, and any of them may be killed at any point.
Writers wake a relay that sleeps, where its connection is direct; everywhere it also looks by
itself. Claims are `shardkit.batches`, threads and deadlines `shardkit.delivery`.
Source: docs/outbox.md.

    relay = Relay(cluster)

    @relay.on("follow.added")
    def add_inverse(event): ...

    relay.run()                       # or: shardkit outbox relay --app module:relay
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any, Final, Self, TypeVar

from sqlalchemy.exc import SQLAlchemyError

from shardkit.cacheable import CHANGED
from shardkit.cacherepairs import PATIENCE, REPAIR_BATCH, CacheRepairs
from shardkit.clock import SYSTEM, Clock
from shardkit.cluster import AsyncCluster, Cluster
from shardkit.connections import Connections
from shardkit.delivery import Handler
from shardkit.errors import ConfigurationError, ShardkitError
from shardkit.outbox import Backoff
from shardkit.relayserver import RelayServer
from shardkit.releases import RELEASE_BATCH, Releases
from shardkit.topology import Topology
from shardkit.twophase import resolve
from shardkit.uniques import GIVEN_UP

__all__ = ["Relay"]

_LOG: Final = logging.getLogger(__name__)
F = TypeVar("F", bound=Callable[[Any], Any])

_DRAINING = 2.0
"""Seconds to wait for servers of the cache where nobody comes back to what they left."""

_RESOLVING_PAUSE = 1.0
"""Seconds between two looks for commits over several servers that nobody ends."""


class Relay:
    """Delivers events to handlers.

    Handlers are called at least once for each event; `shardkit.outbox.once` makes an effect that
    a database holds happen exactly once. What a handler raises, or does not finish before its
    deadline, is tried again after a pause; meanwhile later events of its key wait and all others
    go on. After the last attempt, and for a topic without handler, it becomes a dead letter.

    Args:
        cluster: whose outboxes; handlers bring their own sessions.
        handlers: by topic; more are added with `on`.
        batch: events claimed at once on a physical shard.
        threads: handlers that run at once for each physical shard.
        lease: seconds after which the events of a relay that is frozen go to another one; those
            of one that was killed go at once, where connections are direct.
        deadline: seconds a handler may take.
        backoff: pauses between attempts, and their number.
        poll: seconds between looks when nothing notifies.
        retention: seconds for which notes of effects are kept, at least; longer than an event may
            lie around before it is delivered again.
        clock: source of monotonic time.

    Raises:
        ConfigurationError: a number is out of range.
    """

    def __init__(
        self,
        cluster: Cluster | AsyncCluster,
        handlers: Mapping[str, Callable[[Any], Any]] | None = None,
        *,
        batch: int = 500,
        threads: int = 1,
        lease: float = 15.0,
        deadline: float = 30.0,
        backoff: Backoff | None = None,
        poll: float = 0.1,
        retention: float = 7 * 86_400.0,
        clock: Clock = SYSTEM,
    ) -> None:
        if not (batch >= 1 and 1 <= threads <= 256 and lease >= 0.1 and deadline > 0 and poll > 0):
            raise ConfigurationError(
                "a relay needs batch ≥ 1, threads from 1 to 256, lease ≥ 0.1 s, "
                "deadline and poll above 0 s"
            )
        self.cluster = cluster
        self.handlers = {topic: Handler(call) for topic, call in (handlers or {}).items()}
        self.repairs = CacheRepairs(cluster.connections.cache_config, cluster.connections)
        self.handlers[CHANGED] = Handler(self.repairs, REPAIR_BATCH, returns_left=True)
        self._releases = Releases(cluster.connections)
        self.handlers[GIVEN_UP] = Handler(self._releases, RELEASE_BATCH)
        self.batch = batch
        self.threads = threads
        self.lease = lease
        self.deadline = deadline
        self.backoff = backoff or Backoff()
        self.poll = poll
        self.retention = retention
        self.clock = clock
        self.step: Callable[[str], None] = lambda _point: None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def on(self, topic: str, *, batch: int = 0) -> Callable[[F], F]:
        """Make a function the handler of a topic; an `async def` is awaited.

        Args:
            topic: of the events.
            batch: give it lists of up to so many events, of one logical shard and in order;
                when it raises, each is tried alone. 0 gives it one event at a time.

        Raises:
            ConfigurationError: the topic has a handler already.
        """

        def register(call: F) -> F:
            if topic in self.handlers:
                raise ConfigurationError(f"topic {topic!r} has a handler already")
            self.handlers[topic] = Handler(call, batch)
            return call

        return register

    def run(
        self, stop: threading.Event | None = None, *, loop: asyncio.AbstractEventLoop | None = None
    ) -> None:
        """Deliver until told to stop; what has been begun is finished.

        Args:
            stop: ends it when set; None leaves that to `stop()`.
            loop: where handlers that are awaited run; None makes one.

        Raises:
            HandlerStuckError: too many handlers never ended: start the process anew.
        """
        self._run(stop or self._stop, loop=loop, until_empty=False)

    def drain(self) -> int:
        """Deliver until nothing is due, and return how many events were delivered.

        Leaves what is paused, and what another relay holds.

        Raises:
            EndpointUnavailableError: a server does not answer (retryable).
            HandlerStuckError: too many handlers never ended.
        """
        return self._run(threading.Event(), loop=None, until_empty=True)

    async def run_async(self, stop: threading.Event | None = None) -> None:
        """Deliver until told to stop; handlers that are awaited run on this event loop."""
        loop = asyncio.get_running_loop()
        try:
            await asyncio.to_thread(self.run, stop, loop=loop)
        finally:
            (stop or self._stop).set()

    def stop(self) -> None:
        """Have `run` end after what it has begun."""
        self._stop.set()

    def __enter__(self) -> Self:
        """Deliver in a thread of its own."""
        self._stop.clear()
        self._thread = threading.Thread(target=self.run, name="shardkit relay", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(
        self, stop: threading.Event, *, loop: asyncio.AbstractEventLoop | None, until_empty: bool
    ) -> int:
        topology = self.cluster.topology
        self.repairs.patience = _DRAINING if until_empty else PATIENCE
        servers = [RelayServer(self, shard, stop, loop) for shard in topology.physical.values()]
        work = [s.drain if until_empty else s.serve for s in servers]
        threads = [
            threading.Thread(target=_kept, args=pair) for pair in zip(work, servers, strict=True)
        ]
        if not until_empty:
            threads.append(threading.Thread(target=_resolve, args=(topology, stop)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.repairs.close()
        self._releases.close()
        for server in servers:
            if server.error is not None:
                raise server.error
        return sum(server.delivered for server in servers)


def _resolve(topology: Topology, stop: threading.Event) -> None:
    """End what commits over several servers have left in doubt, now and then, until told to stop.

    With connections of its own: a relay of an asyncio cluster has no loop in this thread.
    """
    servers = Connections(topology)
    try:
        while not stop.wait(_RESOLVING_PAUSE):
            try:
                done = resolve(servers, topology.physical)
            except (ShardkitError, SQLAlchemyError) as error:
                _LOG.warning("what is in doubt stays so: %s", error)
            else:
                for settled in done.settled:
                    _LOG.info("%s ended: %s", settled.gid, settled.outcome)
    finally:
        servers.close()


def _kept(work: Callable[[], None], server: RelayServer) -> None:
    """Run the loop of a server and keep what it raises; the others then end too."""
    try:
        work()
    except BaseException as error:  # noqa: BLE001 - raised again where `run` was called
        server.error = error
        server.stop.set()
    finally:
        server.close()
