"""The ORM session over all logical shards: one connection and one transaction per physical shard.

`ReadSession` reads from replicas and holds no transaction; `WriteSession` is a `ReadSession` on
the primaries that may also write, so that one is accepted where the other is wanted. The async
twins run the same classes through SQLAlchemy's proxy. A logical shard is a view of its server's
connection in which unqualified tables are those of its schema.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NoReturn, TypeVar

from sqlalchemy import Connection, Engine, Insert, event, inspect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolExhaustedError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapper, ORMExecuteState, Session, SessionTransaction, UOWTransaction
from sqlalchemy.orm.attributes import instance_state

from shardkit import gather, scatter
from shardkit.connections import AsyncConnections, Connections, Purpose, connection_error
from shardkit.errors import (
    CrossShardWriteError,
    EndpointUnavailableError,
    GatherError,
    NoShardKeyError,
    OutcomeUnknownError,
    ReadOnlySessionError,
    ScatterNotAllowedError,
    ShardKeyChangeError,
    UnavailableError,
    UnsupportedStatementError,
)
from shardkit.keylists import KeyLists
from shardkit.placing import Placer, sharding_of_mapper, stored_shard
from shardkit.relationships import refuse_joined_loads
from shardkit.replicas import physical_of_token, token_of
from shardkit.router import Route, Router
from shardkit.statements import AllShards, Params, shards_of
from shardkit.strategies import Rule
from shardkit.topology import Endpoint, Role
from shardkit.walk import expressions_of

__all__ = ["AsyncReadSession", "AsyncWriteSession", "ReadSession", "WriteSession"]

T = TypeVar("T")


class ReadSession(Session):
    """A read-only session on replicas.

    Statements run outside transactions, each on its own snapshot. Every physical shard is read
    from one endpoint for the session's life; a replica that fails is replaced by another one, or
    by the primary, and the statement is run again.

    *Invariant:* at most one connection per physical shard.

    Made by `Cluster.reader`.
    """

    role: ClassVar[Role] = Role.REPLICA
    purpose: ClassVar[Purpose] = Purpose.READ

    def __init__(
        self,
        connections: Connections | AsyncConnections,
        *,
        after: str | None = None,
        max_lag: float | None = None,
        **options: Any,
    ) -> None:
        options.setdefault("expire_on_commit", False)
        super().__init__(**options)
        self._cluster = connections
        self._must_see: frozenset[str] = frozenset()
        if max_lag is not None:
            self._must_see = connections.physical
        elif after is not None:
            self._must_see = physical_of_token(after, connections.physical)
        self._roots: dict[str, tuple[Endpoint, Connection]] = {}
        self._shard_views: dict[Engine, tuple[Connection, Connection]] = {}

    # -- what people call

    def get(self, entity: Any, ident: Any, **options: Any) -> Any:
        """Return the row of a primary key from its own logical shard, or None.

        Args:
            entity: a sharded class.
            ident: its primary key; the id, or the value that places the row, is in it.
            **options: as for SQLAlchemy's `Session.get`.

        Raises:
            InvalidShardKeyError: the key cannot place a row.
        """
        if options.get("with_for_update"):
            self._writable()
        mapper = inspect(entity)
        sharding = sharding_of_mapper(mapper)
        if sharding is not None:
            identity = _identity(mapper, ident)
            shard = self._decided(lambda router: sharding.shard_of_identity(router, identity))
            # Expressions that the class loads may read other rows: its statement is looked into.
            if not expressions_of(mapper):
                options["bind_arguments"] = {
                    **(options.get("bind_arguments") or {}), "logical_shard": shard,
                }  # fmt: skip
        return super().get(entity, ident, **options)

    def route(self, statement: Any, params: Params = None) -> Route:
        """Return where a statement would run and the SQL of each server; runs nothing.

        Keys of directories are looked up.

        Raises:
            RoutingError: it would be refused.
        """
        shards = self._route(statement, params)
        cluster = self._cluster
        branch, tail, lists = statement, "", KeyLists()
        if len(shards) > 1:
            plan = self._decided(lambda router: gather.plan(statement, params, router))
            branch, tail, lists = plan.branch, plan.tail, plan.lists
        texts = (
            (physical, scatter.sql_of(branch, scatter.Scatter(some, tail, lists)))
            for physical, some in cluster.group(shards).items()
        )
        return Route(tuple(shards), cluster.router.total, self.role, tuple(texts))

    def close(self) -> None:
        """Return the connections to their pools; the session can be used again."""
        super().close()
        self._release()

    def flush(self, objects: Sequence[Any] | None = None) -> None:
        """Refuse to write.

        Raises:
            ReadOnlySessionError: something was added, changed or deleted.
        """
        if self._is_clean():
            return
        self._writable()

    # -- routing

    def _decided(self, decide: Callable[[Router], T], *, assign: bool = False) -> T:
        """Return a decision of the router, with the directory keys it needs."""
        cluster = self._cluster
        return cluster.directories.decided(cluster.router, decide, assign=assign)

    def _writable(self) -> None:
        raise ReadOnlySessionError

    def _route(self, statement: Any, params: Params) -> tuple[int, ...]:
        """Return the logical shards of a statement, ascending."""
        assign = self.role is Role.PRIMARY and isinstance(statement, Insert)
        shards = self._decided(lambda router: shards_of(statement, params, router), assign=assign)
        if shards is not None:
            return tuple(sorted(shards))
        if not any(isinstance(option, AllShards) for option in statement._with_options):
            raise ScatterNotAllowedError
        return tuple(range(self._cluster.router.total))

    def _run(self, state: ORMExecuteState) -> Any:
        """Route one statement: the session's do_orm_execute hook."""
        if not state.is_select:
            if state.is_insert or state.is_update or state.is_delete:
                self._writable()
            elif "logical_shard" not in state.bind_arguments:
                raise NoShardKeyError(
                    f"{type(state.statement).__name__} names no logical shard",
                    hint='pass bind_arguments={"logical_shard": n}',
                )
        elif getattr(state.statement, "_for_update_arg", None) is not None:
            self._writable()
        if "logical_shard" in state.bind_arguments:
            if state.is_select and state.is_orm_statement:
                refuse_joined_loads(state.statement, state.bind_mapper, several=False)
            return None
        shards = self._route(state.statement, state.parameters)
        if state.is_select and state.is_orm_statement:
            refuse_joined_loads(state.statement, state.bind_mapper, several=len(shards) > 1)
        if len(shards) == 1:
            state.bind_arguments["logical_shard"] = shards[0]
            return None
        if not state.is_select:
            raise UnsupportedStatementError(
                f"one {type(state.statement).__name__.upper()} over {len(shards)} logical shards",
                hint="run it once for each shard key",
            )
        return self._gather(state, shards)

    def _gather(self, state: ORMExecuteState, shards: Sequence[int]) -> Any:
        """Run one statement per physical shard, in parallel, and merge the answers."""
        plan = self._decided(lambda router: gather.plan(state.statement, state.parameters, router))
        servers = {
            physical: (self._scattering(physical), some)
            for physical, some in self._cluster.group(shards).items()
        }
        if state.bind_mapper is not None:
            self._cluster.fingerprints.check(state.bind_mapper)
        return scatter.run(state, plan, servers, self._cluster.parallel)

    # -- connections

    def get_bind(self, mapper: Any = None, *, logical_shard: int | None = None, **_: Any) -> Engine:
        """Return the engine of a logical shard; called by SQLAlchemy."""
        if logical_shard is None:
            raise NoShardKeyError(
                "the operation names no logical shard",
                hint="use objects of sharded classes, or select() with a shard key",
            )
        physical = self._cluster.physical_of(logical_shard)
        endpoint = (self._roots.get(physical) or self._open(physical, logical_shard))[0]
        if isinstance(mapper, Mapper):
            self._cluster.fingerprints.check(mapper)
        return self._cluster.view(endpoint, self.purpose, logical_shard)

    def _connection_to(self, logical_shard: int) -> Connection:
        """Return this session's connection to a logical shard, opening it on first use."""
        physical = self._cluster.physical_of(logical_shard)
        if physical not in self._roots:
            return self._open(physical, logical_shard)[1]
        return self._connection_for_bind(self.get_bind(logical_shard=logical_shard))

    def _scattering(self, physical: str) -> Connection:
        """Return this session's connection to a physical shard, for statements over schemas."""
        if physical not in self._roots:
            return self._open(physical, None)[1]
        endpoint, _ = self._roots[physical]
        return self._connection_for_bind(self._cluster.view(endpoint, self.purpose, None))

    def _open(self, physical: str, logical_shard: int | None) -> tuple[Endpoint, Connection]:
        """Open this session's connection to a physical shard.

        Args:
            physical: name of the physical shard.
            logical_shard: the logical shard it shows first, or None for many at once.
        """
        cluster = self._cluster
        replicas = cluster.replica_sets[physical]
        tried: set[Endpoint] = set()
        while True:
            must = physical in self._must_see
            endpoint = replicas.primary if must else replicas.choose(excluding=tried)
            engine = cluster.view(endpoint, self.purpose, logical_shard)
            try:
                connection = cluster.connect(engine, endpoint)
            except UnavailableError as error:
                if endpoint.role is Role.PRIMARY:
                    raise
                tried.add(endpoint)
                if isinstance(error, EndpointUnavailableError):
                    replicas.failed(endpoint)
                continue
            replicas.answered(endpoint)
            self._roots[physical] = (endpoint, connection)
            return endpoint, connection

    def _connection_for_bind(self, engine: Any, *_: Any, **__: Any) -> Connection:
        """Return the view of this session's connection that shows one logical shard."""
        root = self._root_of(engine)
        if root.engine is engine:
            return root
        cached = self._shard_views.get(engine)
        if cached is not None and cached[0] is root:
            return cached[1]
        # A view shares the root's transaction and must never begin one of its own.
        shown = Connection(engine, connection=root.connection, _allow_autobegin=False)
        self._shard_views[engine] = (root, shown)
        return shown

    def _root_of(self, engine: Engine) -> Connection:
        for _, root in self._roots.values():
            if engine.pool is root.engine.pool:
                return root
        raise NoShardKeyError("not an engine of this session")

    def _release(self) -> None:
        self._shard_views.clear()
        for _, connection in self._roots.values():
            connection.close()
        self._roots.clear()

    # -- failures

    def _execute_internal(self, statement: Any, *args: Any, **options: Any) -> Any:
        """Run a statement, once more on another endpoint when its connection broke."""
        try:
            return super()._execute_internal(statement, *args, **options)
        except (DBAPIError, GatherError) as error:
            if options.get("_parent_execute_state") is not None or not self._can_retry(error):
                self._raise(error)
            self._abandon_broken()
        try:
            return super()._execute_internal(statement, *args, **options)
        except DBAPIError as error:
            self._raise(error)

    def _can_retry(self, error: DBAPIError | GatherError) -> bool:
        return isinstance(error, GatherError) or error.connection_invalidated

    def _abandon_broken(self) -> None:
        for physical, (endpoint, connection) in list(self._roots.items()):
            views = [v for root, v in self._shard_views.values() if root is connection]
            if connection.invalidated or any(view.invalidated for view in views):
                self._cluster.replica_sets[physical].failed(endpoint)
                del self._roots[physical]
                connection.close()

    def _raise(self, error: DBAPIError | GatherError) -> NoReturn:
        """Raise the shardkit error of a lost connection, or the error itself."""
        if isinstance(error, GatherError) or not error.connection_invalidated or not self._roots:
            raise error
        endpoints = [endpoint for endpoint, _ in self._roots.values()]
        broken = [e for e, root in self._roots.values() if root.invalidated or root.closed]
        raise connection_error(error, (broken or endpoints)[0]) from error


