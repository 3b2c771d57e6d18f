"""Asks a second replica when the first takes too long; the first answer counts.

A cursor of a reader that is outside transactions runs its statement here. Its session goes on with
the connection that won; the other one's query is cancelled in the background, and its connection
goes back to its pool. For threads; a task of an event loop is not hedged.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, Protocol

from sqlalchemy import Connection

from shardkit import deadlines, parallel
from shardkit.clock import SYSTEM
from shardkit.freshness import driver_of
from shardkit.hedging import Hedges
from shardkit.topology import Endpoint

__all__ = ["Race", "Racing", "settle"]

_LOSERS: Final = threading.BoundedSemaphore(16)
"""Connections whose queries are being cancelled; those of more losers are closed at once."""

_ENDING: Final[set[threading.Thread]] = set()


class Racing(Protocol):
    """The session, as a race sees it."""

    def _second(self, physical: str) -> tuple[Endpoint, Connection] | None:
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
            found = self._session._second(self._physical)
            if found is None:
                raise LookupError("no other replica is worth asking")
            held.append(found)
            other = driver_of(found[1]).cursor()  # type: ignore[attr-defined]  # of psycopg
            execute(other)
            return other

        winner, answer = parallel.hedged(
            lambda: (execute(first), first)[1], second, delay, self._hedges.spend
        )
        if not held:
            pass
        elif winner == 0:
            _let_go(held[0][1])
        else:
            _let_go(self._session._won(self._physical, *held[0]))
        if isinstance(answer, Exception):
            raise answer
        self._hedges.answered(SYSTEM.monotonic() - started)
        # What psycopg's own execute leaves on its cursor.
        cursor._tx, cursor._query, cursor._last_query = (
            answer._tx,
            answer._query,
            answer._last_query,
        )
        cursor._set_results(answer._results)


def _let_go(connection: Connection) -> None:
    """Give the connection of a loser back, once its query has ended."""
    driver: Any = driver_of(connection)
    if not driver.is_abandoned:
        connection.close()
    elif _LOSERS.acquire(blocking=False):
        thread = threading.Thread(target=_end, args=(connection, driver), daemon=True)
        _ENDING.add(thread)
        thread.start()
    else:
        driver.pgconn.finish()
        connection.close()


def _end(connection: Connection, driver: Any) -> None:
    try:
        with suppress(Exception):
            driver.end_abandoned()
        connection.close()
    finally:
        _LOSERS.release()
        _ENDING.discard(threading.current_thread())


def settle() -> None:
    """Wait for the losers to give their connections back, which takes `deadlines.GRACE`."""
    for thread in tuple(_ENDING):
        thread.join(deadlines.GRACE * 2)
