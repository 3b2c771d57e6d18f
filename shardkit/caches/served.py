"""Runs batches on real servers, from threads: what Memcached and Redis have in common.

All requests to all servers of a call are sent before the first reply is read, so servers work in
parallel without threads. A connection whose replies were not all read is closed, whatever
interrupted it. Nothing waits longer than the deadline of the call, for a connection neither.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Protocol, Unpack

from shardkit.caches.backend import Place, Underway
from shardkit.caches.node import Batch, Node
from shardkit.caches.nodes import Nodes
from shardkit.caches.serving import Given, Serving
from shardkit.caching.operations import UNKNOWN, Answer, Request
from shardkit.forks import ForkSafeLock

__all__ = ["Deadline", "ServedCache", "ServerConnection"]


_MOMENT: Final = 0.01
"""Seconds to read a reply that has arrived while another server was waited for."""


class Deadline:
    """When a call is over. `left` raises `TimeoutError` from then on."""

    __slots__ = ("_at", "_now")

    def __init__(self, seconds: float, now: Callable[[], float]) -> None:
        self._now = now
        self._at = now() + seconds

    def is_after(self, other: Deadline) -> bool:
        """Tell which is later."""
        return self._at > other._at

    def left(self) -> float:
        """Return the seconds that are left, more than 0."""
        left = self._at - self._now()
        if left <= 0:
            raise TimeoutError("the deadline of the call has passed")
        return left


class ServerConnection(Protocol):
    """A connection to one server. What it raises for the server's sake is an `OSError`.

    Attributes:
        is_used: whether it has carried a call before.
    """

    is_used: bool

    def send(self, requests: Sequence[Request], deadline: Deadline) -> None:
        """Send requests; connect first if it is not connected."""

    def receive(self, requests: Sequence[Request], deadline: Deadline) -> list[Answer]:
        """Read the replies to what was sent."""

    def shut(self) -> None:
        """Close it; a later `send` connects anew."""


class _Pool:
    """Connections to one server; at most so many, the last one used first.

    A free place is None. Taking and giving back one is an atomic step of a deque; the lock is for
    those who have to wait (a semaphore would cost a tenth of a hit).
    """

    def __init__(self, connect: Callable[[], ServerConnection], size: int) -> None:
        self._connect = connect
        self._size = size
        self._guard = ForkSafeLock(self._forget)
        self._free: deque[ServerConnection | None] = deque([None] * size)
        self._freed = threading.Condition()
        self._waiting = 0

    def _forget(self) -> None:
        """Run in a forked child: what is open belongs to the parent."""
        free, self._free = self._free, deque([None] * self._size)
        self._freed, self._waiting = threading.Condition(), 0
        for connection in free:
            if connection is not None:
                connection.shut()  # closes the child's copy only

    @property
    def is_warm(self) -> bool:
        """Whether the next connection is open already, as far as anybody knows."""
        try:
            return self._free[-1] is not None
        except IndexError:
            return False

    def acquire(self, deadline: Deadline) -> ServerConnection:
        """Return a connection; `TimeoutError` when none came free in time."""
        try:
            connection = self._free.pop()
        except IndexError:
            connection = self._wait(deadline)
        if connection is not None:
            return connection
        try:
            return self._connect()
        except BaseException:
            self._give(None)
            raise

    def _wait(self, deadline: Deadline) -> ServerConnection | None:
        with self._freed:
            self._waiting += 1
            try:
                while True:
                    try:
                        return self._free.pop()
                    except IndexError:
                        self._freed.wait(deadline.left())
            finally:
                self._waiting -= 1

    def release(self, connection: ServerConnection, *, keep: bool) -> None:
        if keep:
            connection.is_used = True
            self._give(connection)
        else:
            try:
                connection.shut()
            finally:
                self._give(None)

    def _give(self, connection: ServerConnection | None) -> None:
        self._free.append(connection)
        if self._waiting:
            with self._freed:
                self._freed.notify()

    def close(self) -> None:
        """Close the connections that are free."""
        for _ in range(self._size):
            try:
                connection = self._free.popleft()
            except IndexError:
                return
            if connection is not None:
                connection.shut()
            self._give(None)


class ServedCache(Serving):
    """A backend over servers; see `shardkit.caches.backend.Backend`.

    Args:
        servers: their names.
        connect: makes a connection to one; opens nothing yet.
        options: see `serving.Options`.
    """

    def __init__(
        self,
        servers: Sequence[str],
        connect: Callable[[Node], ServerConnection],
        **options: Unpack[Given],
    ) -> None:
        super().__init__(servers, **options)
        self._connect = connect
        self._pools: dict[Node, _Pool] = {}

    def run(self, requests: Sequence[Request], *, place: Place = Place.USUAL) -> list[Answer]:
        """Carry out requests on different keys; answer them in their order."""
        batches, answers = self.nodes.plan(requests, place)
        self._carry(batches, answers, Deadline(self.seconds, self.now))
        if len(answers) > len(requests):
            answers.pop()
        return answers

    def start(self, requests: Sequence[Request]) -> Underway:
        """Send requests on different keys, whose answers are wanted later."""
        batches, answers = self.nodes.plan(requests)
        waiting = self._sent(batches, Deadline(self.seconds, self.now))
        return _Underway(waiting, answers, len(requests), self.now)

    def asks(self, node: Node, requests: Sequence[Request]) -> list[Answer]:
        """Carry out requests on one server, whatever it is asked usually."""
        answers = [UNKNOWN] * len(requests)
        batches = self.nodes.planned_at(node, requests)
        self._carry(batches, answers, Deadline(self.seconds, self.now))
        return answers

    def _carry(self, batches: Sequence[Batch], answers: list[Answer], deadline: Deadline) -> None:
        """Send batches, all before the first reply is read, and put the answers in their places."""
        if len(batches) == 1:  # nearly always
            exchange = _Exchange(self.nodes, batches[0], deadline)
            try:
                if exchange.begin(self._pool(batches[0].node)):
                    exchange.finish(answers)
            except BaseException:
                exchange.abandon()
                raise
            return
        _read(self._sent(batches, deadline), answers, self.now)

    def _sent(self, batches: Sequence[Batch], deadline: Deadline) -> deque[_Exchange]:
        """Send batches; return those that are to be answered."""
        waiting: deque[_Exchange] = deque()
        # A server that does not answer must not cost the others theirs: of a server that stands
        # still, connecting takes all the time there is. So connections that are open come first.
        planned = deque(sorted(batches, key=lambda batch: not self._pool(batch.node).is_warm))
        try:
            while planned:
                waiting.append(exchange := _Exchange(self.nodes, planned[0], deadline))
                planned.popleft()
                if not exchange.begin(self._pool(exchange.node)):
                    waiting.pop()
        except BaseException:
            for exchange in waiting:
                exchange.abandon()
            for batch in planned:
                self.nodes.abandoned(batch)
            raise
        return waiting

    def close(self) -> None:
        """Close every connection; later calls open new ones."""
        for pool in list(self._pools.values()):
            pool.close()

    def _pool(self, node: Node) -> _Pool:
        pool = self._pools.get(node)
        if pool is None:
            made = _Pool(lambda: self._connect(node), self.connections)
            pool = self._pools.setdefault(node, made)
        return pool


def _read(waiting: deque[_Exchange], answers: list[Answer], now: Callable[[], float]) -> None:
    """Read the replies to what was sent.

    Whoever comes after the deadline is still given a moment: its reply is here by now.
    """
    try:
        while waiting:
            waiting[0].waits_from(now(), Deadline(_MOMENT, now))
            waiting[0].finish(answers)
            waiting.popleft()
    finally:
        for exchange in waiting:  # interrupted: nobody will read these replies
            exchange.abandon()


class _Underway:
    """Requests that were sent; see `backend.Underway`."""

    __slots__ = ("_answers", "_n", "_now", "_waiting")

    def __init__(
        self,
        waiting: deque[_Exchange],
        answers: list[Answer],
        n: int,
        now: Callable[[], float],
    ) -> None:
        self._waiting = waiting
        self._answers = answers
        self._n = n
        self._now = now

    def answers(self) -> list[Answer]:
        """Read the answers; to be called once."""
        waiting, self._waiting = self._waiting, deque()
        _read(waiting, self._answers, self._now)
        return self._answers[: self._n]

    def __del__(self) -> None:
        for exchange in self._waiting:  # nobody wants to know: its connection is no more in order
            exchange.abandon()


class _Exchange:
    """One batch on its way: requests sent, replies to be read."""

    __slots__ = ("_batch", "_connection", "_deadline", "_nodes", "_pool")

    def __init__(self, nodes: Nodes, batch: Batch, deadline: Deadline) -> None:
        self._nodes = nodes
        self._batch = batch
        self._deadline = deadline
        self._pool: _Pool | None = None
        self._connection: ServerConnection | None = None

    def begin(self, pool: _Pool) -> bool:
        """Send the requests; return whether there are replies to read."""
        try:
            connection = pool.acquire(self._deadline)
        except TimeoutError:  # this program's own limit: no fault of the server
            self._nodes.abandoned(self._batch)
            return False
        self._pool, self._connection = pool, connection
        try:
            connection.send(self._batch.requests, self._deadline)
        except OSError as error:
            if not self._sent_again(connection, error):
                return self._failed(error)
        return True

    def finish(self, answers: list[Answer]) -> None:
        """Read the replies and put the answers in their places."""
        batch, connection = self._batch, self._connection
        assert connection is not None
        assert self._pool is not None
        try:
            try:
                answered = connection.receive(batch.requests, self._deadline)
            except ConnectionError as error:
                if not self._sent_again(connection, error):
                    raise
                answered = connection.receive(batch.requests, self._deadline)
        except OSError as error:
            self._failed(error)
            return
        self._connection = None
        self._pool.release(connection, keep=True)
        self._nodes.succeeded(batch, answered)
        for index, answer in zip(batch.at, answered, strict=True):
            answers[index] = answer

    @property
    def node(self) -> Node:
        """The server."""
        return self._batch.node

    def waits_from(self, now: float, at_least: Deadline) -> None:
        """Count its time from now on: until now others were waited for."""
        self._batch.began = now
        if at_least.is_after(self._deadline):
            self._deadline = at_least

    def abandon(self) -> None:
        """Close the connection: its replies will not be read."""
        self._nodes.abandoned(self._batch)
        if self._connection is not None and self._pool is not None:
            self._pool.release(self._connection, keep=False)
            self._connection = None

    def _sent_again(self, connection: ServerConnection, error: OSError) -> bool:
        """Send everything on a new connection, once, if this one may just have been idle too long.

        A server that was restarted has closed idle connections. What it did before, it did before
        it closed them, and every operation may be done twice: the second time it differs.
        """
        if not connection.is_used or isinstance(error, TimeoutError):
            return False
        connection.shut()
        connection.is_used = False
        try:
            connection.send(self._batch.requests, self._deadline)
        except OSError:
            return False
        return True

    def _failed(self, error: OSError) -> bool:
        assert self._connection is not None
        assert self._pool is not None
        self._pool.release(self._connection, keep=False)
        self._connection = None
        self._nodes.failed(self._batch, error)
        return False