class WriteSession(ReadSession):
    """A session on the primaries that may write.

    A transaction spans as many logical shards as one physical shard holds; a unit of work over
    two physical shards is refused before anything is written. Reads see the session's own
    writes. Objects stay usable after commit: nothing is expired.

    Attributes:
        token: after a commit, what a later reader must have seen; an empty string before.

    Made by `Cluster.writer`.
    """

    role: ClassVar[Role] = Role.PRIMARY
    purpose: ClassVar[Purpose] = Purpose.WRITE

    def __init__(self, connections: Connections | AsyncConnections, **options: Any) -> None:
        super().__init__(connections, **options)
        self._written: set[str] = set()
        self._placed: dict[int, int] = {}  # logical shard of each object, by its identity
        self.token = ""

    def flush(self, objects: Sequence[Any] | None = None) -> None:
        """Write what was added, changed and deleted; ids are minted here.

        Raises:
            CrossShardWriteError: it would touch two physical shards; nothing was written.
            ShardKeyChangeError: the shard key of a stored object was changed.
            InvalidShardKeyError: the key of an object cannot place it.
            NoShardKeyError: an object has no shard key.
            EndpointUnavailableError: the primary does not answer (retryable).
        """
        try:
            Session.flush(self, objects)
        except DBAPIError as error:
            self._raise(error)
        finally:
            self._placed.clear()

    def commit(self) -> None:
        """Flush and commit.

        Raises:
            OutcomeUnknownError: the answer to COMMIT was lost, so it may or may not hold.
        """
        self.flush()
        try:
            super().commit()
        except DBAPIError as error:
            if error.connection_invalidated and self._written:
                raise OutcomeUnknownError from error
            raise

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
            self._note_written(placed.values())

    def _stored_shard(self, obj: Any) -> int | None:
        return self._decided(lambda router: stored_shard(obj, router))

    def _named(self, rule: Rule, key: Any) -> int:
        return self._decided(lambda router: router.shard(rule, key))

    def _note_written(self, shards: Iterable[int]) -> None:
        together = {self._cluster.physical_of(shard) for shard in shards} | self._written
        if len(together) > 1:
            raise CrossShardWriteError(
                f"the unit of work would write to {', '.join(sorted(together))}",
                hint="keep rows that change together under one shard key, or commit in between",
            )
        self._written = together

    def connection_callable(self, mapper: Any = None, instance: Any = None, **_: Any) -> Connection:
        """Return the connection of an object's logical shard; called by SQLAlchemy at flush."""
        shard = self._placed.get(id(instance))
        if shard is None:  # the flush itself found it, through a relationship
            shard = self._stored_shard(instance)
            if shard is None:
                raise UnsupportedStatementError(
                    f"{type(instance).__name__} is not a sharded class, so it lives nowhere",
                    hint="reference tables cannot be written through a session yet",
                )
            self._note_written((shard,))
        # A relationship may have filled the key in after the unit of work was checked.
        state = instance_state(instance)
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
        connection = self._connection_to(shard)
        self._cluster.fingerprints.check(state.mapper)
        return connection

    def _run(self, state: ORMExecuteState) -> Any:
        result = super()._run(state)
        if state.is_insert and state.is_orm_statement and state.parameters:
            raise UnsupportedStatementError(
                "a bulk INSERT of ORM rows", hint="use session.add_all(), which mints ids"
            )
        if result is None and not state.is_select:
            self._note_written((state.bind_arguments["logical_shard"],))
        return result

    def _writable(self) -> None:
        return

    # -- connections

    def _open(self, physical: str, logical_shard: int | None) -> tuple[Endpoint, Connection]:
        endpoint = self._cluster.primary_of(physical)
        engine = self._cluster.view(endpoint, self.purpose, logical_shard)
        try:
            connection = Session._connection_for_bind(self, engine)
        except (DBAPIError, PoolExhaustedError) as error:
            raise connection_error(error, endpoint) from error
        self._roots[physical] = (endpoint, connection)
        return endpoint, connection

    def _root_of(self, engine: Engine) -> Connection:
        # Asked every time, so that each SAVEPOINT gets to know the connection.
        return Session._connection_for_bind(self, super()._root_of(engine).engine)

    def _ended(self) -> None:
        """Forget the connections of a finished transaction; SQLAlchemy has returned them."""
        self._written.clear()
        self._shard_views.clear()
        self._roots.clear()

    def _release(self) -> None:
        self._ended()

    def _can_retry(self, error: DBAPIError | GatherError) -> bool:
        """A statement of a transaction is never run again by itself."""
        del error
        return False


