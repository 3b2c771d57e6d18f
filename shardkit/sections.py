"""The sections of `shardkit.toml` as values: what may stand in each.

One class a section, validated by itself; `shardkit.config` reads the file, checks what concerns
several sections, and makes the topology.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator

from shardkit.logins import Login, Section
from shardkit.topology import MAX_LOGICAL_SHARDS, Pooler

__all__ = [
    "FAILOVER_PATIENCE",
    "MAP_AGE",
    "MAX_ROWS",
    "STATEMENT_TIMEOUT",
    "BackupConfig",
    "CacheConfig",
    "ClusterConfig",
    "DurabilityConfig",
    "FailoverConfig",
    "LimitsConfig",
    "MigrationsConfig",
    "PgBouncerConfig",
    "PhysicalConfig",
    "PoolConfig",
    "RebalanceConfig",
    "ReplicaConfig",
    "ReplicasConfig",
    "TokensConfig",
    "parse_ranges",
]


Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,40}$")]


class ClusterConfig(Section):
    """`[cluster]`: what is fixed when the cluster is created."""

    name: Name
    logical_shards: Annotated[int, Field(ge=1, le=MAX_LOGICAL_SHARDS)]


class BackupConfig(Login):
    """`[backup]`: where backups are kept, and who may copy the servers.

    The login needs REPLICATION; without a user it is the admin's.
    """

    folder: str = "backups"
    """Where they are kept; a relative path counts from the folder of the file."""

    keep: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """How many backups `create` leaves; None for all."""


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("must be finite")
    return value


class PoolConfig(Section):
    """`[pool]`: connections per endpoint and process."""

    size: Annotated[int, Field(ge=1, le=1000)] = 5
    overflow: Annotated[int, Field(ge=0, le=1000)] = 5
    timeout: Annotated[float, Field(gt=0, le=300)] = 5.0
    connect_timeout: Annotated[int, Field(ge=1, le=300)] = 5
    prepare_statements: bool | None = None
    """None: yes, but not behind a PgBouncer older than 1.21 or of unknown version, which cannot
    carry them. From 1.21 to 1.23 it needs `max_prepared_statements` above 0."""

    @field_validator("timeout")
    @classmethod
    def _is_finite(cls, value: float) -> float:
        return _finite(value)


MAX_ROWS = 300_000
"""Rows a statement may fetch from several logical shards. Source: Vitess, max_memory_rows."""

STATEMENT_TIMEOUT = 30.0
"""Seconds a session waits for one answer: longer than any statement of a service should take,
shorter than the minutes after which TCP finds that a peer is gone."""


MAP_AGE = 5.0
"""Seconds after which a process does not use a logical shard without having asked who owns it."""


class LimitsConfig(Section):
    """`[limits]`: how far statements may go that do not say it themselves."""

    max_rows: Annotated[int, Field(ge=1, le=2**31)] = MAX_ROWS
    """Rows fetched from all servers together, before they are merged."""

    statement_timeout: Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)] = (
        STATEMENT_TIMEOUT
    )
    """Seconds a session waits for one answer of a server, where no deadline says less."""

    map_age: Annotated[float, Field(ge=0.1, le=60, allow_inf_nan=False)] = MAP_AGE
    """Seconds for which what a server said of the logical shards that it owns counts."""

    adaptive: bool = False
    """Whether the number of sessions at a time on one server follows how quickly it answers."""


FAILOVER_PATIENCE = 10.0
"""Seconds that a unit of work waits for a new primary: three times what a failover takes."""


class DurabilityConfig(Section):
    """`[durability]`: what an acknowledged commit survives."""

    mode: Literal["sync", "async"] = "async"
    """`sync`: the loss of any one server. `async`: all but what the replicas had not received."""

    confirm: Annotated[int, Field(ge=1, le=8)] = 1
    """Standbys that confirm each commit in mode `sync`: k of `ANY k (…)`."""

    last_standby: Literal["strict", "relaxed"] = "strict"
    """When fewer standbys are left than have to confirm. `strict`: commits wait. `relaxed`: the
    watcher lets them go unconfirmed after `patience`, and notes from when until when."""

    patience: Annotated[float, Field(ge=0, le=3600, allow_inf_nan=False)] = 10.0
    """Seconds for which commits wait before that. Longer than a failover takes."""

    @property
    def confirming(self) -> int:
        """How many standbys confirm each commit; 0 for none."""
        return self.confirm if self.mode == "sync" else 0


class FailoverConfig(Section):
    """`[failover]`: when another server becomes the primary; durations in seconds."""

    mode: Literal["act", "follow"] = "act"
    """`act`: `shardkit failover watch` promotes. `follow`: something else does, such as Patroni or
    a managed service; the watcher registers what it promoted, and looks after poolers."""

    failures: Annotated[int, Field(ge=1, le=100)] = 3
    """Probes in a row that have to fail."""

    patience: Annotated[float, Field(ge=0, le=600, allow_inf_nan=False)] = 1.0
    """How long they have to fail."""

    interval: Annotated[float, Field(ge=0.05, le=60, allow_inf_nan=False)] = 0.4
    """Between two probes."""

    timeout: Annotated[float, Field(ge=0.1, le=60, allow_inf_nan=False)] = 1.0
    """How long a server has to answer one."""

    every: Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)] = 60.0
    """Between two failovers of one physical shard, at least."""

    adopt: bool = True
    """Whether the watcher registers a promotion by somebody else, once the old primary is gone."""

    wait: Annotated[float, Field(ge=0, le=600, allow_inf_nan=False)] = FAILOVER_PATIENCE
    """How long `cluster.run` waits for a new primary, where no deadline says less; 0 for not."""

    fence: tuple[str, ...] = Field(default=(), strict=False)
    """Command that stops a server and exits with 0 when it surely does not run any more; `{host}`,
    `{port}`, `{physical}` are replaced. None: it is told over SQL, where it answers."""

    rejoin: tuple[str, ...] = Field(default=(), strict=False)
    """Command that makes a server a standby of `{primary_host}`:`{primary_port}`, and starts it; it
    may run still. `{how}` is `rewind`, or `copy` where pg_rewind ended well and did not help."""

    lead: tuple[str, ...] = Field(default=(), strict=False)
    """Command that renders and reloads the poolers of `{physical}`."""


class ReplicasConfig(Section):
    """`[replicas]`: how readers use replicas; durations in seconds."""

    region: str | None = None
    """Where this process runs; `SHARDKIT_REGION` in the environment wins. None for nowhere."""

    patience: Annotated[float, Field(ge=0, le=10)] = 0.02
    """How long a replica may wait for log that it has not replayed, before the primary is asked.
    Source: `python -m benchmarks stale`."""

    hedge: bool = False
    """Whether a read that takes longer than 97 of 100 do is asked of a second replica as well; at
    most one read of twenty is."""

    probe_interval: Annotated[float, Field(ge=0.01, le=60)] = 0.1
    """Between two questions to each server about its log."""

    @field_validator("patience", "probe_interval")
    @classmethod
    def _is_finite(cls, value: float) -> float:
        return _finite(value)

    @property
    def here(self) -> str:
        """The region of this process; empty for none."""
        return os.environ.get("SHARDKIT_REGION") or self.region or ""


class TokensConfig(Section):
    """`[tokens]`: what signs tokens that leave the process."""

    keys: tuple[SecretStr, ...] = Field(default=(), strict=False)
    """At least 16 bytes each; the first signs, all are accepted."""

    def secrets(self) -> tuple[str, ...]:
        """Return the keys; `SHARDKIT_TOKEN_KEYS`, separated by commas, wins."""
        if from_environment := os.environ.get("SHARDKIT_TOKEN_KEYS"):
            return tuple(key.strip() for key in from_environment.split(","))
        return tuple(key.get_secret_value() for key in self.keys)


class ReplicaConfig(Section):
    """One of `physical.replicas`, where an address alone does not say enough."""

    url: SecretStr
    region: str = ""
    """Where it stands."""

    standby: str = ""
    """Its name in `synchronous_standby_names`; empty when commits do not wait for it."""

    server: SecretStr | None = None
    """Address of PostgreSQL itself, when `url` names a PgBouncer; `shardkit pgbouncer render` needs
    it. Login and password are those of `url`."""


class PgBouncerConfig(Section):
    """`[pgbouncer]`: what `shardkit pgbouncer render` cannot know from the servers."""

    processes: Annotated[int, Field(ge=1, le=100_000)] = 1
    """Programs that use the cluster at the same time; pools are as large as they need."""

    poolers: Annotated[int, Field(ge=1, le=1000)] = 1
    """PgBouncers in front of each server, which share its connections."""

    listen_addr: str = ""
    """Where it listens; empty for the host of `primary`, or the loopback."""

    port: Annotated[int, Field(ge=1, le=65_535)] = 6432
    """Where it listens, while `primary` names the server itself."""

    sockets: str = ""
    """Folder of the unix socket; empty for that of the files."""

    auth_user: str = ""
    """Login that asks the servers for the verifiers of others; empty for a list of passwords."""

    auth_query: str = "SELECT name, secret FROM shardkit_pooler.secret($1)"
    """What it asks; the function is described in docs/pgbouncer.md."""

    client_tls_cert: str = ""
    client_tls_key: str = ""
    client_tls_ca: str = ""
    """Files of the certificate shown to clients, which requires TLS, and of whom to trust."""

    server_tls_ca: str = ""
    """File of who signs the servers' certificates, which are then verified with their names."""

    settings: Mapping[str, str] = Field(default_factory=dict)
    """Further settings by name; they win."""


