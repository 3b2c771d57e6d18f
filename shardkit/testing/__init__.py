"""Helpers for tests of programs that use shardkit.

`wait_until` waits for a fact instead of for a time, so that a test is as quick as the system and
fails with a sentence. `FakeClock` is a clock that moves when told. `create_tables` makes the
tables of models on every logical shard without migrations. `watch` collects what a cluster does
and fails a test that reads too widely, too often or too early. `FaultProxy` breaks the network
between a program and one server (see `shardkit.testing.proxy`). Never used by the library itself.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager

import psycopg
from psycopg import sql
from sqlalchemy import MetaData, Table
from sqlalchemy.dialects.postgresql import dialect
from sqlalchemy.schema import CreateIndex, CreateTable

from shardkit import tokens
from shardkit.clock import SYSTEM, Clock
from shardkit.cluster import AsyncCluster, Cluster
from shardkit.derived import Cached
from shardkit.events import Caller, Committed, Event, StatementRouted
from shardkit.models import REFERENCE_SCHEMA, rules_of
from shardkit.ops import cachetriggers, catalog, derivedtriggers
from shardkit.testing.faults import Counts, Fault, Shape, Trigger, Way, When
from shardkit.testing.proxy import FaultProxy, reroute
from shardkit.topology import PhysicalShard, Topology, libpq_options, schema_name

__all__ = [
    "Counts",
    "FakeClock",
    "Fault",
    "FaultProxy",
    "Shape",
    "Trigger",
    "Watch",
    "Way",
    "When",
    "create_tables",
    "reroute",
    "schema_script",
    "wait_until",
    "watch",
]

_POLL = 0.02


class FakeClock:
    """A clock that stands still until a test moves it.

    Wall and monotonic time move together with `advance`; `set_unix_ms` steps the wall alone, as
    an operator or a time server does.
    """

    def __init__(self, *, unix_ms: int = 1_800_000_000_000) -> None:
        self._unix_ms = unix_ms
        self._monotonic = 0.0

    def unix_ms(self) -> int:
        """Return wall time in milliseconds since 1970-01-01 UTC."""
        return self._unix_ms

    def monotonic(self) -> float:
        """Return seconds from an arbitrary origin."""
        return self._monotonic

    def advance(self, seconds: float) -> None:
        """Let time pass.

        Raises:
            ValueError: seconds is negative; only the wall clock can step back.
        """
        if seconds < 0:
            raise ValueError(f"advance({seconds}): time passes forwards; see set_unix_ms")
        self._monotonic += seconds
        self._unix_ms += round(seconds * 1000)

    def sleep(self, seconds: float) -> None:
        """Let time pass at once."""
        self.advance(seconds)

    def set_unix_ms(self, unix_ms: int) -> None:
        """Step the wall clock, in either direction."""
        self._unix_ms = unix_ms


def wait_until(
    predicate: Callable[[], bool], timeout: float, what: str, *, clock: Clock = SYSTEM
) -> None:
    """Wait until a fact holds.

    Args:
        predicate: asked again and again; True ends the wait.
        timeout: seconds to wait at most.
        what: the fact in words, for the failure.
        clock: where the time comes from.

    Raises:
        AssertionError: the fact did not come true in time.
    """
    pause = threading.Event()
    deadline = clock.monotonic() + timeout
    while not predicate():
        if clock.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:g} seconds: {what}")
        pause.wait(_POLL)


class Watch:
    """What a cluster did since; made by `watch`.

    Attributes:
        events: every event so far, in order.
    """

    def __init__(self) -> None:
        self.events: list[Event] = []

    @property
    def statements(self) -> list[StatementRouted]:
        """The statements that ran, in order; what a flush wrote is not among them."""
        return [event for event in self.events if isinstance(event, StatementRouted)]

    def assert_no_scatter(self, *, planned: Collection[str] = (), up_to: int = 1) -> None:
        """Fail if a statement went to several logical shards.

        Args:
            planned: parts of the caller, as `file.py:12 in function`, that may scatter.
            up_to: logical shards that are no scatter yet; 1 or more.

        Raises:
            AssertionError: one did; the message names the line that ran it.
        """
        wide = [
            f"{_line(s.caller)}: {_what(s)} on {len(s.shards)} of {s.total} logical shards"
            for s in self.statements
            if len(s.shards) > up_to and not any(part in _line(s.caller) for part in planned)
        ]
        _fail("unplanned scatter", wide, "filter on a shard key, or name the caller in planned=")

    def assert_no_n_plus_one(self, limit: int = 5) -> None:
        """Fail if one line ran many statements of one logical shard each, in one session.

        Args:
            limit: how often a line may read one class in one session; 1 or more.

        Raises:
            AssertionError: one did it more often; the message names the line.
        """
        counts: Counter[tuple[int, Caller | None, str]] = Counter()
        shards: dict[tuple[int, Caller | None, str], set[int]] = {}
        for s in self.statements:
            if s.operation == "select" and s.kind == "one":
                place = (s.session, s.caller, _what(s))
                counts[place] += 1
                shards.setdefault(place, set()).update(s.shards)
        often = [
            f"{_line(place[1])}: {place[2]} {n} times on {len(shards[place])} logical shards"
            for place, n in counts.items()
            if n > limit
        ]
        _fail("N+1", often, "ask for all keys at once with in_(), or load with selectinload()")

    def assert_no_stale_read_risk(self) -> None:
        """Fail if a replica was read of a physical shard that was written to before.

        A reader with a token that covers the write is no risk: the replica is asked whether it
        has replayed it. Other replicas may have caught up by chance; the risk is the same.

        Raises:
            AssertionError: one was; the message names both lines.
        """
        written: dict[str, Committed] = {}
        risks = []
        for event in self.events:
            if isinstance(event, Committed):
                written |= dict.fromkeys(event.physical, event)
            elif isinstance(event, StatementRouted):
                risks += [
                    f"{_line(event.caller)}: {_what(event)} on a replica of {physical}, "
                    f"written by {_line(written[physical].caller)}"
                    for physical in event.physical
                    if physical in event.from_replica
                    and physical in written
                    and not tokens.covers(event.after, written[physical].token)
                ]
        _fail("replica read after a write", risks, "pass the token: cluster.reader(after=token)")


@contextmanager
def watch(
    cluster: Cluster | AsyncCluster,
    *,
    scatter: bool = True,
    planned: Collection[str] = (),
    n_plus_one: int | None = None,
    stale_reads: bool = True,
) -> Iterator[Watch]:
    """Collect what a cluster does, and check it at the end.

    Args:
        cluster: the cluster; under asyncio, too, this is a plain context manager.
        scatter: whether statements may go to several logical shards; if not, `planned` may.
        planned: see `Watch.assert_no_scatter`.
        n_plus_one: how often a line may read one class in one session; None for any number.
        stale_reads: whether a replica may be read after a write.

    Raises:
        AssertionError: at the end, for what is not allowed, unless an exception ends it.

    Example:
        >>> @pytest.fixture(autouse=True)  # doctest: +SKIP
        ... def watched(cluster):
        ...     limits = {"scatter": False, "n_plus_one": 5, "stale_reads": False}
        ...     with watch(cluster, planned=["feed.py"], **limits) as seen:
        ...         yield seen
    """
    seen = Watch()
    stop = cluster.listen(seen.events.append)
    try:
        yield seen
    finally:
        stop()
    if not scatter:
        seen.assert_no_scatter(planned=planned)
    if n_plus_one is not None:
        seen.assert_no_n_plus_one(n_plus_one)
    if not stale_reads:
        seen.assert_no_stale_read_risk()


def _what(statement: StatementRouted) -> str:
    return f"{statement.operation} {statement.subject}".strip()


def _line(caller: Caller | None) -> str:
    return "an unknown caller" if caller is None else str(caller)


def _fail(what: str, found: list[str], remedy: str) -> None:
    if found:
        raise AssertionError("\n  ".join([f"{what} ({remedy}):", *found]))


def create_tables(topology: Topology, metadata: MetaData) -> None:
    """Create shardkit's own tables and those of models, in every logical shard, from nothing.

    Args:
        topology: where; its admin logins are used.
        metadata: of the models.
    """
    for shard in topology.physical.values():
        with psycopg.connect(autocommit=True, **libpq_options(shard.admin_url)) as connection:
            for transaction in _creation(topology, shard, metadata):
                with connection.transaction():
                    for statement in transaction:
                        connection.execute(statement)


def schema_script(metadata: MetaData) -> Callable[[PhysicalShard, int, object], str]:
    """Return what makes an empty logical shard for `shardkit.ops.moves`, after `create_tables`."""
    tables = [table for table in metadata.sorted_tables if table.schema is None]

    def script(target: PhysicalShard, logical_shard: int, _source: object) -> str:
        schema = sql.Identifier(schema_name(logical_shard))
        statements = [
            *catalog.logical_shard_statements(logical_shard, roles=target.roles),
            sql.SQL("SET LOCAL search_path = {}").format(schema),
            *(ddl for table in tables for ddl in _ddl(table)),
        ]
        return "\n;\n".join(statement.as_string(None) for statement in statements)

    return script


def _creation(
    topology: Topology, shard: PhysicalShard, metadata: MetaData
) -> Iterator[list[sql.SQL | sql.Composed]]:
    """Yield the transactions that set up one physical shard."""
    yield catalog.admin_statements(
        cluster=topology.name,
        physical=shard.name,
        n_logical_shards=topology.n_logical_shards,
        roles=shard.roles,
    )
    yield catalog.rule_statements(rules_of(metadata))
    tables = metadata.sorted_tables
    yield [ddl for t in tables if t.schema == REFERENCE_SCHEMA for ddl in _ddl(t)]
    sharded = [ddl for t in tables if t.schema is None for ddl in _ddl(t)]
    cached = Cached.of(metadata)
    for number in topology.shard_map.owned_by(shard.name):
        path = sql.SQL("SET LOCAL search_path = {}").format(sql.Identifier(schema_name(number)))
        yield [
            *catalog.logical_shard_statements(number, roles=shard.roles),
            path,
            *sharded,
            *cachetriggers.trigger_statements(number, cached.tables),
            *derivedtriggers.watch_statements(number, cached.watches),
        ]


def _ddl(table: Table) -> Iterator[sql.SQL]:
    language = dialect()  # type: ignore[no-untyped-call]  # SQLAlchemy leaves it untyped
    yield sql.SQL(str(CreateTable(table).compile(dialect=language)))
    for index in table.indexes:
        yield sql.SQL(str(CreateIndex(index).compile(dialect=language)))
