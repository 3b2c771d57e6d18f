"""People, edges and photos on servers of their own, for the benchmarks of the application.

Rows are copied in behind the triggers' back, before anything is cached.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import psycopg
from psycopg import sql

from app.graph.models import Kind
from app.tables import Base
from benchmarks.measure import servers
from shardkit import ids
from shardkit.config import CacheConfig, load
from shardkit.local import LocalCluster
from shardkit.testing import create_tables
from shardkit.topology import Topology, schema_name

__all__ = ["N_SHARDS", "World", "patient", "world"]

N_SHARDS = 16
EPOCH_MS = 1_790_000_000_000
NOW = datetime(2026, 9, 1, tzinfo=UTC)


def patient(cluster: Any) -> Any:
    """Let the cache of a cluster take its time: other programs use this machine too."""
    cluster.cache.backend.seconds = 5.0
    return cluster


@dataclass
class World:
    """Where everything is.

    Attributes:
        local: the servers.
        topology: of them.
        cache: how their Memcached is used.
        redis: address of their Redis.
    """

    local: LocalCluster
    topology: Topology
    cache: CacheConfig
    redis: str
    _numbers: dict[int, int] = field(default_factory=dict)
    _next_photo: int = 1_000_000

    def ids(self, n: int, *, shard: int | None = None, ms: int = 1_000) -> list[int]:
        """Return new ids, spread over the logical shards."""
        found = []
        for at in range(n):
            where = at % N_SHARDS if shard is None else shard
            number = self._numbers[where] = self._numbers.get(where, 0) + 1
            found.append(ids.compose(ms + number // 1024, where, number % 1024))
        return found

    def copy(self, table: str, columns: Sequence[str], rows: Mapping[int, Iterable[Any]]) -> None:
        """Copy rows into a table, by logical shard; triggers are not told."""
        owners = self.topology.shard_map
        for name in self.topology.physical:
            dsn = self.local.superuser_dsn(self.local.primary(name).name, "shardkit")
            with psycopg.connect(dsn) as connection:
                connection.execute("SET session_replication_role = replica")
                for shard in owners.owned_by(name):
                    statement = sql.SQL("COPY {} ({}) FROM STDIN").format(
                        sql.Identifier(schema_name(shard), table),
                        sql.SQL(", ").join(map(sql.Identifier, columns)),
                    )
                    with connection.cursor().copy(statement) as copy:
                        for row in rows.get(shard, ()):
                            copy.write_row(row)
                connection.commit()
                connection.autocommit = True
                connection.execute("ANALYZE")

    def people(self, n: int) -> list[int]:
        """Add people."""
        made = self.ids(n)
        rows: dict[int, list[Any]] = {}
        for id_ in made:
            name = f"p{id_}"
            rows.setdefault(ids.shard_of(id_), []).append((id_, name, name, "", "", NOW))
        columns = ("id", "username", "display_name", "bio", "password_hash", "created_at")
        self.copy("users", columns, rows)
        return made

    def edges(self, pairs: Iterable[tuple[int, int]]) -> int:
        """Add follows with their other sides; return how many."""
        rows: dict[int, list[Any]] = {}
        n = 0
        for n, (a, b) in enumerate(dict.fromkeys(pairs), 1):
            at = EPOCH_MS + n
            rows.setdefault(ids.shard_of(a), []).append((a, int(Kind.FOLLOWS), b, at))
            rows.setdefault(ids.shard_of(b), []).append((b, int(Kind.FOLLOWED_BY), a, at))
        self.copy("assocs", ("id1", "atype", "id2", "at"), rows)
        return n

    def photos(self, owners: Sequence[int], each: int) -> dict[int, list[int]]:
        """Add photos of some people, in an order mixed over all; return their ids by owner."""
        rng = random.Random(1)
        order = [owner for owner in owners for _ in range(each)]
        rng.shuffle(order)
        rows: dict[int, list[Any]] = {}
        found: dict[int, list[int]] = {}
        for n, owner in enumerate(order):
            shard = ids.shard_of(owner)
            id_ = ids.compose(self._next_photo + n, shard, 0)
            found.setdefault(owner, []).append(id_)
            rows.setdefault(shard, []).append((id_, owner, "", 640, 480, "k" * 32, NOW))
        self._next_photo += len(order)
        columns = ("id", "owner_id", "caption", "width", "height", "blob_key", "created_at")
        self.copy("photos", columns, rows)
        return found


@contextmanager
def world(**options: Any) -> Iterator[World]:
    """Run the servers, with the tables of the application."""
    shape = {"logical_shards": N_SHARDS, "redis": True, "memcached": True, **options}
    with servers(**shape) as local:
        settings, topology = load(local.config_path)
        create_tables(topology, Base.metadata)
        services = settings.services
        cache = CacheConfig(backend="memcached", nodes=(services["memcached"],))
        yield World(local, topology, cache, services["redis"])