class MigrationsConfig(Section):
    """`[migrations]`: where the revisions of the application's tables and its models are."""

    location: Annotated[str, Field(min_length=1)] | None = None
    """`package:folder`, or a path from the folder of the file; None when there are none."""

    models: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] | None = None
    """`module:Base` of a module that imports every model; None leaves unrecorded how rows are
    placed."""


class RebalanceConfig(Section):
    """`[rebalance]`: what `shardkit rebalance` keeps to where its options do not say otherwise."""

    tolerance: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] = 0.1
    """By how much of its share a physical shard may have too many or too few bytes. Source: Citus,
    the threshold of its rebalancer."""

    load_tolerance: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] = 0.25
    """The same of rows read and written."""

    pins: Mapping[str, str] = Field(default_factory=dict)
    """Ranges and numbers of logical shards that belong on a physical shard, by its name."""

    @property
    def pinned(self) -> dict[int, str]:
        """The physical shard of every logical shard that has a pin."""
        return {n: name for name, text in self.pins.items() for n in parse_ranges(text)}

    @field_validator("pins")
    @classmethod
    def _are_pinned_once(cls, pins: Mapping[str, str]) -> Mapping[str, str]:
        seen: dict[int, str] = {}
        for name, text in pins.items():
            for number in parse_ranges(text):
                if number in seen:
                    raise ValueError(
                        f"logical shard {number} is pinned to {seen[number]!r} and to {name!r}; "
                        "take one of the two away"
                    )
                seen[number] = name
        return pins


