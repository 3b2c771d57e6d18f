"""Memcached for threads: pymemcache's connections, meta commands, one round trip per server.

    cache = Memcached(["10.0.0.1:11211", "10.0.0.2:11211"], gutter=["10.0.0.9:11211"])

All requests to all servers of a call are sent before the first reply is read, so servers work in
parallel without threads. A connection whose replies were not all read is closed, whatever
interrupted it. Nothing waits longer than the deadline of the call, not for a connection either.
"""

from __future__ import annotations

import secrets
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from pymemcache.client.base import Client

from shardkit.caches.backend import DEADLINE, Place
from shardkit.caches.meta import Life, ProtocolViolation, Replies, answers_of, hello, render
from shardkit.caches.nodes import CACHE_RULES, Batch, Nodes
from shardkit.caching.operations import Answer, Request
from shardkit.clock import SYSTEM, Clock
from shardkit.forks import ForkSafeLock
from shardkit.windows import BreakerRules

__all__ = ["Memcached", "split_address"]

_PIECE: Final = 65536
_FLUSH_TIME: Final = 1.0


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of `host:port`; without a port, 11211."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return address.strip("[]"), 11211
    return host.strip("[]"), int(port)


class _Connection(Client):  # type: ignore[misc]  # ships no types for what is used here
    """A pymemcache client that speaks the meta protocol.

    Attributes:
        life: of the server, as of when it connected.
        is_used: whether it has carried a call before.
    """

    def __init__(self, name: str, timeout: float) -> None:
        super().__init__(
            split_address(name), connect_timeout=timeout, timeout=timeout, no_delay=True
        )
        self.name = name
        self.life: Life | None = None
        self.is_used = False

    def open(self, deadline: float, now: Callable[[], float]) -> Life:
        """Connect if it is not, and learn which life of the server this is."""
        if self.life is None:
            self.connect_timeout = _left(deadline, now)
            self._connect()
            self.send(hello(secrets.token_hex(8).encode()))
            replies = self.receive(2, deadline, now)
            if replies[1].code != b"VA" or not replies[1].data:
                raise ProtocolViolation("the server keeps nothing")
            self.life = Life(self.name, replies[1].data)
        return self.life

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def receive(self, n: int, deadline: float, now: Callable[[], float]) -> list[Any]:
        replies = Replies(n)
        sock = self.sock
        while not replies.is_complete:
            sock.settimeout(_left(deadline, now))
            data = sock.recv(_PIECE)
            if not data:
                raise ConnectionResetError("the server closed the connection")
            replies.feed(data)
        return replies.replies

    def shut(self) -> None:
        self.life = None
        self.close()


class _Pool:
    """Connections to one server; at most so many, the last one used first."""

    def __init__(self, name: str, size: int, timeout: float) -> None:
        self._name = name
        self._size = size
        self._timeout = timeout
        self._guard = ForkSafeLock(self._forget)
        self._free: deque[_Connection] = deque()
        self._slots = threading.BoundedSemaphore(size)

    def _forget(self) -> None:
        """Run in a forked child: what is open belongs to the parent."""
        for connection in self._free:
            connection.shut()  # closes the child's copy only
        self._free = deque()
        self._slots = threading.BoundedSemaphore(self._size)

    def acquire(self, timeout: float) -> _Connection | None:
        """Return a connection, or None when none came free in time."""
        slots = self._slots
        if not slots.acquire(blocking=False) and not slots.acquire(timeout=max(0.0, timeout)):
            return None
        try:
            return self._free.pop()
        except IndexError:
            return _Connection(self._name, self._timeout)

    def release(self, connection: _Connection, *, keep: bool) -> None:
        if keep:
            connection.is_used = True
            self._free.append(connection)
        else:
            connection.shut()
        self._slots.release()

    def close(self) -> None:
        while self._free:
            self._free.pop().shut()


