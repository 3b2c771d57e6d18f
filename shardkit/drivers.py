"""psycopg connections of writers, which spare the round trips of BEGIN and COMMIT.

BEGIN travels with the first statement of a transaction: the server reads BEGIN, the statement and
a Sync from one packet and answers all three at once, in libpq's pipeline mode. Where the text may
be several statements, or is prepared just now, BEGIN goes before it, as psycopg does. And a
statement that is known to be a transaction by itself runs without either (`shardkit.lone`).
Nothing here decides what is in a transaction: a statement that fails leaves it open and failed.

psycopg's own pipelines spare that round trip as well and cost more than it, so three internal
generators of psycopg are extended here; tests/integration/test_drivers.py counts what is sent.
Made by `shardkit.connections`.
Source: PostgreSQL's documentation, libpq, "Pipeline Mode"; `python -m benchmarks session`.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, Final

import psycopg
from psycopg import generators
from psycopg._cursor_base import BaseCursor
from psycopg._preparing import Prepare
from psycopg._queries import (
    MAX_CACHED_STATEMENT_LENGTH,
    MAX_CACHED_STATEMENT_PARAMS,
    PostgresQuery,
    _query2pg_nocache,
)
from psycopg.abc import Params, PQGen, Query
from psycopg.pq import TransactionStatus
from psycopg.pq.abc import PGresult

from shardkit import waits
from shardkit.errors import TooManyValuesError
from shardkit.parting import Parting

__all__ = ["AsyncConnection", "AsyncCursor", "Bounded", "Connection", "Cursor", "refuse_many"]

_MOST_VALUES: Final = 65_535
"""Source: PostgreSQL manual, 53.7, message Bind: their number is an Int16, read unsigned."""


_SETS: Final = re.compile(r"\s*SET\s+(LOCAL\s+)?TRANSACTION(\s|_)", re.IGNORECASE)


class _Owing(Parting):
    """Sees to it that nothing is committed before the preamble of its transaction was selected."""

    def _part(self, asked: tuple[bytes, ...]) -> PQGen[list[PGresult] | None]:
        this: Any = self
        try:
            yield from this._say_what_is_owed()
        except psycopg.Error:
            if self.pgconn.transaction_status == TransactionStatus.INERROR:
                yield from self._exec_command(b"ROLLBACK")
            raise
        return (yield from super()._part(asked))


class Connection(_Owing, waits.Connection):
    """A connection of a thread.

    Attributes:
        is_alone: whether the next statement is a transaction by itself; it puts this out. To be
            set, either way, whenever a transaction starts.
        has_committed: whether its transaction is known to hold, though the answer to COMMIT was
            lost with the connection.
    """

    is_alone = False
    has_committed = False
    _leaves_begin = False

    def commit(self) -> None:
        """Commit, unless nothing was begun; see psycopg's `Connection.commit`."""
        if not self.has_committed and self.pgconn.transaction_status != TransactionStatus.IDLE:
            super().commit()

    def rollback(self) -> None:
        """Roll back, unless nothing was begun; see psycopg's `Connection.rollback`."""
        if self.pgconn.transaction_status != TransactionStatus.IDLE:
            super().rollback()

    def _start_query(self) -> PQGen[None]:
        if not self._leaves_begin:
            yield from super()._start_query()


class AsyncConnection(_Owing, waits.AsyncConnection):
    """A connection of an event loop; see `Connection`."""

    is_alone = False
    has_committed = False
    _leaves_begin = False

    async def commit(self) -> None:
        """Commit, unless nothing was begun; see psycopg's `AsyncConnection.commit`."""
        if not self.has_committed and self.pgconn.transaction_status != TransactionStatus.IDLE:
            await super().commit()

    async def rollback(self) -> None:
        """Roll back, unless nothing was begun; see psycopg's `AsyncConnection.rollback`."""
        if self.pgconn.transaction_status != TransactionStatus.IDLE:
            await super().rollback()

    def _start_query(self) -> PQGen[None]:
        if not self._leaves_begin:
            yield from super()._start_query()


def _sets_transaction(query: Query) -> bool:
    """Tell whether a statement is one that PostgreSQL wants before any query of a transaction."""
    return isinstance(query, str) and _SETS.match(query) is not None


def refuse_many(n_values: int) -> None:
    """Refuse a statement that carries more values than PostgreSQL takes.

    Raises:
        TooManyValuesError: it does.
    """
    if n_values > _MOST_VALUES:
        raise TooManyValuesError(
            f"{n_values:,} values in one statement; PostgreSQL takes {_MOST_VALUES:,}",
            hint="pass a list as one value: column == any_(literal(values, ARRAY(type)))",
        )


