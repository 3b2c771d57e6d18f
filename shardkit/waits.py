"""Connections of psycopg whose every wait ends: at the deadline, or after their patience.

A wait that takes too long cancels the server's query, waits for the end of the conversation, and
closes the connection if that does not come, all within `deadlines.GRACE`. COMMIT is never
cancelled: PostgreSQL would answer a cancelled wait for a standby with success. The clusters'
engines connect with these classes; commands do not.

Source: docs/architecture.md, decision 18; PostgreSQL's `SyncRepWaitForLSN`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, Protocol, Self, TypeVar, cast

import psycopg
from psycopg import errors, generators, waiting
from psycopg.abc import AdaptContext, PQGen, PQGenConn
from psycopg.adapt import AdaptersMap
from psycopg.conninfo import conninfo_attempts, make_conninfo, timeout_from_conninfo
from psycopg.pq import ConnStatus, ExecStatus, TransactionStatus

from shardkit import deadlines, parallel
from shardkit.clock import SYSTEM
from shardkit.farewells import is_last_word
from shardkit.parallel import CHECK_EVERY

__all__ = ["AsyncConnection", "Connection", "Guard", "WaitedTooLongError"]

T = TypeVar("T")

_COMMIT_NEEDS: Final = 0.02
"""Seconds without which COMMIT is not sent: a dozen times what it takes on a quiet server."""

_CANCEL: Final = 0.1
"""Seconds for the cancel request; the rest of the grace is for the query to end."""

_STANDBY: Final = "SyncRepWaitForLSN"
"""The function of PostgreSQL that warns; the text itself may be translated."""

_AT_REST: Final = frozenset({TransactionStatus.IDLE, TransactionStatus.INERROR})


class WaitedTooLongError(psycopg.OperationalError):
    """A server did not answer in time.

    Attributes:
        by_deadline: whether a deadline was over, not the patience of the connection.
        patience: seconds the connection waits without a deadline.
    """

    by_deadline = False
    patience = math.inf


class StandbyNotWaitedForError(psycopg.OperationalError):
    """A commit was answered although no standby has confirmed it."""


class Guard(Protocol):
    """Who is told what becomes of the waits for one server."""

    def succeeded(self, seconds: float) -> object:
        """Note that the server answered, be it with an error of SQL that it reported itself."""

    def failed(self, error: BaseException, seconds: float) -> object:
        """Note an error of the driver; the server may have reported it or be gone."""


class _Unguarded:
    """The guard of nothing."""

    def succeeded(self, seconds: float) -> None:
        """Ignore it."""

    def failed(self, error: BaseException, seconds: float) -> None:
        """Ignore it."""


class _Patient:
    """What both kinds of connection decide alike; mixed into psycopg's classes.

    Attributes:
        patience: seconds it waits for an answer without a deadline.
        guard: who is told what becomes of each wait.
        was_undone: whether the server has said that it cancelled the last statement given up,
            so that nothing of it holds, even where the statement would have committed itself.
        preamble: returns what is selected at the beginning of each transaction that writes, in the
            round trip of BEGIN: what has to hold for it; or None for nothing. After SET TRANSACTION
            where that is the first statement, since PostgreSQL wants it before any query.
        meanwhile: is called once, as soon as something was sent next: what has to be done
            beside that is done while the server works. Raises nothing.
    """

    pgconn: psycopg.pq.abc.PGconn
    patience: float = math.inf
    guard: Guard = _Unguarded()
    _first_answer: float | None = None
    _is_final = False  # COMMIT is on its way
    _is_ending = False  # ROLLBACK is on its way: the server is left alone at last
    _has_standby_warning = False
    was_undone = False
    preamble: Callable[[], bytes | None] | None = None
    _is_setting = False  # SET TRANSACTION is about to be sent
    _owes_preamble = False
    meanwhile: Callable[[], None] | None = None

    def _opened(self, patience: float, guard: Guard) -> None:
        self.patience = patience
        self.guard = guard
        cast("Any", self).add_notice_handler(self._note)

    def first_answer(self) -> float | None:
        """Return the seconds that the first answer took since this was last asked, if any."""
        seconds, self._first_answer = self._first_answer, None
        return seconds

    def _answered(self, started: float) -> None:
        seconds = SYSTEM.monotonic() - started
        if self._first_answer is None:
            self._first_answer = seconds
        self.guard.succeeded(seconds)
        if self._has_standby_warning:
            self._has_standby_warning = False
            self.pgconn.finish()
            raise StandbyNotWaitedForError("the wait for a standby was cancelled")

    def _failed(self, error: psycopg.Error, started: float) -> None:
        """Tell the guard of an error, and close a connection that it was the last word of.

        Also one that it came in the middle of a conversation on: whoever spoke on it next would
        take the answers that are still to come for its own.
        """
        self.guard.failed(error, SYSTEM.monotonic() - started)
        is_half_said = self.pgconn.pipeline_status and not cast("Any", self)._pipeline
        if is_half_said or is_last_word(error):
            self.pgconn.finish()

    def _bound(self) -> float:
        """Return how many seconds a wait may take."""
        found = deadlines.current()
        if found is None:
            return self.patience
        return min(self.patience, max(0.0, found.left() + (deadlines.GRACE * self._is_ending)))

    def _began(self, gen: PQGen[Any]) -> float:
        """Return how many seconds may be waited; refuse to send what there is no time for."""
        seconds = self._bound()
        if seconds <= 0:
            gen.close()
            if self._is_ending:
                self.pgconn.finish()
            raise self._too_long()
        return seconds

    def _too_long(self) -> WaitedTooLongError:
        found = deadlines.current()
        by_deadline = found is not None and found.left() <= _COMMIT_NEEDS
        error = WaitedTooLongError(
            "the deadline is over" if by_deadline else f"no answer within {self.patience:g} seconds"
        )
        error.by_deadline = by_deadline
        error.patience = self.patience
        return error

    def _late(self, started: float) -> WaitedTooLongError:
        """Return the error of a wait that was given up, and tell the guard of it.

        A server that still ends the query when asked to is busy, not gone.
        """
        error = self._too_long()
        if self.pgconn.status != ConnStatus.OK:
            self.guard.failed(error, SYSTEM.monotonic() - started)
        return error

    def _grace(self) -> float:
        """Return when the connection is given up, on the monotonic clock."""
        found, now = deadlines.current(), SYSTEM.monotonic()
        return (now if found is None else min(now, now + found.left())) + deadlines.GRACE

    @property
    def _may_cancel(self) -> bool:
        """Whether a query runs that may be cancelled."""
        return not (self._is_final or self._is_ending) and (
            self.pgconn.transaction_status == TransactionStatus.ACTIVE
        )

    def _settle(self) -> None:
        """Close the connection unless its conversation has come to an end.

        A statement that finished after all, inside a transaction, was reported as failed: the
        transaction must not be committed with it. A warning that came with it was for whoever has
        given up, and not for the next on this connection.
        """
        self._has_standby_warning = False
        if self.pgconn.transaction_status not in _AT_REST or self.pgconn.pipeline_status:
            self.pgconn.finish()

    def _is_too_late_to_commit(self) -> bool:
        return self._bound() <= _COMMIT_NEEDS

    @contextmanager
    def _final(self) -> Iterator[None]:
        self._is_final = True
        try:
            yield
        finally:
            self._is_final = False

    def _beside(self, gen: PQGen[T]) -> PQGen[T]:
        """Have the work of `meanwhile` done beside a conversation."""
        work, self.meanwhile = self.meanwhile, None
        return gen if work is None else _beside(gen, work)

    @contextmanager
    def _ending(self) -> Iterator[None]:
        """Roll back, or close the connection, which has the server roll back as well."""
        self._is_ending = True
        try:
            yield
        except WaitedTooLongError:
            self.pgconn.finish()
        finally:
            self._is_ending = False

    def _note(self, diagnostic: errors.Diagnostic) -> None:
        if diagnostic.source_function == _STANDBY:
            self._has_standby_warning = True

    def _servers_bound(self) -> bytes | None:
        """Return what has the server itself keep the deadline in a transaction, and the preamble.

        It takes no lock. Without a deadline the patience of the connection is enough.
        """
        first = None if self.preamble is None else self.preamble()
        self._owes_preamble = self._is_setting and first is not None
        if self._owes_preamble:
            first = None
        if deadlines.current() is None:
            return None if first is None else b"SELECT " + first
        bound = max(1, math.ceil(self._bound() * 1000))
        if first is None:
            return b"SET LOCAL statement_timeout = %d" % bound
        return b"SELECT pg_catalog.set_config('statement_timeout', '%d', true), %b" % (bound, first)

    def _say_what_is_owed(self) -> PQGen[None]:
        """Select the preamble in a transaction that has begun without it, if there is one.

        Before the next statement, and before COMMIT at the latest: what fails it is not committed.
        """
        is_open = self.pgconn.transaction_status == TransactionStatus.INTRANS
        if not self._owes_preamble or self._is_setting or not is_open:
            return
        self._owes_preamble = False
        words = None if self.preamble is None else self.preamble()
        if words is None:
            return
        self.pgconn.send_query(b"SELECT " + words)
        for result in (yield from generators.execute(self.pgconn)):
            if result.status != ExecStatus.TUPLES_OK:
                raise errors.error_from_result(result, encoding=self.pgconn._encoding)

    def _start_query(self) -> PQGen[None]:
        """Begin a transaction with the server's own bound, in one round trip.

        Without a deadline, or in a pipeline, which carries one statement a message, psycopg's way.
        """
        base: Any = super()
        connection: Any = self
        bound = None
        if not (
            connection._autocommit
            or connection._pipeline
            or self.pgconn.transaction_status != TransactionStatus.IDLE
        ):
            bound = self._servers_bound()
        if bound is None:
            yield from self._say_what_is_owed()
            yield from base._start_query()
            return
        self.pgconn.send_query(b"%b; %b" % (connection._get_tx_start_command(), bound))
        for result in (yield from generators.execute(self.pgconn)):
            if result.status not in {ExecStatus.COMMAND_OK, ExecStatus.TUPLES_OK}:
                raise errors.error_from_result(result, encoding=self.pgconn._encoding)


class Connection(_Patient, psycopg.Connection[Any]):
    """A connection for threads, whose waits `parallel.run` can take over."""

    _abandoned: PQGen[Any] | None = None

    @classmethod
    def open(cls, *arguments: Any, patience: float, guard: Guard, **options: Any) -> Self:
        """Connect.

        Args:
            *arguments: as for psycopg's `Connection.connect`.
            patience: seconds it waits for an answer without a deadline.
            guard: who is told what becomes of each wait, connecting included.
            **options: as for psycopg.
        """
        started = SYSTEM.monotonic()
        task = parallel.task()
        try:
            if task is None:
                connection = cls.connect(*arguments, **options)
            else:
                connection = cls._connected(task, *arguments, **options)
        except psycopg.Error as error:
            guard.failed(error, SYSTEM.monotonic() - started)
            raise
        connection._opened(patience, guard)
        return connection

    @classmethod
    def _connected(
        cls,
        task: parallel.Task,
        info: str = "",
        *,
        autocommit: bool = False,
        prepare_threshold: int | None = 5,
        context: AdaptContext | None = None,
        cursor_factory: type[psycopg.Cursor[Any]] | None = None,
        **options: Any,
    ) -> Self:
        """Connect as psycopg's `connect` does, beside the other tasks of `parallel.run`."""
        parameters = cls._get_connection_params(info, **options)
        seconds = timeout_from_conninfo(parameters)
        error: psycopg.Error | None = None
        for attempt in conninfo_attempts(parameters):
            try:
                gen = cls._connect_gen(make_conninfo("", **attempt))
                connection = task.wait_conn(gen, deadlines.left(seconds))
                break
            except errors._WaitTimeout:
                error = errors.ConnectionTimeout("connection timeout expired")
            except psycopg.Error as found:
                error = found
        else:
            raise error or psycopg.OperationalError("no address to connect to")
        connection._autocommit = autocommit
        connection.prepare_threshold = prepare_threshold
        if cursor_factory is not None:
            connection.cursor_factory = cursor_factory
        if context is not None:
            connection._adapters = AdaptersMap(context.adapters)
        return connection

    @classmethod
    def _connect_gen(cls, conninfo: str = "") -> PQGenConn[Self]:
        return _bounded_connect(super()._connect_gen(conninfo))

    def wait(self, gen: PQGen[T], interval: float = CHECK_EVERY, timeout: float | None = None) -> T:
        """Drive a generator of psycopg to its end; see psycopg's `Connection.wait`."""
        if self._abandoned is not None:  # it is no more this task's to talk on
            gen.close()
            raise parallel.AbandonedError
        seconds = self._began(gen)
        if timeout is not None and timeout <= seconds:
            return super().wait(gen, interval=interval, timeout=timeout)
        task = parallel.task()
        if self.meanwhile is not None:
            gen = self._beside(gen)
        started = SYSTEM.monotonic()
        try:
            answer = self._driven(gen, seconds, task)
        except errors._WaitTimeout:
            self._give_up(gen, task)
            raise self._late(started) from None
        except psycopg.Error as error:
            self._failed(error, started)
            raise
        except Exception:
            raise
        except parallel.AbandonedError:
            self._abandoned = gen
            raise
        except BaseException:  # an interrupt: half a conversation is left on it
            self._give_up(gen, None)  # whoever drives the task does not do so any more
            raise
        self._answered(started)
        return answer

    @property
    def is_abandoned(self) -> bool:
        """Whether a query runs on it for which nobody waits any more."""
        return self._abandoned is not None

    def end_abandoned(self) -> None:
        """Cancel the query for which nobody waits, and wait for its end, or close."""
        gen, self._abandoned = self._abandoned, None
        if gen is not None:
            self._give_up(gen, None)

    def _driven(self, gen: PQGen[T], seconds: float, task: parallel.Task | None) -> T:
        if task is not None:
            return task.wait(gen, self.fileno(), seconds)
        bound = None if seconds == math.inf else seconds
        return waiting.wait(gen, self.pgconn.socket, interval=CHECK_EVERY, timeout=bound)

    def _give_up(self, gen: PQGen[Any], task: parallel.Task | None) -> None:
        until, self.was_undone = self._grace(), False
        try:
            if self._may_cancel and SYSTEM.monotonic() < until:
                seconds = min(_CANCEL, until - SYSTEM.monotonic())
                if task is None:
                    waiting.wait_conn(self._cancel_gen(), interval=0.02, timeout=seconds)
                else:
                    task.wait_conn(self._cancel_gen(), seconds)
                self._driven(gen, max(0.0, until - SYSTEM.monotonic()), task)
        except psycopg.Error as error:  # as expected, or no answer to the cancel either
            self.was_undone = isinstance(error, errors.QueryCanceled)
        except BaseException:
            self.pgconn.finish()
            raise
        self._settle()

    def commit(self) -> None:
        """Commit; not cancelled once it is sent, whatever happens.

        SQLAlchemy takes a transaction whose COMMIT failed for ended, so without time it is ended.
        """
        if self._is_too_late_to_commit():
            self.rollback()
            raise self._too_long()
        with self._final():
            super().commit()

    def rollback(self) -> None:
        """Roll back, or close the connection when the server does not answer."""
        with self._ending():
            super().rollback()


