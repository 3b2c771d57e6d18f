"""Streams the rows of a statement from several servers, holding a few of each at a time.

Every server keeps a cursor; its rows are fetched as they are asked for, several servers at once,
and merged in order one by one. A cursor lives in a transaction: a reader opens one for as long as
a connection has cursors, a writer has its own. Between two fetches the connection is free, so a
session runs other statements in the middle of a stream. A cursor in a transaction also keeps its
server behind a PgBouncer that pools transactions. Called by `ReadSession`; says how rows come,
never which.

Source: DECLARE, FETCH and CLOSE in the PostgreSQL manual.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, cast

import psycopg
from sqlalchemy import Connection, CursorResult, Result
from sqlalchemy.engine.cursor import ResultFetchStrategy
from sqlalchemy.orm import ORMExecuteState
from sqlalchemy.util import await_only

from shardkit.errors import (
    EndpointUnavailableError,
    GatherError,
    StreamEndedError,
    UnavailableError,
)
from shardkit.gather import Plan
from shardkit.ordering import Row
from shardkit.scatter import CURSOR, Cursor, Gathering, Scatter, is_lost
from shardkit.timeouts import limited

__all__ = ["Stream", "Streaming", "Streams", "size_of"]

_SIZE: Final = 1000
"""Rows of each server that are held where nothing says how many; SQLAlchemy's own number."""

# Takes no lock but those of its SELECTs. READ COMMITTED, so that other statements see what is new.
_BEGIN: Final = "BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY"
_NAMES = itertools.count(1)
_OPEN: Final = psycopg.pq.TransactionStatus.INTRANS
_FAILED: Final = psycopg.pq.TransactionStatus.INERROR
_NONE: Final = psycopg.pq.TransactionStatus.IDLE

FAILED_BETWEEN: Final = "another statement of its session failed"

Parallel = Callable[[Sequence[Callable[[], Any]]], list[Any]]


def size_of(state: ORMExecuteState) -> int | None:
    """Return how many rows of each server a statement wants held, or None for all of them.

    What loads relationships of objects that are there is read whole.
    """
    options = state.execution_options
    if not options.get("yield_per") and not options.get("stream_results"):
        return None
    if not state.is_select or state.is_relationship_load or state.is_column_load:
        return None
    return int(options.get("yield_per") or options.get("max_row_buffer") or _SIZE)


@dataclass(slots=True, eq=False)
class _Server:
    """A server with its cursor.

    Attributes:
        name: of the physical shard.
        connection: of the session.
        result: the first rows as SQLAlchemy's result; None until they are there. Before, a
            failure has undone the cursor.
        cursor: name of the cursor.
        rows: what was fetched and not yet asked for.
        is_done: whether the cursor has no more rows.
        n_rows: rows fetched so far.
    """

    name: str
    connection: Connection
    cursor: str = field(default_factory=lambda: f"shardkit_stream_{next(_NAMES)}")
    result: CursorResult[Any] | None = None
    rows: deque[Row] = field(default_factory=deque)
    is_done: bool = False
    n_rows: int = 0

    @property
    def driver(self) -> Any:
        """The driver's connection."""
        return self.connection.connection.driver_connection

    def fetched(self, wanted: int) -> list[Row]:
        """Return the next rows; fails as other statements do."""
        # Not prepared: its text is used for one stream only.
        statement = f"FETCH FORWARD {wanted} FROM {self.cursor}"
        cursor = self.driver.cursor()
        try:
            if isinstance(self.driver, psycopg.AsyncConnection):
                await_only(cursor.execute(statement, prepare=False))
                return cast("list[Row]", await_only(cursor.fetchall()))
            cursor.execute(statement, prepare=False)
            return cast("list[Row]", cursor.fetchall())
        except BaseException as error:
            cast("Any", self.connection)._handle_dbapi_exception(error, None, None, None, None)
            raise

    @property
    def is_gone(self) -> bool:
        """Whether the connection was lost, to whichever statement."""
        connection = self.connection
        return connection.closed or connection.invalidated or not connection.connection.is_valid

    @property
    def status(self) -> psycopg.pq.TransactionStatus:
        """Where the transaction stands."""
        return psycopg.pq.TransactionStatus(self.driver.info.transaction_status)


