"""Connections that know up to where they have read, and whether that is far enough.

A replica's answer counts only if the replica had replayed what the reader must have seen *before*
it took the snapshot of the answer. So the question goes first, the statement second and, for
readers whose token is to grow, the position third: one pipeline, one round trip. Asking after the
statement, or inside it, would prove nothing, since the snapshot is older than the answer. Where a
replica may still be replaying, the server itself waits a moment.

A connection that has seen a position once has seen it for good: a replica's position falls only
when it restarts, which ends its connections. Behind a pooler that does not hold, so there every
read is asked about. A primary tells the position of a commit in the round trip of COMMIT.

Made by `shardkit.connections`, told by sessions what to ask; decides nothing about servers.
Source: docs/replicas.md.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol, cast

import psycopg
from psycopg import generators
from psycopg._preparing import Prepare
from psycopg.abc import PQGen
from psycopg.pq import ConnStatus, ExecStatus, TransactionStatus
from psycopg.pq.abc import PGresult

from shardkit import drivers, parallel, waits

__all__ = [
    "CANNOT_ANSWER",
    "AsyncConnection",
    "AsyncCursor",
    "AsyncWriteCursor",
    "AsyncWriter",
    "Connection",
    "Cursor",
    "Gate",
    "Gated",
    "Meter",
    "NotReplayedError",
    "Position",
    "Racer",
    "SilentError",
    "WriteCursor",
    "Writer",
    "lsn_of",
    "lsn_text",
    "position_of",
]

WAITS_FOR_LSN: Final = 190000
"""The first PostgreSQL with WAIT FOR LSN, as the server version number."""

# None takes a lock. The first waits in the server, holding a snapshot for at most the patience.
_REPLAYED = b"SELECT shardkit.replayed($1::pg_catalog.pg_lsn, $2::pg_catalog.int4)"
_WRITTEN = (
    b"SELECT CASE pg_catalog.current_setting('synchronous_commit') WHEN 'off' "
    b"THEN pg_catalog.pg_current_wal_insert_lsn() ELSE pg_catalog.pg_current_wal_flush_lsn() END "
    b"|| ' ' || pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_insert_lsn())"
)
# A commit that does not wait for the disk lies beyond what is flushed. The setting may be local to
# the transaction, so it is looked at before COMMIT, the position after.
_SHOW: Final = b"SHOW synchronous_commit"
_POSITIONS: Final = (
    b"SELECT pg_catalog.pg_current_wal_flush_lsn(), pg_catalog.pg_current_wal_insert_lsn(), "
    b"pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_insert_lsn())"
)
_COMMIT: Final = b"; ".join((_SHOW, b"COMMIT", _POSITIONS))
_PREPARED: Final = {_REPLAYED: b"shardkit_replayed", _WRITTEN: b"shardkit_written"}

_CONTROL: Final = re.compile(
    rb"\s*(BEGIN|COMMIT|ROLLBACK|SET|SHOW|SAVEPOINT|RELEASE|DEALLOCATE|FETCH|CLOSE)\b",
    re.IGNORECASE,
)
"""Statements that see no more rows than before; several of them may stand in one message.

