"""What `shardkit doctor` collects, as values: no connection, no decision.

Made by `shardkit.ops.health.collect`, and by hand in the tests of the checks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from shardkit.errors import ShardkitError
from shardkit.ops.intervals import Interval
from shardkit.ops.ledger import Ledger
from shardkit.ops.lookup import Report
from shardkit.ops.outbox import PhysicalOutbox
from shardkit.ops.reference import ReferenceCheck
from shardkit.topology import Role, Topology

__all__ = [
    "AppRole",
    "Expected",
    "Facts",
    "IdState",
    "Login",
    "Memcached",
    "PgBouncer",
    "PooledDatabase",
    "Prepared",
    "Redis",
    "Server",
    "Silent",
    "Slot",
    "Standby",
    "State",
]


@dataclass(frozen=True, slots=True)
class Expected:
    """What the configuration says.

    Attributes:
        topology: the cluster.
        pool: connections that one pool of a process may open: `pool.size` and `pool.overflow`.
        prepares: whether `pool.prepare_statements` says so; None leaves it to the version.
        processes: programs that use the cluster at the same time.
        confirming: standbys that have to confirm each commit.
    """

    topology: Topology
    pool: int = 10
    prepares: bool | None = None
    processes: int = 1
    confirming: int = 0

    @property
    def writers_pools(self) -> int:
        """Connections to a primary of one process: four pools, one for leases, one that probes.

        Source: `shardkit.connections.Purpose`.
        """
        return 4 * self.pool + 2

    @property
    def readers_pools(self) -> int:
        """Connections to a replica of one process."""
        return self.pool + 1


@dataclass(frozen=True, slots=True)
class Silent:
    """Something that could not be asked.

    Attributes:
        where: the server.
        what: what it was asked as.
        reason: in one line.
    """

    where: str
    what: str
    reason: str


@dataclass(frozen=True, slots=True)
class Prepared:
    """A prepared transaction: its name, and seconds since it was prepared."""

    gid: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Slot:
    """A replication slot.

    Attributes:
        name: of the slot.
        is_active: whether somebody reads from it.
        held_bytes: log that is kept for it.
        is_lost: whether log that it needs is gone.
    """

    name: str
    is_active: bool
    held_bytes: int
    is_lost: bool = False


@dataclass(frozen=True, slots=True)
class Standby:
    """A server that follows this one: `application_name`, and whether it streams."""

    name: str
    is_streaming: bool


@dataclass(frozen=True, slots=True)
class Server:
    """One PostgreSQL server, as it tells the admin login.

    Attributes:
        where: the endpoint.
        physical: its physical shard.
        role: what the configuration says it is.
        is_replica: what it says it is.
        version: as `server_version_num`.
        settings: by name, in base units.
        pending: settings that wait for a restart.
        clock_offset: seconds it is ahead of this machine.
        clock_error: how far that may be off, being half of the round trip.
        system: number of the database cluster, which its replicas share; 0 when not told.
        encoding: of the database.
        collation: of the database.
        host: where it listens, as commands reach it.
        prepared: transactions, oldest first.
        slots: replication slots.
        standbys: who follows it.
        is_streaming: of a replica, whether log arrives.
        intervals: times in which commits went unconfirmed by standbys, oldest first.
        may_lose: what the last failover may have lost for that, as a mapping; None for nothing.
        extensions: version by name.
        available: extensions whose files are there.
    """

    where: str
    physical: str
    role: Role
    is_replica: bool
    version: int
    settings: Mapping[str, str]
    pending: tuple[str, ...] = ()
    clock_offset: float = 0.0
    clock_error: float = 0.0
    system: int = 0
    encoding: str = "UTF8"
    collation: str = "C.UTF-8"
    host: str = "127.0.0.1"
    prepared: tuple[Prepared, ...] = ()
    slots: tuple[Slot, ...] = ()
    standbys: tuple[Standby, ...] = ()
    is_streaming: bool = True
    intervals: tuple[Interval, ...] = ()
    may_lose: Mapping[str, Any] | None = None
    extensions: Mapping[str, str] = field(default_factory=dict)
    available: frozenset[str] = frozenset()

    def number(self, setting: str) -> int:
        """Return a setting as a number."""
        return int(self.settings[setting])


@dataclass(frozen=True, slots=True)
class Login:
    """What the application gets at one address.

    Attributes:
        where: the endpoint.
        is_for_readers: whether only readers go there.
        is_read_only: whether transactions may not write there.
        system: number of the database cluster behind it; 0 when not told.
        settings: by name, in base units.
    """

    where: str
    is_for_readers: bool
    is_read_only: bool
    system: int
    settings: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class AppRole:
    """What a login may do on one primary beyond its work.

    Attributes:
        name: of the role.
        powers: attributes such as `SUPERUSER`, and memberships that amount to as much.
        owned: schemas, tables and functions that it owns, some of them.
        creates_in: schemas of the database, or the database itself, where it may create.
    """

    name: str
    powers: tuple[str, ...] = ()
    owned: tuple[str, ...] = ()
    creates_in: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class IdState:
    """The state of one logical shard's ids: seconds it is ahead of its server's clock, or None."""

    logical_shard: int
    ahead: float | None


@dataclass(frozen=True, slots=True)
class State:
    """What shardkit keeps on one primary.

    Attributes:
        where: the endpoint.
        physical: its physical shard.
        ledger: identity, ownership and what has been applied.
        admin_digest: which the admin schema has when it is complete.
        shard_digest: which the ledger of each logical shard has then.
        schemas: logical shards that have a schema.
        ids: by logical shard that is owned and has a schema.
        n_relations: tables and indexes of all logical shards.
        widest: tables and indexes that a statement on one table locks over all of them.
        app: the application's role.
        admin_powers: of the admin's role, see `AppRole.powers`.
        logged: settings by which statements that fail are logged and which the admin's role may
            not change.
        role_changes: what `shardkit roles plan` would list, but for passwords.
    """

    where: str
    physical: str
    ledger: Ledger
    admin_digest: str
    shard_digest: str
    schemas: frozenset[int]
    ids: tuple[IdState, ...]
    n_relations: int
    widest: int
    app: AppRole
    admin_powers: tuple[str, ...] = ()
    logged: tuple[str, ...] = ()
    role_changes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PooledDatabase:
    """One database of a PgBouncer: name, server behind it, mode and size of its pools."""

    name: str
    server: str
    mode: str
    size: int


@dataclass(frozen=True, slots=True)
class PgBouncer:
    """One PgBouncer, as its console tells.

    Attributes:
        where: `host:port`.
        host: of it.
        physical: the physical shard behind it.
        version: its numbers.
        told: the version that the configuration says; empty for none.
        settings: by name.
        databases: that it has, without its own.
    """

    where: str
    host: str
    physical: str
    version: tuple[int, ...]
    told: tuple[int, ...]
    settings: Mapping[str, str]
    databases: tuple[PooledDatabase, ...]


@dataclass(frozen=True, slots=True)
class Redis:
    """One Redis.

    Attributes:
        where: name in `[services]`.
        role: `master` or `slave`.
        policy: `maxmemory-policy`.
        max_bytes: `maxmemory`; 0 for no bound.
        is_kept: whether its data survive a restart.
    """

    where: str
    role: str
    policy: str
    max_bytes: int
    is_kept: bool


@dataclass(frozen=True, slots=True)
class Memcached:
    """One Memcached.

    Attributes:
        where: name in `[services]`.
        version: its numbers.
        knows_meta: whether it answers meta commands.
        max_item_bytes: size of the largest entry.
    """

    where: str
    version: tuple[int, ...]
    knows_meta: bool
    max_item_bytes: int


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything that was collected.

    Attributes:
        expected: what the configuration says.
        servers: PostgreSQL servers that answered the admin login.
        logins: addresses where the application's login was accepted.
        states: of the primaries among the servers that shardkit has used.
        silent: what could not be asked.
        poolers: those that answered.
        redis: those that answered.
        memcached: those that answered.
        outboxes: of the primaries.
        reference: comparison of reference tables; None when it was not made.
        lookups: samples of unique columns.
        failures: other things that could not be looked at.
    """

    expected: Expected
    servers: tuple[Server, ...] = ()
    logins: tuple[Login, ...] = ()
    states: tuple[State, ...] = ()
    silent: tuple[Silent, ...] = ()
    poolers: tuple[PgBouncer, ...] = ()
    redis: tuple[Redis, ...] = ()
    memcached: tuple[Memcached, ...] = ()
    outboxes: tuple[PhysicalOutbox, ...] = ()
    reference: ReferenceCheck | None = None
    lookups: tuple[Report, ...] = ()
    failures: Mapping[str, ShardkitError] = field(default_factory=dict)

    @property
    def primaries(self) -> tuple[Server, ...]:
        """The servers that take writes."""
        return tuple(server for server in self.servers if not server.is_replica)

    def primary(self, physical: str) -> Server | None:
        """Return the server of a physical shard that takes writes, or None."""
        return next((s for s in self.primaries if s.physical == physical), None)

    def of(self, physical: str) -> tuple[Server, ...]:
        """Return the servers of a physical shard that answered."""
        return tuple(server for server in self.servers if server.physical == physical)
