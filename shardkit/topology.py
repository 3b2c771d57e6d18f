"""Where data lives: endpoints, physical shards, and the map from logical to physical shard.

Plain immutable values, made by `shardkit.config` from `shardkit.toml` and read by everything
below it. This module never opens a connection.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from typing import Any

from sqlalchemy import URL

__all__ = [
    "MAX_LOGICAL_SHARDS",
    "Endpoint",
    "Hold",
    "PhysicalShard",
    "Pooler",
    "Role",
    "RoleNames",
    "ShardMap",
    "Topology",
    "libpq_options",
    "like",
    "schema_name",
]

MAX_LOGICAL_SHARDS = 8192
"""Logical shards the 13 bits of an id can name. Source: docs/architecture.md, decision 1."""


def schema_name(logical_shard: int) -> str:
    """Return the PostgreSQL schema of a logical shard: 42 gives `shard_0042`."""
    return f"shard_{logical_shard:04d}"


class Hold(StrEnum):
    """Why a logical shard cannot be used as ever for now."""

    FENCED = "fenced"
    """It is being moved: it is read as ever, and writes wait."""

    HANDED_OVER = "handed over"
    """It has moved and is not open yet where it went: everything waits."""

    DISPUTED = "disputed"
    """Two physical shards say that they own it: nothing is written to either."""


def like(login: URL, url: URL) -> URL:
    """Return an address with the login of another one: name, password and client certificate."""
    ours = {key: value for key, value in login.query.items() if key in _OF_LOGIN}
    kept = {key: value for key, value in url.query.items() if key not in _OF_LOGIN}
    found = url.set(username=login.username, query={**kept, **ours})
    # `set` takes None for "as it was".
    return found._replace(password=login.password)


def libpq_options(url: URL) -> dict[str, Any]:
    """Return what libpq connects with to reach an address.

    As options and not as one text: SQLAlchemy and libpq do not agree on how to write a blank in a
    password, and libpq shows the text when it complains.
    """
    return {
        **{key: value for key, value in url.query.items() if isinstance(value, str)},
        "host": url.host,
        "port": url.port or 5432,
        "dbname": url.database,
        "user": url.username,
        "password": url.password,
    }


_OF_LOGIN = frozenset({"sslcert", "sslkey"})


class Role(StrEnum):
    """What a server is for: a primary takes writes, a replica replays them."""

    PRIMARY = "primary"
    REPLICA = "replica"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One server address with one role.

    Attributes:
        physical: name of the physical shard it serves.
        role: primary or replica.
        url: address, database and application login; its password never appears in `repr`.
        read_url: where single statements of readers go instead, when `url` cannot refuse writes;
            None for `url`.
        region: where it stands, or an empty string; near replicas are read first.
        standby: its name in `synchronous_standby_names` (PostgreSQL's `application_name`), or
            an empty string where commits do not wait for it.
        server_url: of PostgreSQL itself, where `url` names a pooler and it is known; else None.
        address: `host:port/database`, which with the first two tells endpoints apart.
    """

    physical: str
    role: Role
    url: URL = field(repr=False, compare=False)
    read_url: URL | None = field(default=None, repr=False, compare=False)
    region: str = field(default="", compare=False)
    standby: str = field(default="", compare=False)
    server_url: URL | None = field(default=None, repr=False, compare=False)
    address: str = field(init=False)

    def __post_init__(self) -> None:
        address = f"{self.url.host}:{self.url.port or 5432}/{self.url.database}"
        object.__setattr__(self, "address", address)

    @property
    def synchronous(self) -> bool:
        """Whether commits of the primary wait for it."""
        return bool(self.standby)

    def __str__(self) -> str:
        return f"{self.physical}/{self.role}@{self.address}"


@dataclass(frozen=True, slots=True)
class Pooler:
    """A PgBouncer in transaction mode between clients and a physical shard.

    Attributes:
        version: its numbers; empty when unknown.
    """

    version: tuple[int, ...] = ()

    @property
    def carries_prepared_statements(self) -> bool:
        """Whether a statement prepared on one server connection is found on another.

        Source: PgBouncer's changelog, 1.21, `max_prepared_statements`.
        """
        return self.version >= (1, 21)


@dataclass(frozen=True, slots=True)
class RoleNames:
    """PostgreSQL's roles by what they do; two duties without logins of their own share one.

    Attributes:
        owner: owns every schema, table and function; nobody has to be able to log in as it.
        app: what sessions are; owns nothing.
        admin: makes the roles.
        migrator: runs revisions and repairs, as a member of the owner.
        mover: moves logical shards, as a member of the owner that may replicate.
        relay: delivers events; may do all that the application may.
        monitor: looks at states and settings, and at no row of a user.
    """

    owner: str
    app: str
    admin: str
    migrator: str
    mover: str
    relay: str
    monitor: str

    @classmethod
    def of(cls, *, app: str, admin: str) -> RoleNames:
        """Return the roles of a cluster with two logins."""
        return cls(
            owner=admin, app=app, admin=admin,
            migrator=admin, mover=admin, relay=app, monitor=admin,
        )  # fmt: skip

    @property
    def has_relay(self) -> bool:
        """Whether events are delivered by another role than the application's."""
        return self.relay != self.app

    @property
    def has_monitor(self) -> bool:
        """Whether somebody looks who owns nothing."""
        return self.monitor not in {self.app, self.relay, self.owner, self.admin, self.migrator}