class Streams:
    """The streams of one session that still have cursors."""

    __slots__ = ("_streams",)

    def __init__(self) -> None:
        self._streams: list[Stream] = []

    def add(self, stream: Stream) -> None:
        """Note a stream."""
        self._streams.append(stream)

    def remove(self, stream: Stream) -> None:
        """Forget a stream that has no cursors any more."""
        if stream in self._streams:
            self._streams.remove(stream)

    def begin(self, server: _Server) -> None:
        """Open a transaction for a cursor where there is none."""
        if server.driver.autocommit and server.status == _NONE:
            # A failed statement ended the one before, and the cursors in it.
            for stream in self._using(server):
                stream.close(FAILED_BETWEEN)
            server.connection.exec_driver_sql(_BEGIN)

    def end(self, server: _Server) -> None:
        """Drop the cursor of a server, and the transaction that was opened for it alone."""
        if server.is_gone:
            return
        status = server.status
        is_reader = server.driver.autocommit
        try:
            if is_reader and status != _NONE and not self._using(server):
                server.connection.exec_driver_sql("COMMIT" if status == _OPEN else "ROLLBACK")
            elif status == _OPEN:
                if server.result is not None:
                    server.connection.exec_driver_sql(f"CLOSE {server.cursor}")
            elif status not in (_NONE, _FAILED):
                server.connection.invalidate()
        except BaseException as error:
            if not server.is_gone:
                server.connection.invalidate(error)
            if not isinstance(error, Exception):
                raise

    def close(self) -> None:
        """End every stream, as its session does."""
        for stream in tuple(self._streams):
            stream.close()

    def abandon(self, transaction: object = None) -> None:
        """Forget streams whose cursors ended with their transaction.

        Args:
            transaction: the nested transaction of the session they began in; None for all.
        """
        for stream in tuple(self._streams):
            if transaction is None or stream.transaction is transaction:
                stream.abandon()

    def _using(self, server: _Server) -> list[Stream]:
        mine = server.driver
        return [
            stream
            for stream in self._streams
            if any(
                other is not server and other.result is not None and not other.is_gone
                and other.driver is mine
                for other in stream.servers.values()
            )
        ]  # fmt: skip


class Stream(ResultFetchStrategy):
    """The rows of one statement, in order, fetched as they are asked for.

    Args:
        streams: those of the session.
        plan: how rows are merged.
        size: rows held of each server at most.
        timeout: seconds each fetch may take on a server, or None.

    Attributes:
        servers: by name of the physical shard.
        parallel: runs tasks at the same time; see `Connections.parallel`.
        located: returns the shardkit error of what became of a server, by its name.
        transaction: the nested transaction of the session that it began in, or None.
        ended: called with the rows fetched by name, once, when the stream ends.

    *Invariant:* never holds more than `size` rows of a server beside the one being merged.
    """

    parallel: Parallel
    located: Callable[[str, Exception], Exception]
    transaction: object = None
    ended: Callable[[dict[str, int]], None] | None = None

    def __init__(self, streams: Streams, plan: Plan, size: int, timeout: float | None) -> None:
        self.servers: dict[str, _Server] = {}
        self._streams = streams
        self._plan = plan
        self._size = size
        self._timeout = timeout
        self._rows: Iterator[Row] | None = None
        self._reason = ""  # why the rest of the rows is not to be had
        self._is_open = True
        streams.add(self)

    @property
    def answers(self) -> dict[str, int]:
        """Rows fetched so far, by name of the physical shard."""
        return {name: server.n_rows for name, server in self.servers.items()}

    # -- servers

    def open(self, server: _Server, execute: Callable[[Cursor], CursorResult[Any]]) -> None:
        """Declare the cursor of a server and fetch its first rows."""
        self._streams.begin(server)
        with self._in_time(server):
            execute(Cursor(server.cursor)).close()
            result = execute(Cursor(server.cursor, self._size))
            rows = cast("Any", result.cursor).fetchall()
        server.result = result
        self._received(server, rows, self._size)

    def _in_time(self, server: _Server) -> Any:
        if self._timeout is None:
            return nullcontext()
        return limited(server.connection, self._timeout)

    def _received(self, server: _Server, rows: Sequence[Row], wanted: int) -> None:
        server.rows.extend(rows)
        server.n_rows += len(rows)
        server.is_done = len(rows) < wanted

    def _fill(self) -> None:
        """Fetch for every server that has half of its rows or fewer, all at once."""
        self._refuse_ended()
        short = [
            server
            for server in self.servers.values()
            if not server.is_done and len(server.rows) <= self._size // 2
        ]
        try:
            outcomes = self.parallel([partial(self._fetch, server) for server in short])
        except BaseException:
            self.close("it was interrupted")
            raise
        failures: dict[str, Exception] = {}
        for server, outcome in zip(short, outcomes, strict=True):
            if isinstance(outcome, UnavailableError) or (
                isinstance(outcome, Exception) and is_lost(outcome)
            ):
                failures[server.name] = outcome
            elif isinstance(outcome, Exception):
                self.close("it failed")
                raise outcome
        if failures:
            answers = {name: n for name, n in self.answers.items() if name not in failures}
            failures = {name: self.located(name, error) for name, error in failures.items()}
            self.close("a server was lost")
            raise GatherError(failures, answers) from next(iter(failures.values()))

    def _fetch(self, server: _Server) -> None:
        if server.is_gone:
            raise EndpointUnavailableError("connection lost")
        if server.status != _OPEN:
            raise StreamEndedError(
                f"the stream ended before its last row: {FAILED_BETWEEN}",
                hint="read all rows first, or stream in a session of its own",
            )
        wanted = self._size - len(server.rows)
        with self._in_time(server):
            rows = server.fetched(wanted)
        self._received(server, rows, wanted)

    def _rows_of(self, server: _Server) -> Iterator[Row]:
        while True:
            while server.rows:
                yield server.rows.popleft()
            if server.is_done:
                return
            self._fill()

    def _merged(self) -> Iterator[Row]:
        self._refuse_ended()
        if self._rows is None:
            assert self._plan.merge is not None, "plans without are not streamed"
            self._rows = self._plan.merge([self._rows_of(s) for s in self.servers.values()])
        return self._rows

    # -- the end

    def close(self, reason: str = "it was closed") -> None:
        """Drop the cursors and what was fetched; called again it does nothing."""
        if not self._is_open:
            return
        self._leave(reason)
        for server in self.servers.values():
            self._streams.end(server)

    def abandon(self) -> None:
        """Forget cursors that ended with their transaction."""
        if self._is_open:
            self._leave("its transaction is over")

    def _leave(self, reason: str) -> None:
        self._is_open = False
        self._reason = reason
        self._streams.remove(self)
        for server in self.servers.values():
            server.rows.clear()
        if self.ended is not None:
            self.ended(self.answers)

    def _refuse_ended(self) -> None:
        if self._reason:
            raise StreamEndedError(f"the stream ended before its last row: {self._reason}")

    def _exhausted(self) -> None:
        self.close()
        self._reason = ""
        self._rows = iter(())

    # -- what SQLAlchemy calls

    def yield_per(self, result: Any, dbapi_cursor: Any, num: int) -> None:
        """Hold so many rows of each server from now on."""
        self._size = num

    def fetchone(self, result: Any, dbapi_cursor: Any, hard_close: bool = False) -> Any:  # noqa: FBT001, FBT002
        """Return the next row, or None after the last."""
        row = next(self._merged(), None)
        if row is None:
            self._exhausted()
            result._soft_close(hard=hard_close)
        return row

    def fetchmany(self, result: Any, dbapi_cursor: Any, size: int | None = None) -> Any:
        """Return so many rows, fewer at the end, and none after it."""
        wanted = self._size if size is None else size
        rows = list(itertools.islice(self._merged(), wanted))
        if len(rows) < wanted:
            self._exhausted()
        if not rows:
            result._soft_close()
        return rows

    def fetchall(self, result: Any, dbapi_cursor: Any) -> Any:
        """Return all rows that are left."""
        rows = list(self._merged())
        self._exhausted()
        result._soft_close()
        return rows

    def soft_close(self, result: Any, dbapi_cursor: Any) -> None:
        """End the stream."""
        self.close()

    def hard_close(self, result: Any, dbapi_cursor: Any) -> None:
        """End the stream."""
        self.close()


