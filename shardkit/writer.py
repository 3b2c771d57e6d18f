"""The session that writes: a `ReadSession` on the primaries with one transaction for each.

Everything on one physical shard commits together, however many logical shards it touches; what
would write to two is refused before anything is written.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, cast

import psycopg
from sqlalchemy import Connection, Engine, event
from sqlalchemy.exc import DBAPIError, PendingRollbackError
from sqlalchemy.exc import TimeoutError as PoolExhaustedError
from sqlalchemy.orm import (
    InstanceState,
    Session,
    SessionTransaction,
    UOWTransaction,
)
from sqlalchemy.orm.attributes import instance_state

from shardkit import emitting
from shardkit.alone import Alone, Driver
from shardkit.broadcasts import Broadcast, is_reference
from shardkit.cachewrites import CacheWrites
from shardkit.checks import connection_error, late_error
from shardkit.connections import AsyncConnections, Connections, Purpose
from shardkit.disks import disk_error
from shardkit.errors import (
    DeadlineExceededError,
    EndpointUnavailableError,
    OutcomeUnknownError,
    PoolTimeoutError,
    ShardKeyChangeError,
    UnsupportedStatementError,
)
from shardkit.events import Committed, caller
from shardkit.lone import is_lone_insert
from shardkit.modifier import ModifyingSession
from shardkit.participants import Ending, Participants
from shardkit.placing import Placer, sharding_of_mapper, stored_shard
from shardkit.relationships import relationships_set_key
from shardkit.strategies import Rule
from shardkit.topology import Endpoint, Role
from shardkit.uniques import Value

__all__ = ["WriteSession"]

_FAILED = psycopg.pq.TransactionStatus.INERROR


class WriteSession(ModifyingSession):
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
        super().__init__(connections, atomic=atomic, **options)
        self._is_committing = False  # COMMIT may have been sent, and is not answered yet
        self._is_committed = False  # it was answered, and the transaction has not ended yet
        self._placed: dict[int, int] = {}  # logical shard of each object, by its identity
        self._alone = Alone()
        self._broadcast = Broadcast(
            self,
            lambda: connections.physical,
            self._scattering,
            self._note_everywhere,
            is_atomic=atomic,
        )
        self._cache_writes = CacheWrites(self, self._placed)
        # In the order of their turns before COMMIT: what waits for others first, what nobody may
        # fail after last.
        self._participants = Participants(
            self._claims, self._broadcast, self._events, self._cache_writes, self._agreement
        )

    @property
    def pending(self) -> tuple[str, ...]:
        """After a commit in two phases, the physical shards that had not answered yet."""
        return self._agreement.pending

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
            self._participants.written()
        except DBAPIError as error:
            self._raise(error)
        finally:
            self._placed.clear()
            self._cache_writes.flush_ended()

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
        if (
            not self._roots
            and not self._events.emissions.pending
            and is_lone_insert(self)
            and not self._cache_writes.concern(next(iter(self._new)))
        ):
            self._alone.run(self.flush)
        else:
            self._is_last_flush = True
            try:
                self.flush()
            finally:
                self._is_last_flush = False
        self._refuse_failed()
        try:
            super().commit()
        except Exception as error:
            self.rollback()  # and find out what became of it: `_on_end`
            if not isinstance(error, DBAPIError):
                raise
            found = emitting.refusal(error) or late_error(error) or disk_error(error)
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
        self._participants.flushing()

    def _before_commit(self) -> None:
        """Have every participant do its part between the last write and COMMIT."""
        self._agreement.refuse_failed()
        self.flush()  # SQLAlchemy's own flush comes later
        try:
            self._participants.send()
            self._refuse_failed()
            self._participants.prepare()
            self._is_committing = True
            self._participants.decide()
        except DBAPIError as error:
            self._raise(error)

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
                described.setdefault(self._physical_of(shard), []).append(name)
        return described

    def _stored_shard(self, obj: Any) -> int | None:
        return self._decided(lambda router: stored_shard(obj, router))

    def _named(self, rule: Rule, key: Any) -> int:
        return self._decided(lambda router: router.shard(rule, key))

    def connection_callable(self, mapper: Any = None, instance: Any = None, **_: Any) -> Connection:
        """Return the connection of an object's logical shard; called by SQLAlchemy at flush."""
        if is_reference(instance_state(instance).mapper.local_table):
            return self._broadcast.connection(instance_state(instance))
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

    def _looked_up(self, values: Iterable[Value]) -> dict[Value, frozenset[int]]:
        self._autoflush()  # what it writes may have the values
        return self._cluster.lookups.shards(values)

    def _looked_up_ids(self, value: Value) -> list[int]:
        self._autoflush()
        return [pair.id for pair in self._cluster.lookups.read([value])[value]]

    def _writable(self) -> None:
        return

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
            is_poolers = isinstance(found, PoolTimeoutError) and isinstance(error, DBAPIError)
            if is_poolers or isinstance(found, EndpointUnavailableError | DeadlineExceededError):
                self._cluster.failed(endpoint, found)
            raise found from error
        driver = cast("Driver", connection.connection.driver_connection)
        driver.mints, driver.committed = physical in self._written, None
        self._alone.opened(driver)
        self._drivers.append(driver)
        self._roots[physical] = (endpoint, connection)
        return endpoint, connection

    def _root_of(self, engine: Engine) -> Connection:
        # Asked every time, so that each SAVEPOINT gets to know the connection.
        return Session._connection_for_bind(self, super()._root_of(engine).engine)

    def _ended(self) -> None:
        """Forget the connections of a finished transaction; SQLAlchemy has returned them."""
        self._map = None
        self._written.clear()
        self._written_shards.clear()
        self._streams.abandon()
        self._shard_views.clear()
        self._roots.clear()
        self._drivers.clear()

    def _ending(self, error: BaseException | None) -> Ending:
        """Return how the transaction ended; whatever is not certain is unknown.

        Args:
            error: what is being raised while it ends, or None.
        """
        if self._is_committed:
            return Ending.COMMITTED
        if not self._is_committing:
            return Ending.ROLLED_BACK
        # Where the server has said why it refused, it has rolled back.
        if isinstance(error, DBAPIError) and not error.connection_invalidated:
            has_said = getattr(error.orig, "sqlstate", None) is not None
            return Ending.ROLLED_BACK if has_said else Ending.UNKNOWN
        return Ending.UNKNOWN

    def _release(self) -> None:
        self._ended()

    def _can_retry(self) -> bool:
        """A statement of a transaction is never run again by itself."""
        return False