A cursor has the snapshot of its DECLARE, which was let through: what its replica is asked to have
replayed may have grown since, as `max_lag` does, and says nothing about the rest of its rows."""

_BEGINS: Final = re.compile(r"\s*BEGIN\b", re.IGNORECASE)
"""What comes after it is for the same server."""

_SUCCESS: Final = frozenset({ExecStatus.TUPLES_OK, ExecStatus.COMMAND_OK, ExecStatus.EMPTY_QUERY})
_GONE: Final = b"26000"  # the prepared statement was deallocated behind our back


class NotReplayedError(psycopg.OperationalError):
    """The replica has not replayed what the reader must see; its rows were thrown away."""


class SilentError(psycopg.OperationalError):
    """The replica answers neither the statement nor the probes; its connection was closed."""


# Replay takes locks and removes rows; it cancels what stands in its way. Source: PostgreSQL,
# "Handling Query Conflicts"; outside transactions readers meet these for no other reason.
CANNOT_ANSWER: Final = (
    NotReplayedError,
    SilentError,
    psycopg.errors.SerializationFailure,
    psycopg.errors.DeadlockDetected,
)


# Nor is it the server's failure when a query was cancelled, for instance one that lost a race.
_NEUTRAL: Final = (
    NotReplayedError,
    psycopg.errors.SerializationFailure,
    psycopg.errors.DeadlockDetected,
    psycopg.errors.QueryCanceled,
)


class Meter(Protocol):
    """What is told how long statements take; see `shardkit.replicas.Member`."""

    def began(self) -> float:
        """Note that a statement was sent."""

    def ended(self, began: float, *, failed: bool = False) -> None:
        """Note that it was answered."""


class Racer(Protocol):
    """What runs statements of a connection; see `shardkit.races.Race`."""

    def run(self, cursor: Any, execute: Callable[[Any], object]) -> None:
        """Run a statement so that a cursor has its results."""

    async def run_task(self, cursor: Any, execute: Callable[[Any], Awaitable[object]]) -> None:
        """Do the same in an event loop."""


@dataclass(frozen=True, slots=True)
class Position:
    """A place in the log of a server.

    Attributes:
        timeline: of the log; 0 when not known.
        lsn: the log position, in bytes.
    """

    timeline: int
    lsn: int


class Gate:
    """What one session asks of one connection, for as long as it holds it.

    Attributes:
        needed: returns the position that must have been replayed, or None for any.
        is_replica: whether the server replays or writes.
        is_silent: tells whether probes have no answer of the server, though they run.
        patience: milliseconds that the server may wait for what it has not replayed yet.
        keeps_track: whether the position after each statement is asked for.
        seen: the position after the last statement, or None.
        asks: whether statements are asked about at all.
        has_refused: whether the replica could not answer, and the primary should.
        has_lost_track: whether the position after a statement could not be had.
    """

    __slots__ = (
        "asks",
        "has_lost_track",
        "has_refused",
        "is_replica",
        "is_silent",
        "keeps_track",
        "needed",
        "patience",
        "seen",
    )

    def __init__(
        self,
        needed: Callable[[], Position | None],
        *,
        is_replica: bool,
        is_silent: Callable[[], bool],
        patience: int,
        keeps_track: bool,
        asks: bool = True,
    ) -> None:
        self.asks = asks
        self.needed = needed
        self.is_replica = is_replica
        self.is_silent = is_silent
        self.patience = patience
        self.keeps_track = keeps_track
        self.seen: Position | None = None
        self.has_refused = False
        self.has_lost_track = False


_COMMITTING: Final = Gate(
    lambda: None, is_replica=False, is_silent=lambda: False, patience=0, keeps_track=True
)
"""Stands for a statement that commits itself: its position is asked for after the commit."""


class Gated:
    """What both kinds of connection have; mixed into psycopg's classes.

    Attributes:
        gate: of the session that holds the connection, or None.
        meter: is told how long statements take, or None.
        system: system identifier of the server; 0 until it is known.
        is_direct: whether no pooler stands between.
        mints: whether the next COMMIT asks for its position.
        committed: the position of that commit, or None.
        replayed: what this server is known to have replayed, or None.
        race: what asks a second replica when this one is slow, or None.
    """

    race: Racer | None = None
    gate: Gate | None = None
    meter: Meter | None = None
    system = 0
    is_direct = False
    mints = False
    committed: Position | None = None
    replayed: Position | None = None
    _has_prepared: frozenset[bytes] = frozenset()

    def _commit_gen(self) -> PQGen[None]:
        this = cast("Any", self)
        if not self.mints or this._tpc or this._pipeline or this._num_transactions:
            yield from cast("Any", super())._commit_gen()
            return
        self.mints = False
        if this.pgconn.transaction_status == TransactionStatus.IDLE:
            return
        self.committed = None
        told = yield from this._part((_SHOW, _POSITIONS))
        if told is not None:
            self._note_committed(*told)
            return
        this.pgconn.send_query(_COMMIT)
        results = yield from generators.execute(this.pgconn)
        for result in results[:2]:
            if result.status == ExecStatus.FATAL_ERROR:
                raise psycopg.errors.error_from_result(result, encoding=this.pgconn._encoding)
        if len(results) == 3:
            self._note_committed(results[0], results[2])

    def _note_committed(self, setting: PGresult, positions: PGresult) -> None:
        if positions.status != ExecStatus.TUPLES_OK:
            return
        flushed, inserted, file = (positions.get_value(0, i) or b"" for i in range(3))
        waited = setting.get_value(0, 0) != b"off"
        self.committed = Position(int(file[:8], 16), lsn_of(flushed if waited else inserted))


def _sending(cursor: Any, pgq: Any, *, prepare: bool | None, binary: bool | None) -> Any:
    """Return what psycopg decided on preparing, and what sends a statement as it would go.

    That returns how many answers the statement has.
    """
    prep, name = cursor._get_prepared(pgq, prepare)

    def send() -> int:
        if prep is Prepare.NO:
            cursor._execute_send(pgq, force_extended=True, binary=binary)
            return 1
        if prep is Prepare.SHOULD:
            cursor._send_prepare(name, pgq)
        cursor._send_query_prepared(name, pgq, binary=binary)
        return 2 if prep is Prepare.SHOULD else 1

    return prep, name, send


def _without(
    answers: list[list[PGresult]], n_first: int, n_last: int
) -> tuple[list[list[PGresult]], list[list[PGresult]]]:
    """Split answers into those to a statement and those to what went before and after it."""
    n_statement = len(answers) - n_last
    around = [*answers[:n_first], *answers[n_statement:]]
    return answers[n_first:n_statement], around


def _accept(cursor: Any, pgq: Any, prep: Any, name: bytes, answers: list[list[PGresult]]) -> None:
    """Give a cursor the answers to its statement, as psycopg does."""
    failed = [found for found in answers if found[0].status not in _SUCCESS]
    if failed:
        cursor._raise_for_result(failed[0][0])
    key = cursor._conn._prepared.maybe_add_to_cache(pgq, prep, name)
    if key is not None:
        cursor._conn._prepared.validate(key, prep, name, answers[-1])
    cursor._check_results(answers[-1])
    cursor._set_results(answers[-1])


class _Minting:
    """What cursors of writers do: a statement that commits itself tells its position.

    It is one that psycopg would have put BEGIN before; see `shardkit.drivers`.
    """

    def _maybe_prepare_gen(
        self, pgq: Any, *, prepare: bool | None = None, binary: bool | None = None
    ) -> PQGen[None]:
        this = cast("Any", self)
        connection = this._conn
        if (
            connection.pgconn.transaction_status != TransactionStatus.IDLE
            or connection.autocommit
            or connection._pipeline
        ):
            yield from cast("Any", super())._maybe_prepare_gen(pgq, prepare=prepare, binary=binary)
            return
        connection.committed = None
        prep, name, send = _sending(this, pgq, prepare=prepare, binary=binary)
        words = None if connection.preamble is None else connection.preamble()
        first = [] if words is None else [b"SELECT " + words]  # in the pipeline's transaction
        last = []
        # A pooler may give the server away between two Syncs when the client is gone by then, and
        # somebody else takes the second answer for theirs: so a pooler is sent one.
        # Source: PgBouncer 1.18, objects.c, disconnect_client.
        if not connection.is_direct:
            first, last = [connection._get_tx_start_command(), *first], [b"COMMIT"]

        def send_all() -> int:
            for text in first:
                connection.pgconn.send_query_params(text, None)
            n_answers: int = send()
            for text in last:
                connection.pgconn.send_query_params(text, None)
            return len(first) + n_answers + len(last)

        _, answers, after = yield from _pipelined(
            connection, _COMMITTING, None, send_all, n_syncs=1 if last else 2
        )
        answers, around = _without(answers, len(first), len(last))
        for (answer,) in around:
            if answer.status == ExecStatus.FATAL_ERROR:
                raise psycopg.errors.error_from_result(answer)
        if after is not None and _is_gone(after):
            connection._has_prepared = frozenset()
        _accept(this, pgq, prep, name, answers)
        connection.committed = position_of(after)


class _Cursor:
    """What both kinds of cursor do; mixed into psycopg's classes."""

    def _maybe_prepare_gen(
        self, pgq: Any, *, prepare: bool | None = None, binary: bool | None = None
    ) -> PQGen[None]:
        this = cast("Any", self)
        connection: Gated = this._conn
        meter = connection.meter
        began = 0.0 if meter is None else meter.began()
        try:
            gate = connection.gate
            if gate is None or not gate.asks or this._conn._pipeline or _CONTROL.match(pgq.query):
                work = cast("Any", super())._maybe_prepare_gen(pgq, prepare=prepare, binary=binary)
            else:
                work = self._gated_gen(gate, pgq, prepare=prepare, binary=binary)
            if gate is not None and gate.is_replica:
                work = _unless_silent(work, gate, this._conn)
            yield from work
        except BaseException as error:
            if isinstance(error, CANNOT_ANSWER) and connection.gate is not None:
                connection.gate.has_refused = connection.gate.is_replica
            if meter is not None:
                failed = isinstance(error, psycopg.OperationalError)
                meter.ended(began, failed=failed and not isinstance(error, _NEUTRAL))
            raise
        if meter is not None:
            meter.ended(began)

    def _gated_gen(
        self, gate: Gate, pgq: Any, *, prepare: bool | None, binary: bool | None
    ) -> PQGen[None]:
        this = cast("Any", self)
        connection: Gated = this._conn
        needed = gate.needed()
        if needed is not None and connection.is_direct and _reaches(connection.replayed, needed):
            needed = None
        if needed is None and not gate.keeps_track:
            yield from cast("Any", super())._maybe_prepare_gen(pgq, prepare=prepare, binary=binary)
            return
        prep, name, send = _sending(this, pgq, prepare=prepare, binary=binary)
        before, answers, after = yield from _pipelined(this._conn, gate, needed, send)
        if before is not None and _is_gone(before):  # nothing ran after it
            connection._has_prepared = frozenset()
            before, answers, after = yield from _pipelined(this._conn, gate, needed, send)
        if needed is not None:
            self._let_through(gate, before, needed)
        _accept(this, pgq, prep, name, answers)
        if gate.keeps_track:
            if after is None or _is_gone(after):
                connection._has_prepared = frozenset()
                _, _, after = yield from _pipelined(this._conn, gate, None, lambda: 0)
            self._keep_track(gate, position_of(after))

    def _keep_track(self, gate: Gate, position: Position | None) -> None:
        """Note the position after a statement, which is where a later reader has to go on."""
        if position is None:
            gate.has_lost_track = True
        else:
            gate.seen = position
            if gate.is_replica:
                cast("Any", self)._conn.replayed = position

    def _let_through(self, gate: Gate, answer: PGresult | None, needed: Position) -> None:
        """Refuse the answer of a replica that has not replayed what is needed."""
        connection: Gated = cast("Any", self)._conn
        position = position_of(answer)
        if position is not None and gate.is_replica:
            connection.replayed = position
        if not _reaches(position, needed):
            raise NotReplayedError(f"not replayed up to {lsn_text(needed.lsn)} yet")


