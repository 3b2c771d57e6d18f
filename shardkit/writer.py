"""The session that writes: a `ReadSession` on the primaries with one transaction for each.

Everything on one physical shard commits together, however many logical shards it touches; what
would write to two is refused before anything is written.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, cast

import psycopg
from sqlalchemy import Connection, Engine, Insert, Table, event, insert, update
from sqlalchemy.exc import DBAPIError, PendingRollbackError
from sqlalchemy.exc import TimeoutError as PoolExhaustedError
from sqlalchemy.orm import (
    InstanceState,
    ORMExecuteState,
    Session,
    SessionTransaction,
    UOWTransaction,
)
from sqlalchemy.orm.attributes import instance_state

from shardkit import emitting, gates, parts, writes
from shardkit.broadcasts import copy, is_reference, lock
from shardkit.checks import connection_error, late_error
from shardkit.claims import Claims
from shardkit.connections import AsyncConnections, Connections, Purpose
from shardkit.emitter import EmittingSession
from shardkit.errors import (
    CrossShardWriteError,
    DeadlineExceededError,
    EndpointUnavailableError,
    OutcomeUnknownError,
    ShardKeyChangeError,
    ShardkitError,
    StatementTimeoutError,
    UnavailableError,
    UnsupportedStatementError,
)
from shardkit.events import Committed, caller
from shardkit.freshness import driver_of
from shardkit.gates import Position
from shardkit.lone import is_lone_insert
from shardkit.placing import Placer, sharding_of_mapper, stored_shard
from shardkit.relationships import relationships_set_key
from shardkit.statements import Limits, limits_of
from shardkit.strategies import Rule
from shardkit.timeouts import limited
from shardkit.tokens import Token, joined, mint
from shardkit.topology import Endpoint, Role
from shardkit.twophase import AtomicCommit
from shardkit.uniques import Value
from shardkit.waits import WaitedTooLongError

__all__ = ["WriteSession"]

_Driver = gates.Writer | gates.AsyncWriter

_FAILED = psycopg.pq.TransactionStatus.INERROR


class WriteSession(EmittingSession):
    """A session on the primaries that may write.

    A transaction spans as many logical shards as one physical shard holds; a unit of work over
    two physical shards is refused before anything is written. Reads see the session's own
    writes. Objects stay usable after commit: nothing is expired.

    Args:
        connections: of the cluster.
        atomic: whether a unit of work may write to several physical shards, in two phases.
        **options: as for SQLAlchemy's `Session`.

    Attributes:
        pending: after a commit in two phases, the physical shards that had not answered yet:
            what was written there holds, and is seen as soon as the resolver gets through.

    Made by `Cluster.writer`.
    """

    role: ClassVar[Role] = Role.PRIMARY
    purpose: ClassVar[Purpose] = Purpose.WRITE

    def __init__(
        self,
        connections: Connections | AsyncConnections,
        *,
        atomic: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(connections, **options)
        self._atomic = atomic
        self._atomic_commit: AtomicCommit | None = None
        self._broadcast: dict[int, tuple[InstanceState[Any], Any]] = {}  # of this flush
        self._is_broadcasting = False  # whether this transaction holds the lock
        self._is_two_phase = False  # the commit under way, or the last one
        self._is_committing = False  # from the last flush until COMMIT is answered
        self.pending: tuple[str, ...] = ()
        self._written: set[str] = set()
        self._placed: dict[int, int] = {}  # logical shard of each object, by its identity
        self._token = Token()
        self._is_lone = False  # while committing what is one INSERT and nothing else
        self._lone_driver: _Driver | None = None  # what that is sent over
        self._claims = Claims(connections, self._connection_to)

    @property
    def token(self) -> str:
        """After a commit, what a later reader must have seen; an empty string before."""
        return self._token.text if self._token.marks or not self._token.is_readable else ""

    def flush(self, objects: Sequence[Any] | None = None) -> None:
        """Write what was added, changed and deleted; ids are minted here.

        Raises:
            CrossShardWriteError: it would touch two physical shards; nothing was written.
            ShardKeyChangeError: the shard key of a stored object was changed.
            InvalidShardKeyError: the key of an object cannot place it.
            NoShardKeyError: an object has no shard key.
            UniqueViolationError: another row has the value of a unique column.
            InvalidUniqueValueError: a value cannot be kept unique.
            ValueBusyError: another transaction is about to take or give one up (retryable).
            EndpointUnavailableError: the primary does not answer (retryable).
        """
        try:
            Session.flush(self, objects)
            if self._broadcast and len(self._cluster.physical) > 1:
                self._copy_broadcast()
        except DBAPIError as error:
            self._raise(error)
        finally:
            self._placed.clear()
            self._broadcast.clear()

    def commit(self) -> None:
        """Flush and commit.

        What is one INSERT and nothing else is sent without BEGIN and COMMIT.

        Raises:
            UnsupportedStatementError: `Cluster.run` or a relay commits this session itself.
            OutcomeUnknownError: the answer to COMMIT was lost or late, so it may or may not hold.
            DeadlineExceededError: no time was left to send COMMIT; nothing holds (retryable).
            sqlalchemy.exc.PendingRollbackError: a statement of the transaction failed;
                PostgreSQL would answer COMMIT with a silent ROLLBACK.
        """
        if self._is_unit:
            raise UnsupportedStatementError(
                "commit() inside cluster.run() or once()",
                hint="return from the function, and it is committed",
            )
        self._commit_unit()

    def _commit_unit(self) -> None:
        if not self._roots and not self._emissions.pending and is_lone_insert(self):
            self._flush_lone()
        else:
            self.flush()
        self._refuse_failed()
        try:
            super().commit()
        except Exception as error:
            self.rollback()  # and find out what became of it: `_on_end`
            if not isinstance(error, DBAPIError):
                raise
            found = emitting.refusal(error) or late_error(error)
            if found is None:
                raise
            raise found from error

    def _refuse_failed(self) -> None:
        if any(root.invalidated for _, root in self._roots.values()) or any(
            driver.pgconn.transaction_status == _FAILED for driver in self._drivers
        ):
            raise PendingRollbackError(
                "a statement of this transaction failed; call rollback() and begin again"
            )

    def _flush_lone(self) -> None:
        """Flush what the server commits by itself, so that a lost answer is a lost outcome."""
        self._is_lone = True
        try:
            self.flush()
        except (EndpointUnavailableError, DeadlineExceededError, StatementTimeoutError) as error:
            driver = self._lone_driver
            if driver is not None and not driver.is_alone and not _is_undone(driver, error):
                raise OutcomeUnknownError from error
            raise
        finally:
            self._is_lone = False
            self._lone_driver = None

    def rollback(self) -> None:
        """Undo everything since the last commit."""
        super().rollback()
        self._ended()

    # -- units of work

    def _prepare_flush(self) -> None:
        """Mint ids, place objects and check the unit of work, before anything is written."""
        cluster = self._cluster
        placed = self._placed
        if self._new:
            new = list(self._new.values())
            placed |= self._decided(
                lambda router: Placer(router, cluster.placement, cluster.ids).run(new), assign=True
            )
        if self._deleted or self.identity_map.check_modified():
            for obj in (*self.deleted, *self.dirty):
                shard = self._stored_shard(obj)
                if shard is not None:
                    placed[id(obj)] = shard
        if placed:
            self._note_written(placed.values(), self._described)
            self._claims.flush(self)
        changed = (obj for obj in self.dirty if self.is_modified(obj))
        if any(
            is_reference(instance_state(o).mapper.local_table)
            for o in (*self.new, *changed, *self.deleted)
        ):
            self._begin_broadcast()

    def _begin_broadcast(self) -> None:
        """Take the turn of this transaction to write reference tables, if it has not yet.

        Raises:
            CrossShardWriteError: the session is not atomic, and there are several physical shards.
            StatementTimeoutError: another broadcast takes too long (retryable).
        """
        servers = sorted(self._cluster.physical)
        if len(servers) > 1 and not self._atomic:
            raise CrossShardWriteError(
                f"reference tables are written on {', '.join(servers)} together",
                hint="use cluster.writer(atomic=True)",
            )
        if len(servers) > 1 and not self._is_broadcasting:
            self._is_broadcasting = True
            lock([self._scattering(physical) for physical in servers])
        self._note_written(range(self._cluster.router.total))  # a token is for every reader of it
        self._written |= set(servers)

    def _copy_broadcast(self) -> None:
        """Copy what was flushed on the home to the other servers."""
        home, *others = sorted(self._cluster.physical)
        changed: dict[Table, set[Any]] = {}
        for state, before in self._broadcast.values():
            keys = {before, state.identity} - {None}
            for table in state.mapper.tables:
                assert isinstance(table, Table)
                changed.setdefault(table, set()).update(keys)
        copy(self._scattering(home), [self._scattering(physical) for physical in others], changed)

    def _described(self) -> dict[str, list[str]]:
        """Return the objects of the unit of work by the physical shard they are written to."""
        described: dict[str, list[str]] = {}
        for obj in (*self.new, *self.dirty, *self.deleted):
            shard = self._placed.get(id(obj))
            if shard is not None:
                identity = instance_state(obj).identity or instance_state(
                    obj
                ).mapper.primary_key_from_instance(obj)
                name = f"{type(obj).__name__} {', '.join(map(str, identity))}"
                described.setdefault(self._cluster.physical_of(shard), []).append(name)
        return described

    def _stored_shard(self, obj: Any) -> int | None:
        return self._decided(lambda router: stored_shard(obj, router))

    def _named(self, rule: Rule, key: Any) -> int:
        return self._decided(lambda router: router.shard(rule, key))

    def _note_written(
        self, shards: Iterable[int], described: Callable[[], dict[str, list[str]]] = dict
    ) -> None:
        noted = set(shards)
        self._written = self._allowed(noted, described)
        self._written_shards |= noted
        for physical in self._written:
            if physical in self._roots:  # COMMIT asks for its position
                driver_of(self._roots[physical][1]).mints = True

    def _prepares(self) -> bool:
        """Tell whether the transaction will be prepared: it has written to several servers."""
        return len(self._written) > 1

    def _allowed(
        self, shards: Iterable[int], described: Callable[[], dict[str, list[str]]] = dict
    ) -> set[str]:
        """Return the physical shards written to, with those of `shards`.

        Raises:
            CrossShardWriteError: they are several, and the session is not atomic.
        """
        together = {self._cluster.physical_of(shard) for shard in shards} | self._written
        if len(together) > 1 and not self._atomic:
            names = described()
            what = "; ".join(
                f"{physical} ({_shortened(names[physical])})" if physical in names else physical
                for physical in sorted(together)
            )
            raise CrossShardWriteError(
                f"the unit of work would write to {what}",
                hint="keep rows that change together under one shard key, or use "
                "cluster.writer(atomic=True), or session.emit() an event for what may follow later",
            )
        return together

    def connection_callable(self, mapper: Any = None, instance: Any = None, **_: Any) -> Connection:
        """Return the connection of an object's logical shard; called by SQLAlchemy at flush."""
        if is_reference(instance_state(instance).mapper.local_table):
            self._begin_broadcast()
            state = instance_state(instance)
            self._broadcast.setdefault(id(state), (state, state.identity))
            return self._scattering(min(self._cluster.physical))
        shard = self._placed.get(id(instance))
        if shard is None:  # the flush itself found it, through a relationship
            shard = self._stored_shard(instance)
            if shard is None:
                raise UnsupportedStatementError(
                    f"{type(instance).__name__} is not a sharded class, so it lives nowhere",
                    hint="derive it from Sharded or Reference",
                )
            self._note_written((shard,))
        state = instance_state(instance)
        if relationships_set_key(state.mapper):
            self._refuse_moved(state, shard)
        connection = self._connection_to(shard)
        self._cluster.fingerprints.check(state.mapper)
        return connection

    def _refuse_moved(self, state: InstanceState[Any], shard: int) -> None:
        """Refuse an object whose key a relationship filled in after the unit was checked."""
        sharding = sharding_of_mapper(state.mapper)
        key = None if sharding is None else state.dict.get(sharding.key)
        if sharding is not None and key is not None:
            named = self._named(sharding.rule, key)
            if named != shard:
                raise ShardKeyChangeError(
                    f"a relationship set {state.mapper.class_.__name__}.{sharding.key}, "
                    f"which names logical shard {named}",
                    logical_shard=shard,
                )

    def _run(self, state: ORMExecuteState) -> Any:
        self._flush_deferred()
        is_write = state.is_insert or state.is_update or state.is_delete
        if is_write and "logical_shard" not in state.bind_arguments:
            return self._write(state)
        result = super()._run(state)
        if is_write and writes.is_bulk(state):
            raise UnsupportedStatementError(
                "rows of a class for a logical shard given by number",
                hint="leave bind_arguments out: each row names its shard",
            )
        if result is not None or state.is_select:
            return result
        shard = state.bind_arguments["logical_shard"]
        if is_write:
            self._claims.refuse(state.statement, state.parameters, numbered=True)
        self._note_written((shard,))
        if (state.is_update or state.is_delete) and self._is_about_objects(state):
            # Its condition need not name the shard: objects of other shards may meet it.
            part = parts.Part(shard, state.statement, state.parameters)
            return writes.run(state, [part], self._connection_to, self._shard_of_identity)
        return None

    def _is_about_objects(self, state: ORMExecuteState) -> bool:
        mapper = state.bind_mapper
        return state.is_orm_statement and mapper is not None and bool(sharding_of_mapper(mapper))

    def _write(self, state: ORMExecuteState) -> Any:
        """Run an INSERT, UPDATE or DELETE on the logical shards of its rows."""
        found = self._parts(state)
        self._note_written(part.shard for part in found)
        if self._cluster.listeners:
            self._tell_routed(state, tuple(sorted(part.shard for part in found)))
        self._claims.statement(self, state.statement, found)
        limits = limits_of(state.statement) or Limits()
        if limits.partial or limits.max_rows is not None:
            raise UnsupportedStatementError(
                "all_shards(partial=…) and all_shards(max_rows=…) in a write",
                hint="a write is done whole or not at all; they limit what is read",
            )
        if len(found) == 1 and not writes.is_bulk(state) and limits.timeout is None:
            state.statement = found[0].statement
            state.parameters = found[0].params
            state.bind_arguments["logical_shard"] = found[0].shard
            return None
        if state.bind_mapper is not None:
            self._cluster.fingerprints.check(state.bind_mapper)
        if limits.timeout is None:
            return writes.run(state, found, self._connection_to, self._shard_of_identity)
        self._autoflush()  # what it writes must not be undone with the statement
        try:
            with limited(self._connection_to(found[0].shard), limits.timeout):
                return writes.run(state, found, self._connection_to, self._shard_of_identity)
        except StatementTimeoutError:
            self._note_lost()
            raise

    def _parts(self, state: ORMExecuteState) -> list[parts.Part]:
        statement: Any = state.statement
        params: Any = state.parameters
        parts.refuse_unwritable(statement, params)
        self._claims.refuse(statement, params)
        cluster = self._cluster
        if isinstance(statement, Insert):
            shards = self._decided(
                lambda router: parts.placed_rows(statement, params, router, cluster.placement),
                assign=True,
            )
            # Before ids are minted and anything is written.
            self._allowed(shards)
            return parts.inserts(statement, params, shards, cluster.ids.mint)
        if isinstance(params, list | tuple):
            mapper = state.bind_mapper if writes.is_bulk(state) else None
            return self._decided(
                lambda router: parts.changes_of_rows(statement, params, router, mapper)
            )
        route = self._route(statement, params)
        if len(route) == 1:
            return [parts.Part(route[0], statement, params)]
        return self._decided(lambda router: parts.changes(statement, params, router, route))

    def _shard_of_identity(self, obj: Any) -> int | None:
        state = instance_state(obj)
        sharding = sharding_of_mapper(state.mapper)
        identity = state.identity
        if sharding is None or identity is None:
            return None
        return self._decided(lambda router: sharding.shard_of_identity(router, identity))

    def _bulk_save_mappings(
        self,
        mapper: Any,
        mappings: Iterable[Any],
        *,
        isupdate: bool,
        isstates: bool,
        return_defaults: bool,
        update_changed_only: bool,
        render_nulls: bool,
    ) -> None:
        """Run what SQLAlchemy's `bulk_insert_mappings` and `bulk_update_mappings` ask for."""
        if isstates:
            raise UnsupportedStatementError(
                "bulk_save_objects()", hint="use session.add_all(), which mints ids"
            )
        if return_defaults:
            raise UnsupportedStatementError(
                "bulk_insert_mappings() with return_defaults",
                hint="use session.scalars(insert(…).returning(…), rows)",
            )
        rows = list(mappings)
        if not rows:
            return
        if isupdate:
            options = {"synchronize_session": False, "autoflush": False}
            self.execute(update(mapper), rows, execution_options=options)
        else:
            options = {"render_nulls": render_nulls, "autoflush": False}
            self.execute(insert(mapper), rows, execution_options=options)

    def _looked_up(self, values: Iterable[Value]) -> dict[Value, frozenset[int]]:
        self._autoflush()  # what it writes may have the values
        return self._cluster.lookups.shards(values)

    def _looked_up_ids(self, value: Value) -> list[int]:
        self._autoflush()
        return [pair.id for pair in self._cluster.lookups.read([value])[value]]

    def _writable(self) -> None:
        return

    def _before_commit(self) -> None:
        """Do what has to be done between the last write and COMMIT.

        The order is that of promises: everything written is flushed first; what must hold with it
        joins its transactions (events: `EmittingSession`, called before); then, over several
        servers, all of it is prepared and decided. The rest of a decided commit cannot fail any
        more: see `_on_commit`.
        """
        if self._atomic_commit is not None:
            raise PendingRollbackError("this commit failed before; call rollback() and begin again")
        self.flush()  # SQLAlchemy's own flush comes later
        self._refuse_failed()
        self._is_committing = True
        # A unit of work without net changes opens no connection.
        roots = {name: self._roots[name][1] for name in self._written if name in self._roots}
        self._is_two_phase = len(roots) > 1
        if not self._is_two_phase:
            return
        self._atomic_commit = AtomicCommit(self._cluster, roots, self._number)
        try:
            self._atomic_commit.prepare()
            self._atomic_commit.decide()
        except DBAPIError as error:
            self._raise(error)

    # -- connections

    def _open(self, physical: str, logical_shard: int | None) -> tuple[Endpoint, Connection]:
        endpoint = self._cluster.primary_of(physical)
        engine = self._cluster.view(endpoint, self.purpose, logical_shard)
        try:
            connection = self._cluster.admitted(
                endpoint, lambda: Session._connection_for_bind(self, engine)
            )
        except (DBAPIError, PoolExhaustedError) as error:
            found = connection_error(error, endpoint)
            if isinstance(found, EndpointUnavailableError | DeadlineExceededError):
                self._cluster.failed(endpoint, found)
            raise found from error
        driver = cast("_Driver", connection.connection.driver_connection)
        driver.mints, driver.committed = physical in self._written, None
        driver.is_alone = self._is_lone
        if self._is_lone:
            self._lone_driver = driver
        self._drivers.append(driver)
        self._roots[physical] = (endpoint, connection)
        return endpoint, connection

    def _root_of(self, engine: Engine) -> Connection:
        # Asked every time, so that each SAVEPOINT gets to know the connection.
        return Session._connection_for_bind(self, super()._root_of(engine).engine)

    def _ended(self) -> None:
        """Forget the connections of a finished transaction; SQLAlchemy has returned them."""
        self._written.clear()
        self._is_broadcasting = False
        self._written_shards.clear()
        self._emissions.clear()
        self._streams.abandon()
        self._shard_views.clear()
        self._roots.clear()
        self._drivers.clear()

    def _release(self) -> None:
        self._ended()

    def _minted(self) -> Token:
        """Return the token of what was just committed."""
        cluster = self._cluster
        epochs = cluster.topology.shard_map.epochs
        tokens: list[Token] = []
        for physical, shards in cluster.group(
            sorted(self._written_shards | self._claims.shards)
        ).items():
            found = self._position(physical)
            if found is None:
                return Token(is_readable=False)
            system, position = found
            marks = {n: epochs[n] for n in shards}
            tokens.append(mint(system, position.timeline, position.lsn, marks))
        return tokens[0] if len(tokens) == 1 else joined(tokens)

    def _position(self, physical: str) -> tuple[int, Position] | None:
        """Return the server and the end of its log, which what was committed lies before."""
        if physical in self._written:
            root = self._roots.get(physical)
            driver = None if root is None or root[1].invalidated else driver_of(root[1])
            if driver is not None and driver.committed is not None and driver.system:
                return driver.system, driver.committed
            if not self._is_two_phase or physical in self.pending:
                return None
        try:
            return self._cluster.written(physical)
        except (UnavailableError, DBAPIError):
            return None

    def _can_retry(self) -> bool:
        """A statement of a transaction is never run again by itself."""
        return False