@event.listens_for(WriteSession, "before_flush")
def _on_flush(session: Session, _context: UOWTransaction, _objects: Any) -> None:
    assert isinstance(session, WriteSession)
    session._prepare_flush()


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
    session._is_committing, session._is_committed = False, True
    session._participants.finish()
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
    if transaction.parent is not None:
        session._streams.abandon(transaction)
        return
    was_written, is_agreed = bool(session._written), session._agreement.is_under_way
    error = sys.exc_info()[1]
    ending = session._ending(error)
    session._is_committing = session._is_committed = False
    session._ended()
    session._participants.settle(ending)
    is_lost = isinstance(error, DBAPIError) and error.connection_invalidated
    if ending is Ending.UNKNOWN and was_written and is_lost and not is_agreed:
        raise OutcomeUnknownError from error


@event.listens_for(WriteSession, "after_flush")
def _on_flushed(session: Session, _context: UOWTransaction) -> None:
    assert isinstance(session, WriteSession)
    session._participants.flushed()
    if session._is_last_flush:
        session._cache_writes.mark()


@event.listens_for(WriteSession, "after_transaction_create")
def _on_begin(session: Session, transaction: SessionTransaction) -> None:
    assert isinstance(session, WriteSession)
    if transaction.nested:
        session._participants.began(transaction)


@event.listens_for(WriteSession, "after_soft_rollback")
def _on_undone(session: Session, transaction: SessionTransaction) -> None:
    """Tell also where only a savepoint is returned to."""
    assert isinstance(session, WriteSession)
    session._participants.undone(transaction)