def _race_of(connection: Any, query: object) -> Racer | None:
    """Return who runs a statement: a connection's race if it has one and is in no transaction."""
    race: Racer | None = connection.race
    if (
        race is None
        or parallel.is_together()
        or not connection.autocommit
        or connection.pgconn.transaction_status != TransactionStatus.IDLE
        or (isinstance(query, str) and _BEGINS.match(query))
    ):
        return None
    return race


class Cursor(_Cursor, drivers.Bounded, psycopg.Cursor[Any]):
    """A cursor of a thread."""

    def execute(self, query: Any, params: Any = None, **options: Any) -> Any:
        """Run a statement, at the connection's race if there is one."""
        race = _race_of(self._conn, query)
        if race is None:
            return super().execute(query, params, **options)
        run = psycopg.Cursor.execute
        race.run(self, lambda cursor: run(cursor, query, params, **options))
        return self


class AsyncCursor(_Cursor, drivers.Bounded, psycopg.AsyncCursor[Any]):
    """A cursor of an event loop."""

    async def execute(self, query: Any, params: Any = None, **options: Any) -> Any:
        """Run a statement; see `Cursor.execute`."""
        race = _race_of(self._conn, query)
        if race is None:
            return await super().execute(query, params, **options)
        run = psycopg.AsyncCursor.execute
        await race.run_task(self, lambda cursor: run(cursor, query, params, **options))
        return self