class Memcached:
    """A static ring of Memcached servers.

    Args:
        servers: as `host:port`; the same list, in any order, in every process.
        gutter: servers that stand in, for seconds, for those that are left alone.
        deadline: seconds a call may take.
        connections: most connections to each server.
        rules: of the breakers.
        clock: source of time.
        on_dirty: called with the name of a server that has become dirty.
    """

    def __init__(
        self,
        servers: Sequence[str],
        *,
        gutter: Sequence[str] = (),
        deadline: float = DEADLINE,
        connections: int = 32,
        rules: BreakerRules = CACHE_RULES,
        clock: Clock = SYSTEM,
        on_dirty: Callable[[str], None] | None = None,
    ) -> None:
        self.nodes = Nodes(servers, gutter=gutter, rules=rules, clock=clock, on_dirty=on_dirty)
        self._deadline = deadline
        self._now = clock.monotonic
        everybody = (*self.nodes.homes, *self.nodes.gutter)
        self._pools = {node: _Pool(node.name, connections, deadline) for node in everybody}

    @property
    def has_gutter(self) -> bool:
        """Whether there is a gutter to repair, too."""
        return bool(self.nodes.gutter)

    @property
    def dirty(self) -> frozenset[str]:
        """Names of the servers that nobody reads for now."""
        return self.nodes.dirty

    def home(self, key: str) -> str:
        """Return the name of the server that a key belongs to."""
        return self.nodes.home(key).name

    def run(self, requests: Sequence[Request], *, place: Place = Place.USUAL) -> list[Answer]:
        """Carry out requests on different keys; answer them in their order."""
        batches, answers = self.nodes.plan(requests, place)
        deadline = self._now() + self._deadline
        waiting: deque[_Exchange] = deque()
        try:
            for batch in batches:
                waiting.append(exchange := _Exchange(self, batch, deadline))
                if not exchange.begin():
                    waiting.pop()
            while waiting:
                waiting[0].finish(answers)
                waiting.popleft()
        finally:
            for exchange in waiting:  # interrupted: nobody will read these replies
                exchange.abandon()
        return answers

    def readmit(self, name: str) -> None:
        """Read a server again: everything it missed has been repaired there."""
        self.nodes.named(name).is_dirty = False

    def flush(self, name: str) -> bool:
        """Empty a server and read it again; return whether it answered."""
        node = self.nodes.named(name)
        connection = _Connection(name, _FLUSH_TIME)
        try:
            connection.flush_all(noreply=False)
        except (OSError, EOFError, ValueError):
            return False
        except Exception:  # noqa: BLE001  pymemcache's own errors: the server said no
            return False
        finally:
            connection.shut()
        node.is_dirty = False
        return True

    def close(self) -> None:
        """Close every connection; later calls open new ones."""
        for pool in self._pools.values():
            pool.close()


class _Exchange:
    """One batch on its way: requests sent, replies to be read."""

    __slots__ = ("_batch", "_cache", "_connection", "_deadline", "_is_over", "_sent")

    def __init__(self, cache: Memcached, batch: Batch, deadline: float) -> None:
        self._cache = cache
        self._batch = batch
        self._deadline = deadline
        self._connection: _Connection | None = None
        self._sent: list[int] = []
        self._is_over = False

    def begin(self) -> bool:
        """Send the requests; return whether there are replies to read."""
        cache = self._cache
        pool = cache._pools[self._batch.node]
        connection = pool.acquire(self._deadline - cache._now())
        if connection is None:  # this program's own limit: no fault of the server
            cache.nodes.abandoned(self._batch)
            self._is_over = True
            return False
        self._connection = connection
        try:
            self._send(connection)
        except OSError as error:
            if not (connection.is_used and self._reconnect(error)):
                self._fail(error)
                return False
        return True

    def finish(self, answers: list[Answer]) -> None:
        """Read the replies and put the answers in their places."""
        cache, batch, connection = self._cache, self._batch, self._connection
        assert connection is not None
        try:
            try:
                replies = connection.receive(len(self._sent), self._deadline, cache._now)
            except ConnectionError as error:
                # A server that was restarted has closed idle connections. What it may have done
                # already it did before it closed; every operation may be done twice.
                if not (connection.is_used and self._reconnect(error)):
                    raise
                replies = connection.receive(len(self._sent), self._deadline, cache._now)
        except OSError as error:
            self._fail(error)
            return
        life = connection.life
        assert life is not None
        self._is_over = True
        cache._pools[batch.node].release(connection, keep=True)
        cache.nodes.succeeded(batch)
        answered = answers_of(batch.requests, self._sent, replies, life)
        for index, answer in zip(batch.at, answered, strict=True):
            answers[index] = answer

    def abandon(self) -> None:
        """Close the connection: its replies will not be read."""
        if not self._is_over:
            self._is_over = True
            self._cache.nodes.abandoned(self._batch)
            if self._connection is not None:
                self._cache._pools[self._batch.node].release(self._connection, keep=False)

    def _send(self, connection: _Connection) -> None:
        life = connection.open(self._deadline, self._cache._now)
        data, self._sent = render(self._batch.requests, life)
        if data:
            connection.sock.settimeout(_left(self._deadline, self._cache._now))
            connection.send(data)

    def _reconnect(self, error: OSError) -> bool:
        """Send everything again on a new connection; return whether that worked."""
        connection = self._connection
        assert connection is not None
        if isinstance(error, (TimeoutError, ProtocolViolation)):
            return False
        connection.shut()
        connection.is_used = False
        try:
            self._send(connection)
        except OSError:
            return False
        return True

    def _fail(self, error: OSError) -> None:
        self._is_over = True
        assert self._connection is not None
        self._cache._pools[self._batch.node].release(self._connection, keep=False)
        self._cache.nodes.failed(self._batch, error)


def _left(deadline: float, now: Callable[[], float]) -> float:
    left = deadline - now()
    if left <= 0:
        raise TimeoutError("the deadline of the call has passed")
    return left