def _identity(mapper: Mapper[Any], ident: Any) -> tuple[Any, ...]:
    if isinstance(ident, dict):
        return tuple(
            ident.get(mapper.get_property_by_column(column).key) for column in mapper.primary_key
        )
    return tuple(ident) if isinstance(ident, tuple | list) else (ident,)


def _executes(connection: Connection, statement: Any, params: Any, options: Any) -> Any:
    return lambda: connection.execute(statement, params or {}, execution_options=options)


@event.listens_for(ReadSession, "do_orm_execute", propagate=True)
def _on_execute(state: ORMExecuteState) -> Any:
    session = state.session
    assert isinstance(session, ReadSession)
    return session._run(state)


@event.listens_for(WriteSession, "before_flush")
def _on_flush(session: Session, _context: UOWTransaction, _objects: Any) -> None:
    assert isinstance(session, WriteSession)
    session._prepare_flush()


@event.listens_for(WriteSession, "after_commit")
def _on_commit(session: Session) -> None:
    """Make the token, also where `with session.begin()` commits and `commit` is not called."""
    assert isinstance(session, WriteSession)
    if session._written and not session.in_nested_transaction():
        session.token = token_of(session._written)


@event.listens_for(WriteSession, "after_transaction_end")
def _on_end(session: Session, transaction: SessionTransaction) -> None:
    assert isinstance(session, WriteSession)
    if transaction.parent is None:
        session._ended()


class AsyncReadSession(AsyncSession):
    """`ReadSession` for asyncio: the same words, awaited."""

    sync_session_class: type[Session] = ReadSession
    sync_session: ReadSession

    def __init__(self, connections: AsyncConnections, **options: Any) -> None:
        super().__init__(
            sync_session_class=type(self).sync_session_class, connections=connections, **options
        )

    def route(self, statement: Any, params: Params = None) -> Route:
        """Return where a statement would run; runs nothing. See `ReadSession.route`.

        Raises:
            UnsupportedStatementError: a directory has to be asked first, which has to be awaited.
        """
        return self.sync_session.route(statement, params)


class AsyncWriteSession(AsyncReadSession):
    """`WriteSession` for asyncio: the same words, awaited."""

    sync_session_class: type[Session] = WriteSession
    sync_session: WriteSession

    @property
    def token(self) -> str:
        """After a commit, what a later reader must have seen; an empty string before."""
        return self.sync_session.token
