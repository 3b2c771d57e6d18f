"""The session that reads: every logical shard through one ORM session, from replicas.

Decides what runs where; `shardkit.binds` holds the connections, and `shardkit.writer` builds on
both. Statements run outside transactions.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

from sqlalchemy import Insert, event, inspect
from sqlalchemy.orm import Mapper, ORMExecuteState

from shardkit import gather, scatter, streams
from shardkit.cachedsession import ELSEWHERE
from shardkit.checks import is_idle
from shardkit.connections import AsyncConnections, Connections
from shardkit.errors import (
    NoShardKeyError,
    ReadOnlySessionError,
    ScatterNotAllowedError,
    StatementTimeoutError,
    TooManyShardsError,
    UnsupportedStatementError,
)
from shardkit.gatheringsession import GatheringSession
from shardkit.identities import identities, select_identities
from shardkit.placing import sharding_of_mapper
from shardkit.plans import key_of
from shardkit.relationships import refuse_joined_loads
from shardkit.router import Route, Router, UnknownValuesError
from shardkit.shapes import expressions_of
from shardkit.statements import Limits, Params, limits_of, shards_of
from shardkit.timeouts import limited
from shardkit.tokens import ASK_PRIMARIES
from shardkit.topology import Role
from shardkit.uniques import Value, lookups_of

__all__ = ["ReadSession"]

T = TypeVar("T")


class ReadSession(GatheringSession):
    """A read-only session on replicas.

    Statements run outside transactions, each on its own snapshot. Every physical shard is read
    from one endpoint for the session's life; a replica that fails is replaced by another one, or
    by the primary, and the statement is run again.

    Attributes:
        failures: after a statement with `all_shards(partial=True)`, the error of each physical
            shard whose rows are missing, by name; empty when all answered.
        token: what a later reader must have seen so as not to go back behind this one; an empty
            string unless the session was given a token itself.

    Made by `Cluster.reader`.
    """

    def __init__(self, connections: Connections | AsyncConnections, **options: Any) -> None:
        super().__init__(connections, **options)
        self.failures: Mapping[str, Exception] = {}

    # -- what people call

    @property
    def token(self) -> str:
        """What a later reader must have seen, so as not to go back behind this one."""
        return self._fresh.token

    @property
    def is_at_rest(self) -> bool:
        """Whether nothing is open or on its way on a connection, so that `close` waits for none."""
        return self.role is Role.REPLICA and all(
            is_idle(connection) for _, connection in self._roots.values()
        )

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
            if self._uses_cache() and not any(options.values()):
                found = self._get_cached(mapper, shard, identity)
                if found is not ELSEWHERE:
                    return found
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
        if missing and not options and self._uses_cache():
            found |= self._get_many_cached(mapper, missing)
            missing = {key: missing[key] for key in missing if key not in found}
        if missing:
            statement = select_identities(mapper, list(missing.values())).options(*options)
            for row in self.scalars(statement).unique():
                found[inspect(row).key] = row
        return [found.get(key) for key in keys]

    def _get_cached(self, mapper: Mapper[Any], shard: int, identity: tuple[Any, ...]) -> Any:
        """Return an object that the session does not hold, None, or `ELSEWHERE`."""
        plan = self._cache_plan(mapper)
        if plan is None:
            return ELSEWHERE
        identity = _kept(mapper, identity)
        key = mapper.identity_key_from_primary_key(identity)
        if not plan.names_row(identity) or key in self.identity_map:
            return ELSEWHERE
        self._autoflush()  # as the statement would
        return self._cached_one(plan, shard, identity)

    def _get_many_cached(
        self, mapper: Mapper[Any], missing: Mapping[Any, tuple[Any, ...]]
    ) -> dict[Any, Any]:
        """Return what the cache and the primaries behind it know of objects, by identity key."""
        plan = self._cache_plan(mapper)
        if plan is None:
            return {}
        asked = {
            key: (self._shard_of(mapper, identity), identity)
            for key, identity in missing.items()
            if plan.names_row(identity) and key not in self.identity_map
        }
        self._autoflush()
        return self._cached_many(plan, asked) if asked else {}

    def _shard_of(self, mapper: Mapper[Any], identity: tuple[Any, ...]) -> int:
        sharding = sharding_of_mapper(mapper)
        assert sharding is not None, "only sharded classes are cached"
        return self._decided(lambda router: sharding.shard_of_identity(router, identity))

    def _new_on_primaries(self) -> ReadSession:
        return ReadSession(self._cluster, after=ASK_PRIMARIES)

    def get_by(self, entity: Any, **unique: Any) -> Any:
        """Return the row that has a unique value, however it is written, or None.

        `select(User).where(User.username == "Ana")` finds the row that holds this very text; this
        finds the one whose value counts as the same.

        Args:
            entity: a class with `__unique__`.
            **unique: one attribute of it, with the value.

        Raises:
            InvalidUniqueValueError: no row can have the value.
            UnsupportedStatementError: not the name of one unique attribute that may be read.

        Example:
            >>> session.get_by(User, username="ANA")  # doctest: +SKIP
        """
        known = {k.attribute: k for k in lookups_of(inspect(entity).local_table) if k.complete}
        if len(unique) != 1 or not unique.keys() <= known.keys():
            raise UnsupportedStatementError(
                f"get_by() of {', '.join(unique) or 'nothing'}",
                hint=f"name one of {', '.join(known) or 'its unique attributes, which are none'}",
            )
        ((name, given),) = unique.items()
        value = known[name].value(given)
        ids = self._looked_up_ids(value)
        for row in self.get_many(entity, ids):
            stored = None if row is None else getattr(row, name)
            if stored is not None and known[name].value(stored) == value:
                return row
        return None

    def route(self, statement: Any, params: Params = None) -> Route:
        """Return where a statement would run and the SQL of each server; runs nothing.

        Keys of directories and unique values are looked up.

        Raises:
            RoutingError: it would be refused.
        """
        with self.no_autoflush:
            shards = self._route(statement, params)
        cluster = self._cluster
        max_rows = (limits_of(statement) or Limits()).max_rows or cluster.max_rows
        branch, plan = statement, None
        if len(shards) > 1:
            plan = self._decided(lambda router: gather.plan(statement, params, router))
            branch = plan.branch
        texts = (
            (physical, scatter.sql_of(branch, scatter.of(plan, some, max_rows)))
            for physical, some in cluster.grouped(shards).items()
        )
        return Route(tuple(shards), cluster.router.total, self.role, tuple(texts))

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
        """Return a decision of the router, with the directory keys and unique values it needs."""
        cluster = self._cluster
        router, known = cluster.router, dict[Value, frozenset[int]]()
        while True:
            try:
                return cluster.directories.decided(router, decide, assign=assign)
            except UnknownValuesError as unknown:
                known |= self._looked_up(unknown.values)
                router = Router(router.total, values=known)

    def _looked_up(self, values: Iterable[Value]) -> dict[Value, frozenset[int]]:
        """Return the logical shards of the rows that may have unique values."""
        self._cluster.awaited("a unique value has to be looked up")
        return self._cluster.lookups.shards(values, self._ask)

    def _looked_up_ids(self, value: Value) -> list[int]:
        """Return the ids of the rows that may have a unique value."""
        return [pair.id for pair in self._cluster.lookups.read([value], self._ask)[value]]

    def _ask(
        self, logical_shard: int, query: str, parameters: Mapping[str, Any]
    ) -> Sequence[Sequence[Any]]:
        """Run a statement of shardkit's own where this session reads a logical shard.

        Raises:
            EndpointUnavailableError: the server does not answer (retryable).
        """

        def ask() -> Sequence[Sequence[Any]]:
            connection = self._connection_to(logical_shard)
            return connection.exec_driver_sql(query, dict(parameters)).all()

        return self._elsewhere(ask)

    def _writable(self) -> None:
        raise ReadOnlySessionError

    def _route(self, statement: Any, params: Params) -> tuple[int, ...]:
        """Return the logical shards of a statement, ascending."""
        assign = self.role is Role.PRIMARY and isinstance(statement, Insert)
        found = self._decided(lambda router: shards_of(statement, params, router), assign=assign)
        limits = limits_of(statement)
        if found is None and limits is None:
            raise ScatterNotAllowedError
        shards = self._cluster.everything if found is None else tuple(sorted(found))
        return _within(shards, limits)

    def _routed(
        self, state: ORMExecuteState, limits: Limits | None, key: Hashable | None
    ) -> tuple[int, ...]:
        """Return the logical shards of a statement, whose plan may be known by a key."""
        if self._cluster.plans.get(key) is None:
            return self._route(state.statement, state.parameters)
        return _within(self._cluster.everything, limits)

    def _refuse_unread(self, state: ORMExecuteState) -> None:
        """Refuse what a reader may not do, and what is said to be read nowhere."""
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

    def _run(self, state: ORMExecuteState) -> Any:
        """Route one statement: the session's do_orm_execute hook."""
        self._refuse_unread(state)
        if (related := self._related(state)) is not None:
            return related
        if "logical_shard" in state.bind_arguments:
            if state.is_select and state.is_orm_statement:
                refuse_joined_loads(state.statement, state.bind_mapper, several=False)
            given: tuple[int, ...] = (state.bind_arguments["logical_shard"],)
            if self._is_streamed(state):
                return self._gather(state, given)
            if self._cluster.listeners:
                self._tell_routed(state, given)
            return None
        limits = limits_of(state.statement)
        key = None if limits is None else key_of(state.statement, state.parameters)
        shards = self._routed(state, limits, key)
        if state.is_select and state.is_orm_statement:
            refuse_joined_loads(state.statement, state.bind_mapper, several=len(shards) > 1)
        if len(shards) == 1:
            state.bind_arguments["logical_shard"] = shards[0]
            if self._is_streamed(state):
                return self._gather(state, shards)
            if self._cluster.listeners:
                self._tell_routed(state, shards)
            return None if limits is None else self._limited(state, shards[0], limits)
        if not state.is_select:
            raise UnsupportedStatementError(
                f"one {type(state.statement).__name__.upper()} over {len(shards)} logical shards",
                hint="run it once for each shard key",
            )
        return self._gather(state, shards, key)

    def _is_streamed(self, state: ORMExecuteState) -> bool:
        """Tell whether a statement of one logical shard needs a transaction for its cursor.

        A writer has one, in which SQLAlchemy opens the cursor.
        """
        return self.role is Role.REPLICA and streams.size_of(state) is not None

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


