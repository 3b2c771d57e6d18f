"""A TCP link that breaks on demand: stands between clients and one real server.

    with FaultProxy(url.host, url.port) as proxy:
        through = reroute(topology, {endpoint: proxy})   # the same cluster by way of the proxy
        proxy.shape(latency=0.05)                        # slow, from now on, old connections too
        proxy.on("^COMMIT", Fault.RESET, nth=3, when=When.AFTER)

One proxy is one link: an event loop in a daemon thread, so that it works beside threads, asyncio
and nothing at all. Every method may be called from any thread and has taken effect when it
returns. `heal` undoes everything. A program's tests use it, and so do benchmarks, which count
round trips with it (`counts`).

What it cannot do: a proxy always accepts a TCP connection before it knows whether its server
does, so that a dead server behind it looks like a connection that is reset at once; use `refuse`
for a refusal. Nothing here needs privileges, and nothing is lost below TCP.
"""

from __future__ import annotations

import asyncio
import random
import socket
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal, Protocol, Self, TypeVar

from shardkit.testing.faults import BOTH, Counts, Fault, Shape, Trigger, Way, When
from shardkit.testing.link import Link
from shardkit.testing.wire import Message, PostgresConversation, TcpConversation
from shardkit.topology import Endpoint, Topology

__all__ = ["FaultProxy", "reroute"]

T = TypeVar("T")

_REMEMBERED = 10_000
_CALL_TIMEOUT = 20.0
_LOOPBACK = "127.0.0.1"
_BACKLOG = 100


class Address(Protocol):
    """Where a link listens, be it in this process or another."""

    @property
    def host(self) -> str:
        """Name or number of the machine."""

    @property
    def port(self) -> int:
        """TCP port."""