def _is_undone(driver: _Driver, error: ShardkitError) -> bool:
    """Tell whether the server has said itself that a statement given up has left nothing."""
    cause = error.__cause__.orig if isinstance(error.__cause__, DBAPIError) else None
    if isinstance(cause, WaitedTooLongError):
        return driver.was_undone
    return isinstance(cause, psycopg.errors.QueryCanceled)


@event.listens_for(WriteSession, "before_flush")
def _on_flush(session: Session, _context: UOWTransaction, _objects: Any) -> None:
    assert isinstance(session, WriteSession)
    session._prepare_flush()


def _shortened(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if names[most:] else "")


@event.listens_for(WriteSession, "before_commit")
def _on_before_commit(session: Session) -> None:
    assert isinstance(session, WriteSession)
    if not session.in_nested_transaction():
        session._before_commit()


@event.listens_for(WriteSession, "after_commit")
def _on_commit(session: Session) -> None:
    """Make the token, also where `with session.begin()` commits and `commit` is not called."""
    assert isinstance(session, WriteSession)
    if session.in_nested_transaction():
        return
    session._is_committing = False
    session.pending = ()
    if session._atomic_commit is not None:
        session._atomic_commit.finish()
        session.pending = session._atomic_commit.pending
        session._atomic_commit = None
    session._claims.committed()
    if session._written:
        session._token = session._minted()
        listeners = session._cluster.listeners
        if listeners:
            written = tuple(sorted(session._written | session._claims.physical))
            listeners.emit(Committed(session._number, written, session.token, caller()))