class WriteCursor(drivers._Joining, _Minting, psycopg.Cursor[Any]):
    """A writer's cursor of a thread."""


class AsyncWriteCursor(drivers._Joining, _Minting, psycopg.AsyncCursor[Any]):
    """A writer's cursor of an event loop."""


class Connection(Gated, waits.Connection):
    """A connection of a thread on which no transaction is begun by itself: a reader's."""


class AsyncConnection(Gated, waits.AsyncConnection):
    """The same of an event loop."""


class Writer(Gated, drivers.Connection):
    """A writer's connection of a thread."""


class AsyncWriter(Gated, drivers.AsyncConnection):
    """A writer's connection of an event loop."""


def lsn_of(text: bytes | str) -> int:
    """Return the log position of PostgreSQL's text: `0/300DAE8`."""
    high, _, low = (text.decode() if isinstance(text, bytes) else text).partition("/")
    return (int(high, 16) << 32) | int(low, 16)


def lsn_text(lsn: int) -> str:
    """Return PostgreSQL's text of a log position."""
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"


def position_of(result: PGresult | None) -> Position | None:
    """Return the position in an answer, None when there is none."""
    if result is None or result.status != ExecStatus.TUPLES_OK:
        return None
    lsn, _, timeline = (result.get_value(0, 0) or b"").partition(b" ")
    # A primary names the file of its log, of which the timeline is the first 8 digits.
    return Position(int(timeline[:8], 16), lsn_of(lsn)) if timeline else None