class Streaming(Gathering):
    """A gathering whose rows are fetched as they are asked for; see `Gathering`.

    Args:
        state: the execution that the session's hook was given.
        plan: what to run; it can be merged row by row.
        streams: those of the session.
        size: rows of each server to hold.
        timeout: seconds that each fetch may take on a server, or None.
    """

    def __init__(
        self,
        state: ORMExecuteState,
        plan: Plan,
        streams: Streams,
        *,
        size: int,
        timeout: float | None,
    ) -> None:
        super().__init__(state, plan, max_rows=None, timeout=None)
        self.stream = Stream(streams, plan, size, timeout)

    def ask(self, servers: Any, parallel: Parallel) -> dict[str, Exception]:
        """Open the cursors of servers; see `Gathering.ask`."""
        self.stream.parallel = parallel
        try:
            failures = super().ask(servers, parallel)
        except BaseException:
            self.close()
            raise
        for name in failures:
            self._streams_end(name)
        return failures

    def _streams_end(self, name: str) -> None:
        server = self.stream.servers.pop(name)
        self.stream._streams.end(server)

    def when_answered(self, tell: Callable[[dict[str, int]], None]) -> None:
        """Tell it when the stream ends."""
        self.stream.ended = tell

    def close(self) -> None:
        """Let go of what was opened."""
        self.stream.close()

    def result(self) -> Result[Any]:
        """Return the rows to come, loaded through the ORM as they do."""
        first: Any = next(iter(self.stream.servers.values())).result
        first.cursor_strategy = self.stream
        first.context._is_server_side = True  # it is fetched from while it is read
        result = self._loaded(first)
        size = self._options.get("yield_per")
        return result.yield_per(size) if size and self._load is None else result

    def _task(
        self, name: str, connection: Connection, scatter: Scatter
    ) -> Callable[[], Sequence[Any]]:
        server = self.stream.servers[name] = _Server(name, connection)

        def task() -> Sequence[Any]:
            self.stream.open(
                server, lambda cursor: self._execute(connection, scatter, {CURSOR: cursor})
            )
            return server.rows

        return task
