"""The session that reads: every logical shard through one ORM session, from replicas.

One connection per physical shard, no transaction. A logical shard is a view of its server's
connection in which unqualified tables are those of its schema. `shardkit.writer` builds on it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NoReturn, TypeVar

from sqlalchemy import Connection, Engine, Insert, event, inspect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Mapper, ORMExecuteState, Session

from shardkit import gather, scatter
from shardkit.connections import AsyncConnections, Connections, Purpose, connection_error
from shardkit.errors import (
    EndpointUnavailableError,
    GatherError,
    NoShardKeyError,
    ReadOnlySessionError,
    ScatterNotAllowedError,
    StatementTimeoutError,
    TooManyShardsError,
    UnavailableError,
    UnsupportedStatementError,
)
from shardkit.events import Gathered, StatementRouted, caller
from shardkit.identities import identities, select_identities
from shardkit.placing import sharding_of_mapper
from shardkit.relationships import refuse_joined_loads
from shardkit.replicas import physical_of_token
from shardkit.router import Route, Router
from shardkit.shapes import expressions_of
from shardkit.statements import Limits, Params, limits_of, shards_of
from shardkit.timeouts import limited
from shardkit.topology import Endpoint, Role

__all__ = ["ReadSession"]

T = TypeVar("T")

_NUMBERS = itertools.count(1)
_NO_LIMITS = Limits()


class ReadSession(Session):
    """A read-only session on replicas.

    Statements run outside transactions, each on its own snapshot. Every physical shard is read
    from one endpoint for the session's life; a replica that fails is replaced by another one, or
    by the primary, and the statement is run again.

    Attributes:
        failures: after a statement with `all_shards(partial=True)`, the error of each physical
            shard whose rows are missing, by name; empty when all answered.

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
        self._number = next(_NUMBERS)
        self.failures: Mapping[str, Exception] = {}
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

    def get_many(
        self, entity: Any, idents: Iterable[Any], *, options: Sequence[Any] = ()
    ) -> list[Any]:
        """Return the rows of many primary keys, in their order, None where there is no row.

        What the session holds is not asked for; the rest takes one statement per physical shard,
        however many keys there are.

        Args:
            entity: a sharded class.
            idents: primary keys, in which each says where its row is; duplicates are allowed.
                A composite key is a tuple, or a dictionary by attribute.
            options: loader options, as for `select().options()`.

        Raises:
            InvalidShardKeyError: a key cannot place a row, or has too few or too many values.
        """
        mapper = inspect(entity)
        wanted = identities(mapper, idents)
        keys = [mapper.identity_key_from_primary_key(identity) for identity in wanted]
        found: dict[Any, Any] = {}
        for key in keys:
            held = self.identity_map.get(key)
            if isinstance(held, mapper.class_) and not inspect(held).expired:
                found[key] = held
        missing = {
            key: identity
            for key, identity in zip(keys, wanted, strict=True)
            if key not in found and None not in identity
        }
        if missing:
            statement = select_identities(mapper, list(missing.values())).options(*options)
            for row in self.scalars(statement).unique():
                found[inspect(row).key] = row
        return [found.get(key) for key in keys]

    def route(self, statement: Any, params: Params = None) -> Route:
        """Return where a statement would run and the SQL of each server; runs nothing.

        Keys of directories are looked up.

        Raises:
            RoutingError: it would be refused.
        """
        shards = self._route(statement, params)
        cluster = self._cluster
        max_rows = (limits_of(statement) or _NO_LIMITS).max_rows or cluster.max_rows
        branch, plan = statement, None
        if len(shards) > 1:
            plan = self._decided(lambda router: gather.plan(statement, params, router))
            branch = plan.branch
        texts = (
            (physical, scatter.sql_of(branch, scatter.of(plan, some, max_rows)))
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

    def _bulk_save_mappings(self, *_: Any, **__: Any) -> None:
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
        limits = limits_of(statement)
        if shards is None:
            if limits is None:
                raise ScatterNotAllowedError
            shards = frozenset(range(self._cluster.router.total))
        if limits is not None and len(shards) > (limits.max_shards or len(shards)):
            raise TooManyShardsError(
                f"{len(shards)} logical shards to ask, and {limits.max_shards} allowed",
                hint="name fewer keys, or all_shards(max_shards=…)",
            )
        return tuple(sorted(shards))

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
            if self._cluster.listeners:
                self._tell_routed(state, (state.bind_arguments["logical_shard"],))
            return None
        shards = self._route(state.statement, state.parameters)
        if state.is_select and state.is_orm_statement:
            refuse_joined_loads(state.statement, state.bind_mapper, several=len(shards) > 1)
        if len(shards) == 1:
            state.bind_arguments["logical_shard"] = shards[0]
            if self._cluster.listeners:
                self._tell_routed(state, shards)
            limits = limits_of(state.statement)
            return None if limits is None else self._limited(state, shards[0], limits)
        if not state.is_select:
            raise UnsupportedStatementError(
                f"one {type(state.statement).__name__.upper()} over {len(shards)} logical shards",
                hint="run it once for each shard key",
            )
        return self._gather(state, shards)

    def _limited(self, state: ORMExecuteState, shard: int, limits: Limits) -> Any:
        """Run a statement of one logical shard within limits of its own, if it has any."""
        if not state.is_select or limits.timeout is limits.max_rows is None:
            return None
        if limits.timeout is None:
            result = state.invoke_statement()
        else:
            self._autoflush()  # what it writes must not be undone with the statement
            try:
                with limited(self._connection_to(shard), limits.timeout):
                    result = state.invoke_statement()
            except StatementTimeoutError as error:
                error.logical_shard = shard
                self._note_lost()
                raise
        # -1 where rows are streamed, and so never held.
        n_rows = getattr(getattr(result, "raw", result), "rowcount", -1)
        if limits.max_rows is not None and n_rows > limits.max_rows:
            result.close()
            raise scatter.too_many_rows(limits.max_rows)
        return result

    def _gather(self, state: ORMExecuteState, shards: Sequence[int]) -> Any:
        """Run one statement per physical shard, in parallel, and merge the answers."""
        cluster, limits = self._cluster, limits_of(state.statement) or _NO_LIMITS
        if limits.partial and self.role is Role.PRIMARY:
            raise UnsupportedStatementError(
                "partial results inside a transaction", hint="ask for them in cluster.reader()"
            )
        plan = self._decided(lambda router: gather.plan(state.statement, state.parameters, router))
        if state.bind_mapper is not None:
            cluster.fingerprints.check(state.bind_mapper)
        gathering = scatter.Gathering(
            state, plan, max_rows=limits.max_rows or cluster.max_rows, timeout=limits.timeout
        )
        started = cluster.clock.monotonic()
        groups = cluster.group(shards)
        failures = self._asked(state, gathering, groups)
        lost = {name: groups[name] for name, e in failures.items() if scatter.is_lost(e)}
        if lost and self._can_retry():
            self._abandon_broken()
            failures = {name: e for name, e in failures.items() if name not in lost}
            failures |= self._asked(state, gathering, lost)
        # Taken before any is let go: locating one failure abandons every broken connection.
        endpoints = {name: endpoint for name, (endpoint, _) in self._roots.items()}
        failures = {name: self._located(e, endpoints.get(name)) for name, e in failures.items()}
        if cluster.listeners:
            seconds = cluster.clock.monotonic() - started
            cluster.listeners.emit(
                Gathered(self._number, gathering.answers, failures, seconds, caller())
            )
        if limits.partial:
            self.failures = failures
        if failures and not (limits.partial and gathering.answers):
            raise GatherError(failures, gathering.answers) from next(iter(failures.values()))
        return gathering.result()

    def _located(self, error: Exception, endpoint: Endpoint | None) -> Exception:
        """Return the shardkit error of a server that did not answer its part of a scatter.

        Args:
            error: what became of its part.
            endpoint: the server, or None when no connection to one could be had.
        """
        self._note_lost()
        if endpoint is None:
            return error
        if scatter.is_lost(error):
            found = connection_error(error, endpoint)
            found.__cause__ = error
            if self._can_retry():
                self._abandon_broken()
            else:
                self._cluster.failed(endpoint, found)
            return found
        if isinstance(error, StatementTimeoutError):
            error.endpoint = str(endpoint)
        return error

    def _asked(
        self,
        state: ORMExecuteState,
        gathering: scatter.Gathering,
        groups: Mapping[str, tuple[int, ...]],
    ) -> dict[str, Exception]:
        """Ask servers for their part; return the failure of each that did not answer."""
        failures: dict[str, Exception] = {}
        servers = {}
        for physical, shards in groups.items():
            try:
                servers[physical] = (self._scattering(physical), shards)
            except UnavailableError as error:
                failures[physical] = error
        if self._cluster.listeners:
            self._tell_routed(state, tuple(sorted(itertools.chain(*groups.values()))))
        return failures | gathering.ask(servers, self._cluster.parallel)

    def _tell_routed(self, state: ORMExecuteState, shards: tuple[int, ...]) -> None:
        """Tell the listeners where a statement goes, opening its connections for that."""
        cluster = self._cluster
        if len(shards) == 1:
            self._connection_to(shards[0])
        physical = tuple(cluster.group(shards))
        kinds = ("select", "insert", "update", "delete")
        mapper = state.bind_mapper
        cluster.listeners.emit(
            StatementRouted(
                session=self._number,
                operation=next((k for k in kinds if getattr(state, f"is_{k}")), ""),
                subject="" if mapper is None else mapper.class_.__name__,
                shards=shards,
                total=cluster.router.total,
                physical=physical,
                from_replica=frozenset(
                    name
                    for name in physical
                    if name in self._roots and self._roots[name][0].role is Role.REPLICA
                ),
                caller=caller(),
            )
        )

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
                if isinstance(error, EndpointUnavailableError):
                    cluster.failed(endpoint, error)
                if endpoint.role is Role.PRIMARY:
                    raise
                tried.add(endpoint)
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
        shown = _View(engine, root)
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
        except DBAPIError as error:
            if options.get("_parent_execute_state") is not None:
                raise  # to the statement that it is a part of
            if not error.connection_invalidated or not self._can_retry():
                self._raise(error)
            self._abandon_broken()
        try:
            return super()._execute_internal(statement, *args, **options)
        except DBAPIError as error:
            self._raise(error)

    def _can_retry(self) -> bool:
        """Tell whether a statement may run again by itself after its connection broke."""
        return True

    def _abandon_broken(self) -> None:
        for physical, (endpoint, connection) in list(self._roots.items()):
            views = [v for root, v in self._shard_views.values() if root is connection]
            if connection.invalidated or any(view.invalidated for view in views):
                self._cluster.failed(endpoint, _lost(endpoint))
                del self._roots[physical]
                connection.close()

    def _note_lost(self) -> None:
        """Have the connections know what their views lost: a transaction is not to be committed."""
        for _, root in self._roots.values():
            if not root.closed and not root.invalidated and not root.connection.is_valid:
                root.invalidate()

    def _raise(self, error: DBAPIError) -> NoReturn:
        """Raise the shardkit error of a lost connection, or the error itself."""
        if not error.connection_invalidated or not self._roots:
            raise error
        self._note_lost()
        endpoints = [endpoint for endpoint, _ in self._roots.values()]
        broken = [e for e, root in self._roots.values() if root.invalidated or root.closed]
        endpoint = (broken or endpoints)[0]
        found = connection_error(error, endpoint)
        self._cluster.failed(endpoint, found)
        raise found from error


def _lost(endpoint: Endpoint) -> EndpointUnavailableError:
    return EndpointUnavailableError("connection lost", endpoint=str(endpoint))


class _View(Connection):
    """A connection as one logical shard sees it; it shares the transaction of the whole.

    *Invariant:* it neither begins a transaction nor ends one: SQLAlchemy rolls back after an
    error where it sees none, which would undo what other logical shards have written.
    """

    def __init__(self, engine: Engine, root: Connection) -> None:
        super().__init__(engine, connection=root.connection, _allow_autobegin=False)
        self._whole = root

    def in_transaction(self) -> bool:
        return self._whole.in_transaction()


def _identity(mapper: Mapper[Any], ident: Any) -> tuple[Any, ...]:
    if isinstance(ident, dict):
        return tuple(
            ident.get(mapper.get_property_by_column(column).key) for column in mapper.primary_key
        )
    return tuple(ident) if isinstance(ident, tuple | list) else (ident,)


@event.listens_for(ReadSession, "do_orm_execute", propagate=True)
def _on_execute(state: ORMExecuteState) -> Any:
    session = state.session
    assert isinstance(session, ReadSession)
    return session._run(state)