@dataclass(frozen=True, slots=True)
class PhysicalShard:
    """One PostgreSQL primary and its replicas.

    Attributes:
        name: how people call it.
        primary: where writes go.
        replicas: where reads may go; possibly empty.
        admin_url: the primary again, with the login that acts as the owner of the schemas: the
            migrator's, or the admin's where there is none; used by commands, and never by way of a
            pooler.
        pooler: what stands between applications and its endpoints; None for nothing.
        relay_url: the primary with the relay's login; None for that of sessions.
        monitor_url: as `admin_url`, with the monitor's login; None for that.
        mover_url: the same with the mover's login; None for that of `admin_url`.
        control_url: the same with the login that makes roles; None for that of `admin_url`.
        named_roles: who does what; None where there are two logins.
    """

    name: str
    primary: Endpoint
    replicas: tuple[Endpoint, ...]
    admin_url: URL = field(repr=False)
    pooler: Pooler | None = None
    relay_url: URL | None = field(default=None, repr=False, compare=False)
    monitor_url: URL | None = field(default=None, repr=False, compare=False)
    mover_url: URL | None = field(default=None, repr=False, compare=False)
    control_url: URL | None = field(default=None, repr=False, compare=False)
    named_roles: RoleNames | None = None

    @property
    def roles(self) -> RoleNames:
        """Who does what on its servers."""
        return self.named_roles or RoleNames.of(
            app=self.primary.url.username or "", admin=self.admin_url.username or ""
        )

    @property
    def looking_url(self) -> URL:
        """Where commands look that change nothing: the monitor's login, or the admin's."""
        return self.monitor_url or self.admin_url

    def looking_at(self, url: URL) -> URL:
        """Return another address with the login of `looking_url`."""
        return like(self.looking_url, url)

    def led_by(self, address: str) -> PhysicalShard:
        """Return the physical shard with another server as its primary, the old one a replica.

        Where a pooler stands between, clients keep their addresses, and names lead to other
        servers: the new primary's place among the replicas is the old one's.

        Args:
            address: of the server, as `Endpoint.address` has it; behind a pooler, of its
                `server_url`.
        """
        if self.pooler is not None:
            return self._led_behind_pooler(address)
        found = next((e for e in self.replicas if e.address == address), None)
        if found is None:
            return self
        old = self.primary
        replicas = tuple(
            replace(old, role=Role.REPLICA, read_url=None) if each is found else each
            for each in self.replicas
        )
        return self._at(found.url, replace(found, role=Role.PRIMARY), replicas)

    def _led_behind_pooler(self, address: str) -> PhysicalShard:
        for n, each in enumerate(self.replicas):
            url = each.server_url
            if url is not None and f"{url.host}:{url.port or 5432}/{url.database}" == address:
                place = replace(each, server_url=like(url, self.admin_url))
                replicas = (*self.replicas[:n], place, *self.replicas[n + 1 :])
                return self._at(url, self.primary, replicas)
        return self

    def _at(self, server: URL, primary: Endpoint, replicas: tuple[Endpoint, ...]) -> PhysicalShard:
        def moved(url: URL | None) -> URL | None:
            return None if url is None else like(url, server)

        return replace(
            self,
            primary=primary,
            replicas=replicas,
            admin_url=like(self.admin_url, server),
            # A relay goes by way of the pooler, too.
            relay_url=self.relay_url if self.pooler else moved(self.relay_url),
            monitor_url=moved(self.monitor_url),
            mover_url=moved(self.mover_url),
            control_url=moved(self.control_url),
        )

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """The primary, then the replicas in the order of the configuration."""
        return (self.primary, *self.replicas)


@dataclass(frozen=True, slots=True)
class ShardMap:
    """Owner of every logical shard.

    *Invariant:* `owners[n]` names the physical shard of logical shard n; `epochs[n]` counts
    its hand-overs, starting at 1; `held[n]` is there while it cannot be used as ever.
    """

    owners: tuple[str, ...]
    epochs: tuple[int, ...]
    held: Mapping[int, Hold] = field(default_factory=dict, hash=False)

    def __len__(self) -> int:
        return len(self.owners)

    def owner(self, logical_shard: int) -> str:
        """Return the name of the physical shard that holds a logical shard."""
        return self.owners[logical_shard]

    def owned_by(self, physical: str) -> tuple[int, ...]:
        """Return the logical shards of a physical shard, ascending; possibly empty."""
        return tuple(n for n, owner in enumerate(self.owners) if owner == physical)


@dataclass(frozen=True)
class Topology:
    """The shard map plus every endpoint.

    Attributes:
        name: name of the cluster, for people.
        physical: physical shards by name, in the order of the configuration.
        shard_map: owner of every logical shard.
    """

    name: str
    physical: Mapping[str, PhysicalShard]
    shard_map: ShardMap

    @cached_property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """Every endpoint, physical shard after physical shard, primaries first."""
        return tuple(e for shard in self.physical.values() for e in shard.endpoints)

    @property
    def n_logical_shards(self) -> int:
        """The fixed number of logical shards."""
        return len(self.shard_map)