def _within(shards: tuple[int, ...], limits: Limits | None) -> tuple[int, ...]:
    """Return logical shards, if a statement may go to so many."""
    if limits is not None and len(shards) > (limits.max_shards or len(shards)):
        raise TooManyShardsError(
            f"{len(shards)} logical shards to ask, and {limits.max_shards} allowed",
            hint="name fewer keys, or all_shards(max_shards=…)",
        )
    return shards


def _identity(mapper: Mapper[Any], ident: Any) -> tuple[Any, ...]:
    if isinstance(ident, dict):
        return tuple(
            ident.get(mapper.get_property_by_column(column).key) for column in mapper.primary_key
        )
    return tuple(ident) if isinstance(ident, tuple | list) else (ident,)


def _kept(mapper: Mapper[Any], identity: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return a primary key as the database will return it: the one spelling of a UUID."""
    sharding = sharding_of_mapper(mapper)
    assert sharding is not None, "only sharded classes are cached"
    position = sharding.identity[0]
    if mapper.primary_key[position] is not sharding.key_column:
        return identity
    kept = sharding.kept(identity[position])
    return (*identity[:position], kept, *identity[position + 1 :])


@event.listens_for(ReadSession, "do_orm_execute", propagate=True)
def _on_execute(state: ORMExecuteState) -> Any:
    """Route a statement, after the program's own listeners have had it.

    SQLAlchemy calls listeners in the order they were added, this one first, and none after one
    that returns a result, as a scatter does. So those that wait are put before, as what they
    change decides the route, and what they run themselves, by `state.invoke_statement()`, comes
    here in the end. Source: `Session._execute_internal` in SQLAlchemy.
    """
    session = state.session
    assert isinstance(session, ReadSession)
    others = state._remaining_events()
    if not others:
        return session._run(state)
    state._events_todo = [*others, _on_execute]  # also what is left for statements inside
    for i, listener in enumerate(others):
        state._starting_event_idx = i
        found: Any = cast("Any", listener)(state)
        if found:
            return found
    state._starting_event_idx = len(others)
    found = session._run(state)
    # None has SQLAlchemy run it, and first call the others again: it is run here instead.
    return state.invoke_statement() if found is None else found
