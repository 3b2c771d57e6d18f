"""Helpers for tests of programs that use shardkit.

`wait_until` waits for a fact instead of for a time, so that a test is as quick as the system and
fails with a sentence. `FakeClock` is a clock that moves when told. `create_tables` makes the
tables of models on every logical shard without migrations. Never used by the library itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator

import psycopg
from psycopg import sql
from sqlalchemy import MetaData, Table
from sqlalchemy.dialects.postgresql import dialect
from sqlalchemy.schema import CreateIndex, CreateTable

from shardkit.clock import SYSTEM, Clock
from shardkit.models import REFERENCE_SCHEMA, rules_of
from shardkit.ops import catalog
from shardkit.topology import PhysicalShard, Topology, schema_name

__all__ = ["FakeClock", "create_tables", "wait_until"]

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


def create_tables(topology: Topology, metadata: MetaData) -> None:
    """Create shardkit's own tables and those of models, in every logical shard, from nothing.

    Args:
        topology: where; its admin logins are used.
        metadata: of the models.
    """
    for shard in topology.physical.values():
        url = shard.admin_url.set(drivername="postgresql")
        with psycopg.connect(
            url.render_as_string(hide_password=False), autocommit=True
        ) as connection:
            for transaction in _creation(topology, shard, metadata):
                with connection.transaction():
                    for statement in transaction:
                        connection.execute(statement)


def _creation(
    topology: Topology, shard: PhysicalShard, metadata: MetaData
) -> Iterator[list[sql.SQL | sql.Composed]]:
    """Yield the transactions that set up one physical shard."""
    role = str(shard.primary.url.username)
    yield catalog.admin_statements(
        cluster=topology.name,
        physical=shard.name,
        n_logical_shards=topology.n_logical_shards,
        app_role=role,
    )
    yield catalog.rule_statements(rules_of(metadata))
    tables = metadata.sorted_tables
    yield list(_reference([t for t in tables if t.schema == REFERENCE_SCHEMA], role))
    sharded = [ddl for t in tables if t.schema is None for ddl in _ddl(t)]
    for number in topology.shard_map.owned_by(shard.name):
        path = sql.SQL("SET LOCAL search_path = {}").format(sql.Identifier(schema_name(number)))
        yield [*catalog.logical_shard_statements(number, app_role=role), path, *sharded]


def _reference(tables: Iterable[Table], role: str) -> Iterator[sql.SQL | sql.Composed]:
    schema, grantee = sql.Identifier(REFERENCE_SCHEMA), sql.Identifier(role)
    yield sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(schema)
    yield sql.SQL("GRANT USAGE ON SCHEMA {} TO {}").format(schema, grantee)
    for table in tables:
        yield from _ddl(table)
    yield sql.SQL("GRANT SELECT ON ALL TABLES IN SCHEMA {} TO {}").format(schema, grantee)


def _ddl(table: Table) -> Iterator[sql.SQL]:
    language = dialect()  # type: ignore[no-untyped-call]  # SQLAlchemy leaves it untyped
    yield sql.SQL(str(CreateTable(table).compile(dialect=language)))
    for index in table.indexes:
        yield sql.SQL(str(CreateIndex(index).compile(dialect=language)))
