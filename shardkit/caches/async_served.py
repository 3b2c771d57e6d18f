"""Runs batches on real servers, from asyncio: the twin of `served`.

One object may serve several event loops; each has connections of its own. The deadline of a call is
counted in ticks, for what a busy loop does meanwhile is no time that a server took: an answer that
has arrived would not be read, and the lease in it would keep everybody else waiting.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Final, Protocol, Unpack
from weakref import WeakKeyDictionary

from shardkit.caches.backend import Place
from shardkit.caches.node import Batch, Node
from shardkit.caches.serving import Given, Serving
from shardkit.caching.operations import Answer, Request

__all__ = ["AsyncServedCache", "AsyncServerConnection"]


_TICKS: Final = 10
"""Turns of a busy loop that a call gets at least: to connect, to be greeted and to ask take six."""


class AsyncServerConnection(Protocol):
    """A connection to one server. What it raises for the server's sake is an `OSError`.

    Attributes:
        is_used: whether it has carried a call before.
    """

    is_used: bool

    async def exchange(self, requests: Sequence[Request]) -> list[Answer]:
        """Send requests and read the replies; connect first if it is not connected."""

    def shut(self) -> None:
        """Close it at once; a later `exchange` connects anew."""


class _Limit:
    """Ends an exchange at a point in time, and not before so many turns of the loop."""

    def __init__(self, until: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._each = max(0.0, until - self._loop.time()) / _TICKS
        self._left = _TICKS
        self._timeout = asyncio.timeout(None)
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()
        self._timer = self._loop.call_later(self._each, self._tick)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._timer is not None, "it was entered"
        self._timer.cancel()
        await self._timeout.__aexit__(kind, error, trace)  # raises what it has to say

    def _tick(self) -> None:
        self._left -= 1
        if self._left:
            self._timer = self._loop.call_later(self._each, self._tick)
        else:
            self._timeout.reschedule(self._loop.time())


class _Pool:
    def __init__(self, size: int) -> None:
        self.free: deque[AsyncServerConnection] = deque()
        self.slots = asyncio.Semaphore(size)


class AsyncServedCache(Serving):
    """A backend over servers; see `shardkit.caches.backend.AsyncBackend`.

    Args:
        servers: their names.
        connect: makes a connection to one; opens nothing yet.
        options: see `serving.Options`.
    """

    def __init__(
        self,
        servers: Sequence[str],
        connect: Callable[[Node], AsyncServerConnection],
        **options: Unpack[Given],
    ) -> None:
        super().__init__(servers, **options)
        self._connect = connect
        self._pools: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Node, _Pool]]
        self._pools = WeakKeyDictionary()

    async def run(self, requests: Sequence[Request], *, place: Place = Place.USUAL) -> list[Answer]:
        """Carry out requests on different keys; answer them in their order."""
        batches, answers = self.nodes.plan(requests, place)
        await self._carry(batches, answers, asyncio.get_running_loop().time() + self.seconds)
        if len(answers) > len(requests):
            answers.pop()
        return answers

    async def _carry(self, batches: Sequence[Batch], answers: list[Answer], until: float) -> None:
        """Send batches at once and put the answers in their places."""
        if len(batches) == 1:
            await self._exchange(batches[0], answers, until)
        elif batches:
            async with asyncio.TaskGroup() as group:
                for batch in batches:
                    group.create_task(self._exchange(batch, answers, until))

    async def close(self) -> None:
        """Close every connection of this event loop; later calls open new ones."""
        pools = self._pools.pop(asyncio.get_running_loop(), {})
        for pool in pools.values():
            while pool.free:
                pool.free.pop().shut()
        await asyncio.sleep(0)  # transports close in the next turn of the loop

    def _pool(self, node: Node) -> _Pool:
        pools = self._pools.setdefault(asyncio.get_running_loop(), {})
        pool = pools.get(node)
        if pool is None:
            pool = pools[node] = _Pool(self.connections)
        return pool

    async def _exchange(self, batch: Batch, answers: list[Answer], until: float) -> None:
        pool = self._pool(batch.node)
        connection: AsyncServerConnection | None = None
        answered: list[Answer] | None = None
        has_slot = False
        try:
            async with _Limit(until):
                await pool.slots.acquire()
                has_slot = True
                connection = pool.free.pop() if pool.free else self._connect(batch.node)
                try:
                    answered = await connection.exchange(batch.requests)
                except ConnectionError:
                    # As in `served`: an idle connection may have been closed by a restart.
                    if not connection.is_used:
                        raise
                    connection.shut()
                    connection.is_used = False
                    answered = await connection.exchange(batch.requests)
        except OSError as error:
            if connection is None:  # none came free in time: no fault of the server
                self.nodes.abandoned(batch)
            else:
                self.nodes.failed(batch, error)
        except BaseException:
            self.nodes.abandoned(batch)
            raise
        finally:
            if connection is not None:
                if answered is None:
                    connection.shut()
                else:
                    connection.is_used = True
                    pool.free.append(connection)
            if has_slot:
                pool.slots.release()
        if answered is not None:
            self.nodes.succeeded(batch, answered)
            for index, answer in zip(batch.at, answered, strict=True):
                answers[index] = answer
