"""Who takes part in `cachechaos`, and where: the machines by themselves, or real sessions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import psycopg

from benchmarks import cachesessions
from benchmarks.cacheroles import TABLES, Shared, read, relay, write
from benchmarks.measure import tables
from shardkit.config import load
from shardkit.topology import PhysicalShard

__all__ = ["Machines", "Sessions"]

N_ROWS: Final = 3000
N_ITEMS: Final = 600
"""Of sessions, which are slower: each is read as often."""

Roles = tuple[Callable[..., None], Callable[..., None], Callable[..., None]]
"""The relay, who writes, who reads."""


class Machines:
    """The protocol's machines, driven by themselves, on a table of their own; in Memcached."""

    kind = "memcached"
    n_rows = N_ROWS

    def __init__(self, config: Path) -> None:
        _, topology = load(config)
        self.dsn = _dsn(next(iter(topology.physical.values())))
        self.roles: Roles = (relay, write, read)

    @contextmanager
    def made(self, database: psycopg.Connection[Any]) -> Iterator[None]:
        """Make the table, with rows, for a while."""
        _make(database)
        try:
            yield
        finally:
            _drop(database)

    def shared(self, *common: Any) -> Any:
        """Return what the processes are told."""
        return Shared(self.dsn, *common)

    def look(self, database: psycopg.Connection[Any]) -> list[Any]:
        """Return number and version of every row, as committed now."""
        return database.execute("SELECT id, version FROM chaos_rows").fetchall()

    def left(self, database: psycopg.Connection[Any]) -> int:
        """Return how many changes were not repaired."""
        ((n,),) = database.execute("SELECT count(*) FROM chaos_outbox").fetchall()
        return int(n)


class Sessions:
    """Real sessions, in Memcached or in Redis."""

    n_rows = N_ITEMS

    def __init__(self, config: Path, kind: str) -> None:
        self.kind = kind
        self._config = config
        _, self._topology = load(config)
        # Rows lie on every server; the first one's are looked at.
        first = next(iter(self._topology.physical.values()))
        self.dsn = _dsn(first)
        self._shards = self._topology.shard_map.owned_by(first.name)
        self._ids: tuple[int, ...] = ()
        self.roles: Roles = (cachesessions.relay, cachesessions.write, cachesessions.read)

    @contextmanager
    def made(self, _database: psycopg.Connection[Any]) -> Iterator[None]:
        """Make the table, with rows, for a while."""
        with tables(self._topology, cachesessions.Base.metadata):
            self._ids = cachesessions.fill(self._topology, self._shards, N_ITEMS)
            yield

    def shared(self, *common: Any) -> Any:
        """Return what the processes are told."""
        return cachesessions.SessionShared(self._config, self.kind, self._ids, *common)

    def look(self, database: psycopg.Connection[Any]) -> list[Any]:
        """Return number and version of every row, as committed now."""
        return cachesessions.versions(database, self._shards)

    def left(self, database: psycopg.Connection[Any]) -> int:
        """Return how many changes were not repaired."""
        return cachesessions.waiting(database, self._shards)


def _dsn(shard: PhysicalShard) -> str:
    url = shard.admin_url.set(drivername="postgresql")
    return url.render_as_string(hide_password=False)


def _make(database: psycopg.Connection[Any]) -> None:
    for statement in TABLES:
        database.execute(statement)
    database.execute(
        "INSERT INTO chaos_rows SELECT n, nextval('chaos_versions'), repeat('x', 700)"
        " FROM generate_series(0, %s) AS n",
        [N_ROWS - 1],
    )


def _drop(database: psycopg.Connection[Any]) -> None:
    database.execute("DROP TABLE chaos_rows, chaos_outbox")
    database.execute("DROP SEQUENCE chaos_versions")
