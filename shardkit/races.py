"""Asks a second replica when the first takes too long; the first answer counts.

A cursor of a reader that is outside transactions runs its statement here. Its session goes on with
the connection that won; the other one's query is cancelled in the background, and its connection
goes back to its pool. In a thread both queries are greenlets of `shardkit.parallel`, so the second
begins without a thread having to be started; in an event loop they are tasks.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any, Final, Protocol

from sqlalchemy import Connection
from sqlalchemy.util import greenlet_spawn

from shardkit import deadlines, parallel
from shardkit.clock import SYSTEM
from shardkit.freshness import driver_of
from shardkit.hedging import Hedges
from shardkit.topology import Endpoint

__all__ = ["Race", "Racing", "settle", "settle_tasks"]

_MOST: Final = 16
"""Connections whose queries are being cancelled; those of more losers are closed at once."""


class Racing(Protocol):
    """The session, as a race sees it."""

    def _second(self, physical: str, waited: float) -> tuple[Endpoint, Connection] | None:
        """Open a connection to another replica; None when there is none worth asking."""

    def _won(self, physical: str, endpoint: Endpoint, connection: Connection) -> Connection:
        """Go on with the second connection; return the first."""


class Race:
    """Runs the statements of one connection of a reader.

    Args:
        session: whose connection it is.
        physical: name of the physical shard.
        hedges: when a second replica is asked.
    """

    def __init__(self, session: Racing, physical: str, hedges: Hedges) -> None:
        self._session = session
        self._physical = physical
        self._hedges = hedges

    def run(self, cursor: Any, execute: Callable[[Any], object]) -> None:
        """Run a statement so that a cursor has its results.

        Args:
            cursor: of the first connection.
            execute: runs the statement on a cursor.
        """
        started, delay = SYSTEM.monotonic(), self._hedges.delay
        if delay is None:
            execute(cursor)
            self._hedges.answered(SYSTEM.monotonic() - started)
            return
        held: list[tuple[Endpoint, Connection]] = []
        # Results go to cursors of their own: the loser may still be writing to its.
        first = cursor.connection.cursor()

        def second() -> Any:
            other = driver_of(self._opened(held, delay)).cursor()  # type: ignore[attr-defined]
            execute(other)
            return other

        winner, answer = parallel.hedged(
            lambda: (execute(first), first)[1], second, delay, self._hedges.spend
        )
        if held:
            _LOSERS.take(self._loser(winner, held))
        if isinstance(answer, Exception):
            raise answer
        self._hedges.answered(SYSTEM.monotonic() - started)
        _give(cursor, answer)

    async def run_task(self, cursor: Any, execute: Callable[[Any], Awaitable[object]]) -> None:
        """Run a statement of an event loop; see `run`."""
        started, delay = SYSTEM.monotonic(), self._hedges.delay
        if delay is None:
            await execute(cursor)
            self._hedges.answered(SYSTEM.monotonic() - started)
            return
        held: list[tuple[Endpoint, Connection]] = []
        cursors = [cursor.connection.cursor()]

        async def second() -> None:
            cursors.append(driver_of(await greenlet_spawn(self._opened, held, delay)).cursor())  # type: ignore[attr-defined]
            await execute(cursors[1])

        tasks = [asyncio.ensure_future(execute(cursors[0]))]
        winner = 0
        try:
            done, _ = await asyncio.wait(tasks, timeout=delay)
            if not done and self._hedges.spend():
                tasks.append(asyncio.create_task(second()))
                winner = await _first_success(tasks)
        except BaseException:  # a cancelled task: nobody waits for either
            await _ended(tasks)
            for _, connection in held:
                await greenlet_spawn(connection.close)
            raise
        if held:
            _end_task(tasks[1 - winner], self._loser(winner, held))
        elif len(tasks) > 1:  # it has no connection yet
            _end_task(tasks[1], None)
        await tasks[winner]
        self._hedges.answered(SYSTEM.monotonic() - started)
        _give(cursor, cursors[winner])

    def _opened(self, held: list[tuple[Endpoint, Connection]], waited: float) -> Connection:
        found = self._session._second(self._physical, waited)
        if found is None:
            raise LookupError("no other replica is worth asking")
        held.append(found)
        return found[1]

    def _loser(self, winner: int, held: list[tuple[Endpoint, Connection]]) -> Connection:
        """Have the session go on with the winner; return the other connection."""
        return self._session._won(self._physical, *held[0]) if winner else held[0][1]


def _give(cursor: Any, answer: Any) -> None:
    """Leave on a cursor what psycopg's own execute leaves on it."""
    cursor._tx, cursor._query, cursor._last_query = answer._tx, answer._query, answer._last_query
    cursor._set_results(answer._results)


class _Losers:
    """The threads that give the connections of losers back, once their queries have ended.

    They are kept, so that a session whose second replica answered does not wait for the start of
    one.
    """

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Forget what is under way: in the child of a fork its threads are gone."""
        self._free = threading.BoundedSemaphore(_MOST)
        self._threads = ThreadPoolExecutor(_MOST, thread_name_prefix="shardkit losers")
        self._ending: set[Future[None]] = set()

    def take(self, connection: Connection) -> None:
        """Give a connection back, in the background if its query has to be cancelled."""
        driver: Any = driver_of(connection)
        if not driver.is_abandoned:
            connection.close()
        elif self._free.acquire(blocking=False):
            future = self._threads.submit(self._end, connection, driver)
            self._ending.add(future)
            future.add_done_callback(self._ending.discard)
        else:
            driver.pgconn.finish()
            connection.close()

    def _end(self, connection: Connection, driver: Any) -> None:
        try:
            with suppress(Exception):
                driver.end_abandoned()
            connection.close()
        finally:
            self._free.release()

    def settle(self) -> None:
        """Wait for those under way."""
        wait(tuple(self._ending), timeout=deadlines.GRACE * 2)


_LOSERS: Final = _Losers()
os.register_at_fork(after_in_child=_LOSERS.renew)


def settle() -> None:
    """Wait for the losers to give their connections back, which takes `deadlines.GRACE`."""
    _LOSERS.settle()


_TASKS: Final[set[asyncio.Task[None]]] = set()
"""Those of event loops, each of which ends one loser."""


def _end_task(task: asyncio.Future[Any], connection: Connection | None) -> None:
    """End the query of a loser in the background, and give its connection back."""
    if connection is not None and sum(not t.done() for t in _TASKS) >= _MOST:
        driver_of(connection).pgconn.finish()  # type: ignore[attr-defined]  # of psycopg

    async def end() -> None:
        await _ended([task])
        if connection is not None:
            await greenlet_spawn(connection.close)

    ending = asyncio.create_task(end())
    _TASKS.add(ending)
    ending.add_done_callback(_TASKS.discard)


async def settle_tasks() -> None:
    """Wait for the losers of this event loop; see `settle`."""
    loop = asyncio.get_running_loop()
    if ending := [task for task in _TASKS if task.get_loop() is loop]:
        await asyncio.wait(ending, timeout=deadlines.GRACE * 2)


async def _first_success(tasks: Sequence[asyncio.Future[Any]]) -> int:
    """Return which task succeeds first, 0 when none does."""
    pending: set[asyncio.Future[Any]] = set(tasks)
    while pending:
        _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for number, task in enumerate(tasks):
            if task.done() and not task.cancelled() and task.exception() is None:
                return number
    return 0


async def _ended(tasks: Sequence[asyncio.Future[Any]]) -> None:
    """Cancel tasks, whose connections then cancel their queries, and wait for their end."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
