"""Where data lives: endpoints, physical shards, and the map from logical to physical shard.

Plain immutable values, made by `shardkit.config` from `shardkit.toml` and read by everything
below it. This module never opens a connection.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property

from sqlalchemy import URL

__all__ = [
    "MAX_LOGICAL_SHARDS",
    "Endpoint",
    "Hold",
    "PhysicalShard",
    "Pooler",
    "Role",
    "ShardMap",
    "Topology",
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
class PhysicalShard:
    """One PostgreSQL primary and its replicas.

    Attributes:
        name: how people call it.
        primary: where writes go.
        replicas: where reads may go; possibly empty.
        admin_url: the primary again, with the login that owns the schemas; used by commands, and
            never by way of a pooler.
        pooler: what stands between applications and its endpoints; None for nothing.
    """

    name: str
    primary: Endpoint
    replicas: tuple[Endpoint, ...]
    admin_url: URL = field(repr=False)
    pooler: Pooler | None = None

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
