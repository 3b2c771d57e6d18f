"""What an audit of the cache looks for: what was committed lately, of rows, lists and counts.

Commits are read in the outboxes, where triggers write down what each has changed: a relay leaves
them there for milliseconds, so a look that is repeated sees a share of them, and all that relays
have not repaired. What was written earlier is read in the tables themselves. Used by
`shardkit.ops.cacheaudit`; writes nothing, locks nothing but what a SELECT does.
"""

from __future__ import annotations

import importlib
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

import psycopg
from psycopg import sql
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg

from shardkit.cacheable import CHANGED, identity_of
from shardkit.cached import CachePlan, plan_of
from shardkit.cachereads import Plan
from shardkit.clock import Clock
from shardkit.derived import derived_of
from shardkit.derivedplan import DerivedPlan, derived_plan
from shardkit.errors import ConfigurationError
from shardkit.ops.direct import connect
from shardkit.rowcache import RowCache
from shardkit.topology import Topology, schema_name

__all__ = ["Primaries", "Sample", "plans_in"]

_SHARDS_PER_LOOK: Final = 64
"""Outboxes of one server that one statement looks into, chosen anew each time."""
_EVENTS_PER_LOOK: Final = 20
_ROWS_PER_EVENT: Final = 20

# The last pages of a table hold what was written last; a range of TIDs reads no others. Source:
# PostgreSQL manual, "System Columns", ctid; TID range scans are of 14 and newer.
_LATEST: Final = sql.SQL(
    "SELECT {columns} FROM {table} WHERE ctid >= ('(' || greatest(0, pg_relation_size({name})"
    " / current_setting('block_size')::int - 2) || ',0)')::tid ORDER BY ctid DESC LIMIT {limit}"
)

# The newest, and the oldest: those that nobody repairs stay.
_EVENTS: Final = sql.SQL(
    "SELECT {shard}, o.position, o.payload FROM ("
    "(SELECT * FROM {outbox} ORDER BY position DESC LIMIT {limit}) UNION ALL"
    " (SELECT * FROM {outbox} ORDER BY position LIMIT {limit})) AS o WHERE o.topic = {topic}"
)

_DIALECT: Final[Any] = PGDialect_psycopg()  # type: ignore[no-untyped-call]  # SQLAlchemy's


@dataclass(frozen=True, slots=True)
class Sample:
    """What was committed of one row, list or count.

    Attributes:
        key: of its entry.
        plan: how it is cached.
        shard: its logical shard.
        identity: its primary key, or the key of the list.
        version: that was committed.
        seen: when it was seen committed, on the monotonic clock.
    """

    key: str
    plan: Plan
    shard: int
    identity: tuple[Any, ...]
    version: int
    seen: float


def plans_in(location: str) -> list[Plan]:
    """Return how the classes of a program, and its lists and counts, are cached.

    Args:
        location: `module:name` of the declarative base.

    Raises:
        ConfigurationError: there is no such thing, or nothing of it is cached.
    """
    module, _, name = location.partition(":")
    try:
        base = getattr(importlib.import_module(module), name)
        mappers, metadata = base.registry.mappers, base.metadata
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(
            f"models {location!r} cannot be loaded: {error}",
            hint='write "module:Base" of a module that imports every model',
        ) from error
    plans: list[Plan] = [plan for mapper in mappers if (plan := plan_of(mapper)) is not None]
    plans += {each.watch: derived_plan(each) for each in derived_of(metadata)}.values()
    if not plans:
        raise ConfigurationError(
            f"no class of {location!r} is cached", hint="declare __cache_ttl__ in one"
        )
    return sorted(plans, key=lambda plan: plan.name)