class PhysicalConfig(Section):
    """`[[physical]]`: one primary, its replicas and the logical shards first placed there."""

    name: Name
    weight: Annotated[float, Field(gt=0, le=1_000_000, allow_inf_nan=False)] = 1.0
    """Its capacity beside that of the others, for `shardkit rebalance`."""

    logical_shards: str = ""
    """Ranges and numbers; none for a server that logical shards are to be moved to."""

    primary: SecretStr
    replicas: tuple[SecretStr | ReplicaConfig, ...] = Field(default=(), strict=False)
    admin: SecretStr | None = None
    """Direct address of the primary for commands, when `primary` names a PgBouncer."""

    reader: SecretStr | None = None
    """Address of the primary for readers, when `primary` names a PgBouncer."""

    pooler: Annotated[str, Field(pattern=r"^pgbouncer( \d{1,4}(\.\d{1,4}){1,3})?$")] | None = None
    """`pgbouncer`, or `pgbouncer 1.24`, when `primary` and `replicas` name one in transaction
    mode; None when they are PostgreSQL."""

    @model_validator(mode="after")
    def _commands_go_straight(self) -> Self:
        if self.pooler is not None and self.admin is None:
            raise ValueError(
                f"admin: physical shard {self.name!r} has a pooler; "
                "give the address of the server itself, for commands"
            )
        return self

    @property
    def replica_configs(self) -> tuple[ReplicaConfig, ...]:
        """The replicas, in the order written."""
        return tuple(
            replica if isinstance(replica, ReplicaConfig) else ReplicaConfig(url=replica)
            for replica in self.replicas
        )

    @property
    def shard_numbers(self) -> tuple[int, ...]:
        """The logical shards of the ranges, in the order written."""
        return tuple(parse_ranges(self.logical_shards)) if self.logical_shards.strip() else ()

    @property
    def pooler_in_front(self) -> Pooler | None:
        """The pooler as a value."""
        if self.pooler is None:
            return None
        numbers = self.pooler.partition(" ")[2]
        return Pooler(tuple(int(number) for number in numbers.split(".") if number))