def _reaches(position: Position | None, needed: Position) -> bool:
    return (
        position is not None and position.timeline == needed.timeline and position.lsn >= needed.lsn
    )


def _pipelined(
    connection: Any,
    gate: Gate,
    needed: Position | None,
    send: Callable[[], int],
    *,
    n_syncs: int = 1,
) -> PQGen[tuple[PGresult | None, list[list[PGresult]], PGresult | None]]:
    """Ask, run a statement and ask again, in one round trip.

    Returns:
        the answer before, the answers to what `send` sent, and the answer after.
    """
    server = connection.pgconn
    server.enter_pipeline_mode()
    found: list[list[PGresult]] = []
    try:
        n_before = 0
        if needed is not None:
            text, patience = lsn_text(needed.lsn).encode(), gate.patience
            if server.server_version >= WAITS_FOR_LSN and patience:
                server.send_query_params(wait_for(needed.lsn, patience), None)
                n_before, patience = 1, 0
            n_before += _ask(connection, _REPLAYED, [text, b"%d" % patience])
        n_after = n_before + send()
        if n_syncs == 2:  # the first commits, and the position is to be that after it
            server.pipeline_sync()
        if gate.keeps_track and gate.is_replica:
            _ask(connection, _REPLAYED, [b"0/0", b"0"])
        elif gate.keeps_track:
            _ask(connection, _WRITTEN, None)
        server.pipeline_sync()
        yield from generators.send(server)
        while n_syncs:
            results = yield from generators.fetch_many(server)
            if results and results[-1].status == ExecStatus.PIPELINE_SYNC:
                n_syncs -= 1
            else:
                found.append(results)
        server.exit_pipeline_mode()
    except BaseException as error:
        said = [r for results in found for r in results if r.status == ExecStatus.FATAL_ERROR]
        if server.status == ConnStatus.OK:
            server.finish()  # half a conversation is left on it
        if said and isinstance(error, psycopg.OperationalError):  # before the other side hung up
            raise psycopg.errors.error_from_result(said[0]) from None
        raise
    before = found[n_before - 1][0] if n_before else None
    after = found[-1][0] if len(found) > n_after else None
    return before, found[n_before:n_after], after


def _unless_silent(work: PQGen[None], gate: Gate, connection: Any) -> PQGen[None]:
    """Drive a generator of psycopg, and give up a server that has fallen silent.

    psycopg wakes it every tenth of a second. A slow statement goes on as long as the server
    answers the probes.
    """
    try:
        wanted = next(work)
        while True:
            ready = yield wanted
            if not ready and gate.is_silent():
                connection.pgconn.finish()
                raise SilentError("neither the statement nor the probes are answered")
            wanted = work.send(ready)
    except StopIteration:
        return


def wait_for(lsn: int, patience: int) -> bytes:
    """Return the statement that waits in the server, from PostgreSQL 19 on.

    It holds no snapshot while it waits. Not run in our tests, which have no such server.
    """
    return b"WAIT FOR LSN '%s' WITH (TIMEOUT '%dms', NO_THROW)" % (
        lsn_text(lsn).encode(), patience,
    )  # fmt: skip


def _ask(connection: Any, question: bytes, parameters: list[bytes] | None) -> int:
    """Send a question, prepared once where statements may be; return how many answers it has."""
    server, name = connection.pgconn, _PREPARED[question]
    if connection.prepare_threshold is None:
        server.send_query_params(question, parameters)
        return 1
    is_new = name not in connection._has_prepared
    if is_new:
        server.send_prepare(name, question)
        connection._has_prepared |= {name}
    server.send_query_prepared(name, parameters)
    return 1 + is_new


def _is_gone(result: PGresult) -> bool:
    return result.status == ExecStatus.FATAL_ERROR and (
        result.error_field(psycopg.pq.DiagnosticField.SQLSTATE) == _GONE
    )