class Primaries:
    """Connections to all primaries, for one audit.

    Args:
        topology: the cluster.
        names: of entries.
        plans: how things are cached, by `plans_in`; no others are sampled.
        clock: source of time.
        rng: for what is chosen.

    Raises:
        EndpointUnavailableError: a primary does not accept the admin login (retryable).
    """

    def __init__(
        self,
        topology: Topology,
        names: RowCache,
        plans: Sequence[Plan],
        *,
        clock: Clock,
        rng: random.Random,
    ) -> None:
        self._names = names
        self._plans = {plan.entry: plan for plan in plans}
        self._clock = clock
        self._rng = rng
        self._seen: set[tuple[int, int]] = set()
        self._shards = names.group(range(topology.n_logical_shards))
        self._opened: dict[str, psycopg.Connection[tuple[Any, ...]]] = {}
        try:
            for name in self._shards:
                self._opened[name] = connect(
                    topology.physical[name], application="shardkit cache audit"
                )
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        for connection in self._opened.values():
            connection.close()

    def commits(self) -> list[Sample]:
        """Look into outboxes; return what was committed and not seen before."""
        found: list[Sample] = []
        for name, shards in self._shards.items():
            some = self._rng.sample(shards, min(len(shards), _SHARDS_PER_LOOK))
            asked = sql.SQL(" UNION ALL ").join(map(_events, some))
            rows = self._opened[name].execute(asked).fetchall()
            seen = self._clock.monotonic()
            for shard, position, payload in rows:
                if (shard, position) not in self._seen:
                    self._seen.add((shard, position))
                    found += self._changed(shard, payload, seen)
        return found

    def _changed(self, shard: int, payload: Mapping[str, Any], seen: float) -> Iterator[Sample]:
        plan = self._plans.get(payload["table"])
        if plan is None:  # of another program, or of a declaration that is gone
            return
        rows = payload["rows"]
        for values, version in self._rng.sample(rows, min(len(rows), _ROWS_PER_EVENT)):
            identity = identity_of(payload["tags"], values)
            key = self._names.key(plan, shard, identity)
            yield Sample(key, plan, shard, identity, int(version), seen)

    def latest(self, wanted: int) -> list[Sample]:
        """Return about so many rows that were written lately, as the tables have them."""
        plans = [plan for plan in self._plans.values() if isinstance(plan, CachePlan)]
        total = sum(map(len, self._shards.values()))
        each = max(1, math.ceil(wanted / (max(1, len(plans)) * total)))
        found: dict[str, Sample] = {}
        for name, shards in self._shards.items():
            for shard in self._rng.sample(shards, len(shards)):
                if len(found) >= wanted:
                    break
                for plan in plans:
                    rows = self._opened[name].execute(_latest(plan, shard, each)).fetchall()
                    seen = self._clock.monotonic()
                    for *identity, version in rows:
                        key = self._names.key(plan, shard, identity)
                        found[key] = Sample(key, plan, shard, tuple(identity), int(version), seen)
        return list(found.values())

    def version(self, sample: Sample) -> int | None:
        """Return the version that a row has now, or None when there is no such row."""
        assert isinstance(sample.plan, CachePlan), "lists have no version of their own"
        columns = _columns(sample.plan)
        query = sql.SQL("SELECT {} FROM {} WHERE {}").format(
            columns[-1],
            sql.Identifier(schema_name(sample.shard), sample.plan.table.name),
            sql.SQL(" AND ").join(sql.SQL("{} = %s").format(each) for each in columns[:-1]),
        )
        owner = self._owner(sample.shard)
        row = self._opened[owner].execute(query, sample.identity).fetchone()
        return None if row is None else int(row[0])

    def values(self, plan: DerivedPlan, samples: Iterable[Sample]) -> dict[str, Any]:
        """Return lists or counts as the primaries have them now, by the keys of their entries."""
        wanted = list({sample.key: sample for sample in samples}.values())
        where = [(sample.shard, sample.identity) for sample in wanted]
        found: dict[str, Any] = {}
        for statement, values, shard in plan.questions(where, self._names.group):
            assert shard is not None, "it says where"
            query = str(statement.compile(dialect=_DIALECT)).encode()
            for row in self._opened[self._owner(shard)].execute(query, values).fetchall():
                found[wanted[row[0]].key] = plan.value(plan.answered(row, where))
        return found

    def _owner(self, shard: int) -> str:
        (name,) = self._names.group([shard])
        return name


def _events(shard: int) -> sql.Composed:
    return _EVENTS.format(
        shard=shard,
        outbox=sql.Identifier(schema_name(shard), "shardkit_outbox"),
        limit=sql.Literal(_EVENTS_PER_LOOK),
        topic=sql.Literal(CHANGED),
    )


def _columns(plan: CachePlan) -> list[sql.Identifier]:
    """Return the columns of the primary key and that of the version."""
    places = (*plan.key_indexes, plan.version_index)
    return [sql.Identifier(plan.columns[index].name) for index in places]


def _latest(plan: CachePlan, shard: int, limit: int) -> sql.Composed:
    schema = schema_name(shard)
    return _LATEST.format(
        columns=sql.SQL(", ").join(_columns(plan)),
        table=sql.Identifier(schema, plan.table.name),
        name=sql.Literal(f'"{schema}"."{plan.table.name}"'),
        limit=sql.Literal(limit),
    )