class AsyncConnection(_Patient, psycopg.AsyncConnection[Any]):
    """A connection for asyncio."""

    @classmethod
    async def open(cls, *arguments: Any, patience: float, guard: Guard, **options: Any) -> Self:
        """Connect; see `Connection.open`."""
        started = SYSTEM.monotonic()
        try:
            connection = await cls.connect(*arguments, **options)
        except psycopg.Error as error:
            guard.failed(error, SYSTEM.monotonic() - started)
            raise
        connection._opened(patience, guard)
        return connection

    @classmethod
    def _connect_gen(cls, conninfo: str = "") -> PQGenConn[Self]:
        return _bounded_connect(super()._connect_gen(conninfo))

    async def wait(
        self,
        gen: PQGen[T],
        interval: float = CHECK_EVERY,
        timeout: float | None = None,  # noqa: ASYNC109  psycopg's own signature
    ) -> T:
        """Drive a generator of psycopg to its end; see psycopg's `AsyncConnection.wait`."""
        seconds = self._began(gen)
        if timeout is not None and timeout <= seconds:
            return await super().wait(gen, interval=interval, timeout=timeout)
        if self.meanwhile is not None:
            gen = self._beside(gen)
        started = SYSTEM.monotonic()
        try:
            answer = await self._driven(gen, seconds)
        except errors._WaitTimeout:
            await self._give_up(gen)
            raise self._late(started) from None
        except psycopg.Error as error:
            self._failed(error, started)
            raise
        except Exception:
            raise
        except BaseException:  # a cancelled task: half a conversation is left on it
            await self._give_up(gen)
            raise
        self._answered(started)
        return answer

    async def _driven(self, gen: PQGen[T], seconds: float) -> T:
        bound = None if seconds == math.inf else seconds
        return await waiting.wait_async(
            gen, self.pgconn.socket, interval=CHECK_EVERY, timeout=bound
        )

    async def _give_up(self, gen: PQGen[Any]) -> None:
        until, self.was_undone = self._grace(), False
        try:
            if self._may_cancel and SYSTEM.monotonic() < until:
                await waiting.wait_conn_async(
                    self._cancel_gen(),
                    interval=0.02,
                    timeout=min(_CANCEL, until - SYSTEM.monotonic()),
                )
                await self._driven(gen, max(0.0, until - SYSTEM.monotonic()))
        except psycopg.Error as error:
            self.was_undone = isinstance(error, errors.QueryCanceled)
        except BaseException:
            self.pgconn.finish()
            raise
        self._settle()

    async def commit(self) -> None:
        """Commit; see `Connection.commit`."""
        if self._is_too_late_to_commit():
            await self.rollback()
            raise self._too_long()
        with self._final():
            await super().commit()

    async def rollback(self) -> None:
        """Roll back, or close the connection when the server does not answer."""
        with self._ending():
            await super().rollback()


def _beside(gen: PQGen[T], work: Callable[[], None]) -> PQGen[T]:
    """Do some work as soon as a conversation waits for the server's answer."""
    try:
        wanted = next(gen)
        work()
        while True:
            wanted = gen.send((yield wanted))
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]  # psycopg's generators say no more


def _bounded_connect(connecting: PQGenConn[T]) -> PQGenConn[T]:
    """Connect until the deadline; psycopg itself knows whole seconds only, and two at least.

    psycopg looks at the generator every tenth of a second at the latest, so that is how late the
    deadline may be noticed.
    """
    sent: Any = None
    while True:
        if deadlines.is_over():
            connecting.close()
            error = WaitedTooLongError("the deadline is over")
            error.by_deadline = True
            raise error
        try:
            wanted = next(connecting) if sent is None else connecting.send(sent)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]  # psycopg's generators say no more
        sent = yield wanted