class FaultProxy:
    """One link with faults; see the text of the module.

    Attributes:
        host: where clients connect.
        port: where clients connect; the same one from `start` to `stop`.
        server: address of the server.
        shapes: how each direction delays.
        black: directions in which everything is lost.
        flowing: directions that are not stalled; of its own event loop.

    *Invariant:* after `stop` no thread, socket or connection of it is left.
    """

    def __init__(
        self,
        host: str | None,
        port: int | None,
        *,
        protocol: Literal["postgresql", "tcp"] = "postgresql",
        seed: int = 0,
    ) -> None:
        """Describe a link; nothing is opened.

        Args:
            host: of the server; None for this machine.
            port: of the server; None for 5432.
            protocol: `tcp` for Redis, Memcached and all else: every piece that a client sends is
                a message, its text the bytes as Latin-1.
            seed: of the jitter.
        """
        self.host = _LOOPBACK
        self.port = 0
        self.server = (host or _LOOPBACK, port or 5432)
        self._conversation = PostgresConversation if protocol == "postgresql" else TcpConversation
        self._random = random.Random(seed)  # noqa: S311  jitter, repeatable
        self.shapes = dict.fromkeys(Way, Shape())
        self.black: set[Way] = set()
        self.flowing = {way: asyncio.Event() for way in Way}
        self._triggers: list[Trigger] = []
        self._counts = Counts()
        self._statements: deque[str] = deque(maxlen=_REMEMBERED)
        self._errors: list[BaseException] = []
        self._links: dict[Link, asyncio.Task[None]] = {}
        self._socket: socket.socket | None = None
        self._listener: socket.socket | None = None
        self._opening: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="shardkit-fault-proxy", daemon=True
        )

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listen on a free port; once only."""
        # Bound by its number: only then Linux keeps it while nobody listens (see `refuse`).
        with socket.create_server((_LOOPBACK, 0)) as found:
            self.port = found.getsockname()[1]
        self._socket = socket.create_server((_LOOPBACK, self.port))
        self._thread.start()
        self._call(self._heal())

    def stop(self) -> None:
        """End every connection and the thread.

        Raises:
            Exception: what a function given to `on` raised, if any did.
        """
        if not self._thread.is_alive():
            return
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CALL_TIMEOUT)
        self._loop.close()
        if self._socket is not None:
            self._socket.close()
        for error in (*(t.error for t in self._triggers), *self._errors):
            if error is not None:
                raise error

    # -- lasting conditions, until `heal`

    def shape(
        self,
        *ways: Way,
        latency: float = 0.0,
        jitter: float = 0.0,
        bandwidth: float | None = None,
        slice_bytes: int | None = None,
        stumbles: float = 0.0,
        stumble: float = 0.0,
    ) -> None:
        """Delay bytes from now on, in both directions or in the named ones; see `Shape`."""
        shape = Shape(latency, jitter, bandwidth, slice_bytes, stumbles, stumble)
        self._do(lambda: self.shapes.update(dict.fromkeys(ways or BOTH, shape)))

    def black_hole(self, *ways: Way) -> None:
        """Accept everything and lose it, in both directions or in the named ones.

        Connections stay open. Those that lost something are reset by `heal`.
        """
        self._do(lambda: self.black.update(ways or BOTH))

    def stall(self, *ways: Way) -> None:
        """Let nothing through and lose nothing, as a network that is cut does for a while."""
        self._call(self._stall(ways or BOTH))

    def refuse(self) -> None:
        """Refuse new connections and reset the present ones, as a machine without the server."""
        self._call(self._refuse())

    def heal(self) -> None:
        """Undo every condition, forget every trigger, release what is held, and accept again."""
        self._call(self._heal())

    # -- faults of the present connections

    def reset(self) -> None:
        """Reset every present connection, on both sides."""
        self._call(self._break(Fault.RESET))

    def half_open(self) -> None:
        """Tell the server that every present client is gone, and the clients nothing."""
        self._call(self._break(Fault.HALF_OPEN))

    # -- triggers and counts

    def on(
        self,
        pattern: str,
        fault: Fault | float | Callable[[], object],
        *,
        nth: int = 1,
        times: int | None = 1,
        when: When = When.BEFORE,
    ) -> Trigger:
        """Do something when a client sends a message.

        Args:
            pattern: a regular expression, searched in the SQL of simple queries and of executed
                statements, also of those prepared before; upper and lower case are the same.
            fault: what happens; a number is seconds to wait; a function is run, in a thread, while
                the message waits (`lambda: local.kill_server("alpha_0")`).
            nth: which message that matches, from 1, counted over all connections.
            times: how many of those from the nth on; None for all.
            when: before the server hears it, or after it has answered. What PostgreSQL answers up
                to one Sync is one answer.

        Returns:
            The trigger: wait for it, release it.
        """

        async def add() -> Trigger:
            trigger = Trigger(self._loop, pattern, fault, nth=nth, times=times, when=when)
            self._triggers.append(trigger)
            return trigger

        return self._call(add())

    @property
    def counts(self) -> Counts:
        """What went over the link so far."""
        return self._do(lambda: self._counts)

    @property
    def open_connections(self) -> int:
        """Connections that clients have open."""
        return self._do(lambda: len(self._links))

    @property
    def statements(self) -> list[str]:
        """SQL of the statements that ran, in order: the last 10,000; commands for other servers."""
        return self._do(lambda: list(self._statements))

    def forget(self) -> None:
        """Begin to count anew."""

        def clear() -> None:
            self._counts = Counts()
            self._statements.clear()

        self._do(clear)

    # -- in the thread of the event loop

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_CALL_TIMEOUT)

    def _do(self, work: Callable[[], T]) -> T:
        async def run() -> T:
            return work()

        return self._call(run())

    def _accept(self, listener: socket.socket) -> None:
        with suppress(BlockingIOError, ConnectionAbortedError):  # the client has gone
            client, _ = listener.accept()
            self.count(connections=1)
            client.settimeout(0.0)
            task = self._loop.create_task(self._open(client))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def _open(self, client: socket.socket) -> None:
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await self._loop.connect_accepted_socket(lambda: protocol, client)
        writer = asyncio.StreamWriter(transport, protocol, reader, self._loop)
        link = Link(self, self._conversation(), reader, writer)
        self._links[link] = asyncio.create_task(self._carry(link))

    async def _carry(self, link: Link) -> None:
        await link.run()
        self._errors += link.errors
        del self._links[link]

    async def _stall(self, ways: Iterable[Way]) -> None:
        for way in ways:
            self.flowing[way].clear()

    async def _break(self, fault: Fault) -> None:
        for link in list(self._links):
            link.suffer(fault)

    def _listen(self) -> None:
        # A copy: the socket itself keeps the port while nobody listens. Not a server of asyncio:
        # one that is closed while it accepts a connection leaves that one open.
        assert self._socket is not None
        self._listener = self._socket.dup()
        self._listener.settimeout(0.0)
        self._listener.listen(_BACKLOG)
        self._loop.add_reader(self._listener, self._accept, self._listener)

    async def _refuse(self) -> None:
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        with suppress(OSError):
            assert self._socket is not None
            self._socket.shutdown(socket.SHUT_RDWR)  # Linux: bound, and no longer listening
        await asyncio.gather(*self._opening, return_exceptions=True)
        await self._end(list(self._links))

    async def _heal(self) -> None:
        for trigger in self._triggers:
            trigger.is_over = True
            trigger.released.set()
        self.shapes = dict.fromkeys(Way, Shape())
        self.black.clear()
        for flowing in self.flowing.values():
            flowing.set()
        await self._end([link for link in self._links if link.has_lost])
        for link in self._links:
            link.black.clear()
        if self._listener is None:
            self._listen()

    async def _close(self) -> None:
        await self._refuse()
        await self._loop.shutdown_default_executor()

    async def _end(self, links: list[Link]) -> None:
        tasks = [self._links[link] for link in links]
        for link in links:
            link.suffer(Fault.RESET)
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- for its links

    def count(self, **more: int) -> None:
        """Add to the counts."""
        sums = {name: getattr(self._counts, name) + n for name, n in more.items()}
        self._counts = replace(self._counts, **sums)

    def note(self, message: Message) -> None:
        """Count a message."""
        if message.kind == "startup":
            self.count(logins=message.raw[4:6] == b"\0\3")
        elif message.answer > 0:
            self.count(messages=1, statements=message.is_statement)
        if message.is_statement:
            self._statements.append(message.text or "")

    def delay(self, way: Way) -> float:
        """Return how many seconds a piece is to be under way."""
        shape = self.shapes[way]
        late = shape.stumble if self._random.random() < shape.stumbles else 0.0
        return shape.latency + self._random.uniform(0, shape.jitter) + late

    def watching(self, message: Message) -> Trigger | None:
        """Return the trigger that a message sets off, if any; every trigger counts it."""
        hit = [trigger for trigger in self._triggers if trigger.matches(message)]
        return hit[0] if hit else None


def reroute(topology: Topology, proxies: Mapping[Endpoint, Address]) -> Topology:
    """Return a topology in which some endpoints are reached through proxies, readers included.

    Admin logins still go straight to their servers.

    Args:
        topology: of the real servers.
        proxies: started, by the endpoint of `topology` that each stands in front of.
    """

    def through(endpoint: Endpoint) -> Endpoint:
        proxy = proxies.get(endpoint)
        if proxy is None:
            return endpoint
        url, reads = endpoint.url, endpoint.read_url
        return replace(
            endpoint,
            url=url.set(host=proxy.host, port=proxy.port),
            read_url=None if reads is None else reads.set(host=proxy.host, port=proxy.port),
        )

    physical = {
        name: replace(
            shard,
            primary=through(shard.primary),
            replicas=tuple(through(replica) for replica in shard.replicas),
        )
        for name, shard in topology.physical.items()
    }
    return Topology(topology.name, physical, topology.shard_map)
