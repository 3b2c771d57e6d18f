"""The part of a reading session that asks the cache: objects by primary key, lists and counts.

The base of `shardkit.session`. The cache is asked where an object is looked for by its primary key
and nothing else is said: what has options, locks or criteria goes to the database, and so do
sessions that write, whose transaction may see what nobody else does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, TypeVar

from sqlalchemy.engine.result import IteratorResult, SimpleResultMetaData
from sqlalchemy.orm import Load, Mapper, ORMExecuteState, Session
from sqlalchemy.orm.base import LoaderCallableStatus, PassiveFlag
from sqlalchemy.sql import operators

from shardkit.binds import BoundSession
from shardkit.checks import is_idle
from shardkit.derived import CachedCount, Derived
from shardkit.events import CacheRead, caller
from shardkit.instances import instance_of
from shardkit.router import Router
from shardkit.statements import AllShards
from shardkit.topology import Role

if TYPE_CHECKING:  # the `cache` extra
    from shardkit.cached import CachePlan
    from shardkit.cachereads import CacheReads, Plan
    from shardkit.caching.tally import CacheCounts

__all__ = ["ELSEWHERE", "CachedSession"]

T = TypeVar("T")
V = TypeVar("V")

ELSEWHERE: Final = object()
"""The session has to read the object itself."""

_WITH_SQL: Final = PassiveFlag.SQL_OK | PassiveFlag.RELATED_OBJECT_OK


class CachedSession(BoundSession):
    """A session that may ask the cache for objects by primary key.

    *Invariant:* what it makes of a cached row is what it would have made of the row.
    """

    def _uses_cache(self) -> bool:
        """Tell whether this session may be shown cached rows at all.

        Not where primaries are asked for by name, and not where the program has listeners for
        statements: what they would change of one cannot be known without it.
        """
        return (
            self._cluster.cache is not None
            and self.role is Role.REPLICA
            and not self._fresh.asks_primaries
            and not self._is_behind
            and len(self.dispatch.do_orm_execute) == 1
        )

    def _cache_plan(self, mapper: Mapper[Any]) -> CachePlan | None:
        """Return how objects of a class are cached, or None when they are not."""
        cache = self._cluster.cache
        plan = None if cache is None else cache.plan(mapper)
        return plan if plan is not None and plan.loads_alone else None

    def _cached_one(self, plan: CachePlan, shard: int, identity: tuple[Any, ...]) -> Any:
        """Return the object of a primary key, None where there is no row, or `ELSEWHERE`."""
        cluster = self._cluster
        self._physical_of(shard)  # the entry's name has the epoch in it, which must not be old
        started = cluster.clock.monotonic() if cluster.listeners else 0.0
        found, counts = self._cache_reads().one(plan, shard, identity, self._primaries)
        if cluster.listeners:
            self._tell_cached(plan, 1, counts, started)
        if not found.is_known:
            return ELSEWHERE
        return None if found.values is None else instance_of(self, plan, found.values)

    def _cached_many(
        self, plan: CachePlan, wanted: Mapping[Any, tuple[int, tuple[Any, ...]]]
    ) -> dict[Any, Any]:
        """Return objects, or None where there is no row; those of others are left out.

        Args:
            plan: of their class.
            wanted: logical shard and primary key of each, by anything.
        """
        cluster = self._cluster
        self._map_of([shard for shard, _ in wanted.values()])
        started = cluster.clock.monotonic() if cluster.listeners else 0.0
        found, counts = self._cache_reads().many(plan, list(wanted.values()), self._primaries)
        if cluster.listeners:
            self._tell_cached(plan, len(wanted), counts, started)
        objects = {}
        for name, (_, identity) in wanted.items():
            row = found[identity]
            if row.is_known:
                values = row.values
                objects[name] = None if values is None else instance_of(self, plan, values)
        return objects

    def _identity_lookup(  # type: ignore[override]  # SQLAlchemy does not promise the types
        self,
        mapper: Any,
        primary_key_identity: Any,
        identity_token: Any = None,
        passive: PassiveFlag = PassiveFlag.PASSIVE_OFF,
        lazy_loaded_from: Any = None,
        **options: Any,
    ) -> Any:
        """Find an object in the session, and a related one in the cache; called by SQLAlchemy."""
        found = super()._identity_lookup(
            mapper,
            primary_key_identity,
            identity_token=identity_token,
            passive=passive,
            lazy_loaded_from=lazy_loaded_from,
            **options,
        )
        if (
            found is not None
            or lazy_loaded_from is None
            or lazy_loaded_from.load_options
            or identity_token is not None
            or passive & _WITH_SQL != _WITH_SQL
            or not isinstance(mapper, Mapper)
            or _refuses_sql(lazy_loaded_from.mapper, mapper)
            or not self._uses_cache()
        ):
            return found
        plan = self._cache_plan(mapper)
        identity = tuple(primary_key_identity)
        if plan is None or not plan.names_row(identity):
            return None
        related = self._cached_one(plan, self._shard_of(mapper, identity), identity)
        if related is ELSEWHERE:
            return None
        # What SQLAlchemy takes for "there is none", without asking the database.
        return LoaderCallableStatus.PASSIVE_CLASS_MISMATCH if related is None else related

    def _related(self, state: ORMExecuteState) -> IteratorResult[Any] | None:
        """Answer the statement by which `selectinload` loads objects by primary key, or None."""
        if not (state.is_relationship_load and state.is_select and self._uses_cache()):
            return None
        mapper = state.bind_mapper
        plan = None if mapper is None else self._cache_plan(mapper)
        if plan is None or not _is_by_key(state, plan):
            return None
        keys: list[Any] = state.parameters["primary_keys"]  # type: ignore[index, call-overload]
        objects = self.get_many(plan.mapper, keys)
        rows = [(key, found) for key, found in zip(keys, objects, strict=True) if found is not None]
        return IteratorResult(SimpleResultMetaData(["key", "object"]), iter(rows))

    # -- lists and counts

    def cached(self, derived: Derived[V], key: Any) -> V:
        """Return a list or count: from the cache in a session that reads, else from the database.

        What the cache has is never older than what was acknowledged before it was asked; what
        this process has written is always in it.

        Args:
            derived: a `CachedList` or a `CachedCount`.
            key: the value of its key; a tuple where that has several columns.

        Raises:
            InvalidShardKeyError: the key cannot place rows, or has too few or too many values.
            UnavailableError: neither the cache nor a server answered (retryable).

        Example:
            >>> followers = CachedCount(Follower.followee_id)  # doctest: +SKIP
            >>> session.cached(followers, ana.id)  # doctest: +SKIP
            17
        """
        identity = derived.identity(key)
        shard = self._decided(lambda router: derived.shard_of(router, identity))
        if self._uses_cache() and derived.names_row(identity):
            plan = self._derived_plan(derived)
            started = self._cluster.clock.monotonic() if self._cluster.listeners else 0.0
            found, counts = self._cache_reads().one(plan, shard, identity, self._primaries)
            if self._cluster.listeners:
                self._tell_cached(plan, 1, counts, started)
            if found.is_known and found.values is not None:
                value: V = plan.value(found.values)
                return value
        return derived.result(self.execute(derived.statement(identity)).all())

    def cached_many(self, derived: Derived[V], keys: Iterable[Any]) -> dict[Any, V]:
        """Return lists or counts by their keys: one round trip for each server of the cache.

        Those that the cache has not take one statement for each physical shard.

        Args:
            derived: a `CachedList` or a `CachedCount`.
            keys: as for `cached`; of those that are equal one is asked for.

        Raises:
            InvalidShardKeyError: a key cannot place rows, or has too few or too many values.
            UnavailableError: neither the cache nor a server answered (retryable).
        """
        found: dict[Any, V] = self.cached_together({derived: keys})[derived]
        return found

    def cached_together(
        self, wanted: Mapping[Derived[Any], Iterable[Any]]
    ) -> dict[Derived[Any], dict[Any, Any]]:
        """Return several lists and counts as `cached_many` does, in the same round trip.

        What the cache has not is read list by list.

        Args:
            wanted: keys, by list or count.

        Raises:
            InvalidShardKeyError: a key cannot place rows, or has too few or too many values.
            UnavailableError: neither the cache nor a server answered (retryable).
        """
        named = {
            derived: {key: derived.identity(key) for key in keys}
            for derived, keys in wanted.items()
        }
        found = self._cached_lists(named) if self._uses_cache() else {}
        return {
            derived: self._completed(derived, keys, found.get(derived, {}))
            for derived, keys in named.items()
        }

    def _completed(
        self,
        derived: Derived[V],
        wanted: Mapping[Any, tuple[Any, ...]],
        found: dict[Any, V],
    ) -> dict[Any, V]:
        """Return lists or counts in the order in which they are wanted; databases have the rest."""
        rest = {key: each for key, each in wanted.items() if key not in found}
        if (
            len(rest) > 1
            and isinstance(derived, CachedCount)
            and len(derived.key) == 1
            and all(map(derived.names_row, rest.values()))  # as the rows will have them
        ):
            statement = derived.statement_of_many(list(rest.values()))
            counts: dict[Any, Any] = dict(tuple(row) for row in self.execute(statement))
            found |= {key: counts.get(value, 0) for key, (value,) in rest.items()}
            rest = {}
        for key, identity in rest.items():
            found[key] = derived.result(self.execute(derived.statement(identity)).all())
        return {key: found[key] for key in wanted}

    def _cached_lists(
        self, wanted: Mapping[Derived[Any], Mapping[Any, tuple[Any, ...]]]
    ) -> dict[Derived[Any], dict[Any, Any]]:
        """Return what the cache and the primaries behind it know of lists or counts, by key."""
        started = self._cluster.clock.monotonic() if self._cluster.listeners else 0.0
        asked: dict[Derived[Any], Mapping[Any, tuple[Any, ...]]] = {}
        parts: list[tuple[Any, list[tuple[int, tuple[Any, ...]]]]] = []
        for derived, keys in wanted.items():
            named = {key: each for key, each in keys.items() if derived.names_row(each)}
            if not named:
                continue
            asked[derived] = named
            placed = self._where_keys_are(derived, named.values())
            parts.append((self._derived_plan(derived), [(s, each) for each, s in placed.items()]))
        if not parts:
            return {}
        self._map_of([shard for _, places in parts for shard, _ in places])
        read = self._cache_reads().together(parts, self._primaries)
        found = {}
        for (derived, keys), (plan, places), (rows, counts) in zip(
            asked.items(), parts, read, strict=True
        ):
            if self._cluster.listeners:
                self._tell_cached(plan, len(places), counts, started)
            found[derived] = {
                key: plan.value(row.values)
                for key, row in ((key, rows[identity]) for key, identity in keys.items())
                if row.is_known and row.values is not None
            }
        return found

    def _where_keys_are(
        self, derived: Derived[Any], identities: Iterable[tuple[Any, ...]]
    ) -> dict[tuple[Any, ...], int]:
        """Return the logical shard of each key."""
        return self._decided(
            lambda router: {each: derived.shard_of(router, each) for each in identities}
        )

    def _derived_plan(self, derived: Derived[Any]) -> Any:
        cache = self._cluster.cache
        assert cache is not None, "it is used"
        return cache.derived_plan(derived)

    # -- to be provided

    def _decided(self, decide: Callable[[Router], T]) -> T:
        """Return a decision of the router, with the directory keys and values it needs."""
        raise NotImplementedError

    def get_many(self, entity: Any, idents: Any) -> list[Any]:
        """Return objects by primary key; see `ReadSession.get_many`."""
        raise NotImplementedError

    def _shard_of(self, mapper: Mapper[Any], identity: tuple[Any, ...]) -> int:
        """Return the logical shard of a primary key of a sharded class."""
        raise NotImplementedError

    def _new_on_primaries(self) -> Session:
        """Return a new session that asks primaries."""
        raise NotImplementedError

    # -- parts

    def _cache_reads(self) -> CacheReads:
        cache = self._cluster.cache
        assert cache is not None, "it is used"
        return cache.reads

    def _primaries(self, shards: Sequence[int]) -> AbstractContextManager[Session]:
        """Return what reads logical shards from their primaries: this session if it cannot but.

        Another needs a second connection from a pool of which others want one, too. One that has
        replicas to go to would go on there when its connection breaks, and fill with old rows; and
        while it streams it has a transaction.
        """
        physical = self._cluster.topology.physical
        for name in self._cluster.grouped(shards):
            held = self._roots.get(name)
            if physical[name].replicas or (held is not None and not is_idle(held[1])):
                return self._new_on_primaries()
        return nullcontext(self)

    def _tell_cached(
        self, plan: Plan, n_rows: int, counts: CacheCounts | None, started: float
    ) -> None:
        cluster = self._cluster
        cluster.listeners.emit(
            CacheRead(
                session=self._number,
                subject=plan.name,
                rows=n_rows,
                hits=1 if counts is None else counts.hits,
                misses=0 if counts is None else counts.misses,
                fills=0 if counts is None else counts.fills,
                waits=0 if counts is None else counts.waits,
                garbage=0 if counts is None else counts.garbage,
                unanswered=0 if counts is None else counts.unanswered,
                seconds=cluster.clock.monotonic() - started,
                caller=caller(),
            )
        )


@lru_cache(maxsize=4096)
def _refuses_sql(parent: Mapper[Any], related: Mapper[Any]) -> bool:
    """Tell whether a class has a relationship to another that must not send SQL."""
    return any(
        each.lazy == "raise_on_sql" and each.mapper is related for each in parent.relationships
    )


def _is_by_key(state: ORMExecuteState, plan: CachePlan) -> bool:
    """Tell whether a statement loads whole objects by primary key and nothing beside them."""
    statement: Any = state.statement
    keys = plan.mapper.primary_key
    columns, criteria = statement._raw_columns, statement._where_criteria
    if len(keys) != 1 or len(columns) != 2 or columns[0] is not keys[0] or len(criteria) != 1:
        return False
    entity = columns[1]._annotations.get("parententity")
    listed = criteria[0]
    if (
        entity is not plan.mapper
        or getattr(listed, "operator", None) is not operators.in_op
        or listed.left is not keys[0]
        or getattr(listed.right, "key", None) != "primary_keys"
        or not isinstance(state.parameters, Mapping)
        or state.execution_options.get("populate_existing")
    ):
        return False
    path: Any = state.loader_strategy_path
    return path is not None and all(
        _ends_before(option, path.natural_path) for option in statement._with_options
    )


def _ends_before(option: Any, path: tuple[Any, ...]) -> bool:
    """Tell whether an option says nothing about what a relationship's objects load."""
    if isinstance(option, AllShards):
        return True
    return isinstance(option, Load) and all(
        element.path.natural_path[: len(path)] != path
        or len(element.path.natural_path) <= len(path) + 1
        for element in option.context
    )