class CacheConfig(Section):
    """`[cache]`: where rows of classes with `__cache_ttl__` are cached; durations in seconds."""

    backend: Literal["memcached", "redis", "redis-cluster", "memory", "none"] = "none"
    """`memory` is this process alone, for tests: other processes would not see what it writes."""

    nodes: tuple[str, ...] = Field(default=(), strict=False, repr=False)
    """The servers: `host:port` of a Memcached, `redis://host:port/0` of a Redis; of a Redis Cluster
    some of them, its others are found. The same in every
    process, and never shortened: a server that is gone keeps its place. The one of `[services]`
    when it is left out."""

    gutter: tuple[str, ...] = Field(default=(), strict=False, repr=False)
    """Servers that stand in, for seconds, for those that are left alone."""

    timeout: Annotated[float, Field(gt=0, le=0.05, allow_inf_nan=False)] = 0.05
    """How long a call may take; then the request goes on without the cache."""

    connections: Annotated[int, Field(ge=1, le=1000)] = 32
    """To each server, per process."""

    generation: Annotated[int, Field(ge=1, le=2**31)] = 1
    """Raised to forget everything that is cached."""

    serve_previous: bool = False
    """Whether readers are shown the previous value of a row while a writer commits it."""

    copies: Mapping[str, Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]] = Field(
        default_factory=dict
    )
    """Tables whose rows every process keeps for so long once it has read them. Whoever writes such
    a row waits for so long after COMMIT, before it is acknowledged. The same in every process; to
    be raised, and begun, only when no process that writes has the shorter time any more."""

    @property
    def is_on(self) -> bool:
        """Whether anything is cached."""
        return self.backend != "none"

    @model_validator(mode="after")
    def _names_servers(self) -> Self:
        has_servers = self.backend in {"memcached", "redis", "redis-cluster"}
        if not has_servers and (self.nodes or self.gutter):
            raise ValueError(
                f"nodes: the backend {self.backend!r} has no servers; "
                'leave them out, or say backend = "memcached" or "redis"'
            )
        for key, names in (("nodes", self.nodes), ("gutter", self.gutter)):
            for name in names:
                self._check(key, name)
        names = (*self.nodes, *self.gutter)
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"nodes: {twice[0]} is named twice; name each server once")
        return self

    def _check(self, key: str, name: str) -> None:
        is_url = "://" in name
        if self.backend.startswith("redis") and not name.startswith(("redis://", "rediss://")):
            raise ValueError(f"{key}: {name!r} is no Redis; write redis://host:port/0")
        if self.backend == "memcached":
            _, _, port = name.rpartition(":")
            if is_url or not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
                raise ValueError(f"{key}: {name!r} is no address; write host:port")


def parse_ranges(text: str) -> Iterable[int]:
    """Yield the numbers of `"0-7, 16"`.

    Raises:
        ValueError: the text is not a list of numbers and ascending ranges.
    """
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not (first.isascii() and first.isdigit()) or (
            dash and not (last.isascii() and last.isdigit())
        ):
            raise ValueError(f"logical_shards: {part.strip()!r} is not a number or a range a-b")
        low, high = int(first), int(last) if dash else int(first)
        if high < low or high >= MAX_LOGICAL_SHARDS:
            raise ValueError(
                f"logical_shards: {part.strip()!r} must ascend and stay below {MAX_LOGICAL_SHARDS}"
            )
        yield from range(low, high + 1)