@lru_cache(maxsize=32)
def _parsed(query: str, encoding: str) -> Any:
    """Return what psycopg reads out of a long text.

    One object for one text: its hash, by which psycopg finds what is prepared, is computed once.
    """
    return _query2pg_nocache(query.encode(encoding), encoding)


class _Query(PostgresQuery):
    """A query that psycopg does not parse each time where it is a scatter's, long and the same.

    psycopg keeps no long texts, since most are INSERTs of any number of rows: those have many
    values.
    """

    __slots__ = ()

    def convert(self, query: Query, vars: Params | None) -> None:  # noqa: A002  as psycopg has it
        if (
            vars is not None
            and isinstance(query, str)
            and len(query) > MAX_CACHED_STATEMENT_LENGTH
            and len(vars) <= MAX_CACHED_STATEMENT_PARAMS
        ):
            found = _parsed(query, self._tx.encoding)
            self.query, self._want_formats, self._order, self._parts = found
            self.dump(vars)
        else:
            super().convert(query, vars)


class Bounded(BaseCursor[Any, Any]):
    """A cursor that refuses what the protocol cannot carry, before anything of it is sent."""

    _query_cls = _Query

    def _convert_query(self, query: Query, params: Params | None = None) -> PostgresQuery:
        converted = super()._convert_query(query, params)
        refuse_many(len(converted.params or ()))
        return converted


class _Joining(Bounded):
    """A cursor that sends BEGIN with the first statement of a transaction."""

    def _execute_gen(
        self,
        query: Query,
        params: Params | None = None,
        *,
        prepare: bool | None = None,
        binary: bool | None = None,
    ) -> PQGen[None]:
        connection: Any = self._conn
        connection._is_setting = connection.preamble is not None and _sets_transaction(query)
        connection._leaves_begin = (
            connection.pgconn.transaction_status == TransactionStatus.IDLE
            and not connection._autocommit
            and connection._pipeline is None
        )
        try:
            yield from super()._execute_gen(query, params, prepare=prepare, binary=binary)
        finally:
            connection._leaves_begin = connection._is_setting = False

    def _maybe_prepare_gen(
        self,
        pgq: PostgresQuery,
        *,
        prepare: bool | None = None,
        binary: bool | None = None,
    ) -> PQGen[None]:
        connection: Any = self._conn
        if not connection._leaves_begin:
            yield from super()._maybe_prepare_gen(pgq, prepare=prepare, binary=binary)
            return
        connection._leaves_begin = False
        if connection.is_alone:
            connection.is_alone = False
            yield from super()._maybe_prepare_gen(pgq, prepare=prepare, binary=binary)
            return
        prep, name = self._get_prepared(pgq, prepare)
        if prep is Prepare.SHOULD or not pgq.params:
            # In pipeline mode there is no simple protocol, and only that takes several statements.
            yield from connection._start_query()
            yield from super()._maybe_prepare_gen(pgq, prepare=prepare, binary=binary)
            return
        server = self._pgconn
        server.enter_pipeline_mode()
        server.send_query_params(connection._get_tx_start_command(), None)
        bound = connection._servers_bound()
        if bound is not None:
            server.send_query_params(bound, None)
        if prep is Prepare.YES:
            self._send_query_prepared(name, pgq, binary=binary)
        else:
            self._execute_send(pgq, binary=binary)
        key = connection._prepared.maybe_add_to_cache(pgq, prep, name)
        server.pipeline_sync()
        yield from generators.send(server)
        begun: list[PGresult] = []
        try:
            begun = yield from generators.fetch_many(server)
            if bound is not None:
                begun += yield from generators.fetch_many(server)
            results = yield from generators.fetch_many(server)
            yield from generators.fetch_many(server)  # the answer to Sync
        except psycopg.OperationalError:
            self._check_results(begun)  # what was said before the other side hung up
            raise
        server.exit_pipeline_mode()
        self._check_results(begun)
        if key is not None:
            connection._prepared.validate(key, prep, name, results)
        self._check_results(results)
        self._set_results(results)


class Cursor(_Joining, psycopg.Cursor[Any]):
    """A cursor of `Connection`."""


class AsyncCursor(_Joining, psycopg.AsyncCursor[Any]):
    """A cursor of `AsyncConnection`."""