@event.listens_for(WriteSession, "after_transaction_end")
def _on_end(session: Session, transaction: SessionTransaction) -> None:
    """Let go of a transaction that ended, and say so where nobody knows how.

    Raises:
        OutcomeUnknownError: COMMIT was lost with its connection. Also `with session.begin()`
            comes here while that error is under way, and so raises this one.
    """
    assert isinstance(session, WriteSession)
    if transaction.nested:  # a lock taken inside ends with what is rolled back
        session._is_broadcasting = False
    if transaction.parent is not None:
        session._streams.abandon(transaction)
        return
    was_committing, session._is_committing = session._is_committing, False
    was_written = bool(session._written)
    session._ended()
    if session._atomic_commit is not None:  # it did not commit, or nobody knows
        abandoned, session._atomic_commit = session._atomic_commit, None
        abandoned.abandon()
        session._claims.settle()
        return
    session._claims.settle()
    error = sys.exc_info()[1]
    is_lost = isinstance(error, DBAPIError) and error.connection_invalidated
    if was_committing and was_written and is_lost:
        raise OutcomeUnknownError from error


@event.listens_for(WriteSession, "after_flush")
def _on_flushed(session: Session, _context: UOWTransaction) -> None:
    assert isinstance(session, WriteSession)
    session._claims.flushed(session)


@event.listens_for(WriteSession, "after_rollback")
def _on_rollback(session: Session) -> None:
    """Note it also where only a savepoint is returned to."""
    assert isinstance(session, WriteSession)
    session._claims.undone()
