"""`shardkit.toml`: reads it, validates it, makes a `Topology`.

A file looks like this (written by `shardkit local up`, or by hand):

    [cluster]
    name = "demo"
    logical_shards = 64

    [admin]                                  # makes roles, and does what no role below is for
    user = "shardkit_admin"
    password_file = "/run/secrets/admin"     # or SHARDKIT_ADMIN_PASSWORD, or password = "…"

    [roles]                                  # optional, each of them: docs/roles.md
    owner = "shardkit_owner"                 # owns schemas and tables, cannot log in
    app = { password_file = "secrets/app" }  # the user of the addresses below
    migrator = { password_file = "secrets/migrator" }   # user = "shardkit_migrator"
    mover = { password_file = "secrets/mover" }
    relay = { password_file = "secrets/relay" }
    monitor = { password_file = "secrets/monitor" }

    [tls]                                    # optional; an address may say otherwise: ?sslmode=…
    mode = "verify-full"
    root_cert = "certs/root.crt"             # who signs the servers' certificates
    channel_binding = "require"
    require_auth = "scram-sha-256"

    [pool]
    size = 5                                 # connections kept per endpoint and process
    overflow = 5                             # more than that under load
    timeout = 5.0                            # seconds to wait for one

    [limits]
    max_rows = 300_000                       # rows a statement over logical shards may fetch
    statement_timeout = 30.0                 # seconds for one answer, where no deadline says less
    map_age = 5.0                            # seconds; then a server is asked what it owns
    adaptive = false                         # true: shed what a server cannot answer quickly

    [replicas]
    region = "eu-west"                       # where this process runs: near replicas go first
    patience = 0.02                          # seconds a replica may wait for what it must have
    hedge = false                            # true: ask a second replica when one is slow

    [cache]
    backend = "memcached"                    # or "redis", "memory" (this process only), "none"
    nodes = ["10.0.0.1:11211"]               # the same everywhere; else that of [services]
    timeout = 0.05                           # seconds; then the request goes on without it

    [durability]
    mode = "sync"                            # or "async", the default: docs/failover.md
    last_standby = "strict"                  # or "relaxed": what if too few standbys are left

    [failover]
    every = 60.0                             # seconds between two failovers, at least

    [tokens]
    keys = ["…"]                             # sign tokens that leave the process, newest first

    [migrations]
    location = "app:migrations"              # package:folder, or a path from this file's folder
    models = "app.models:Base"               # optional: record how the models place their rows

    [pgbouncer]
    processes = 8                            # for `shardkit pgbouncer render`: docs/pgbouncer.md

    [backup]
    folder = "/srv/backups"                  # docs/backup.md

    [rebalance]                              # docs/rebalance.md
    tolerance = 0.1                          # part of its share that a server may be off
    load_tolerance = 0.25                    # the same of rows read and written
    pins = { alpha = "0-3" }                 # what is not to be moved away from there

    [[physical]]
    name = "alpha"
    weight = 1.0                             # its capacity beside that of the others
    logical_shards = "0-31"                  # ranges and numbers: "0-7, 16, 20-31"; "" for none.
                                             # The first placement: the servers know where they are
    primary = "postgresql://shardkit_app:…@127.0.0.1:5501/shardkit"
    replicas = [
        "postgresql://shardkit_app:…@127.0.0.1:5502/shardkit",
        { url = "postgresql://…", region = "eu-west", standby = "beta" },
    ]

Behind a PgBouncer in transaction mode, a physical shard says so. Readers then have an address of
their own on the primary, whose server connections refuse to write (in `pgbouncer.ini`:
`shardkit_read = … connect_query='SET default_transaction_read_only = on'`), because PgBouncer
refuses the setting from clients; and commands have the address of the server itself:

    pooler = "pgbouncer 1.24"                # the version decides on prepared statements
    primary = "postgresql://shardkit_app:…@127.0.0.1:6432/shardkit"
    reader = "postgresql://shardkit_app:…@127.0.0.1:6432/shardkit_read"
    replicas = ["postgresql://shardkit_app:…@127.0.0.1:6432/shardkit_1"]
    admin = "postgresql://shardkit_admin@127.0.0.1:5501/shardkit"

Other tables may stand beside these under `[services]` (Redis, Memcached addresses); everything
else is refused, naming the key. Called by `Cluster.from_file` and the command line; never opens
a connection.
"""

from __future__ import annotations

import difflib
import os
import stat
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Self

from pydantic import Field, ValidationError, model_validator
from sqlalchemy import make_url

from shardkit.addresses import Addresses
from shardkit.errors import ConfigurationError
from shardkit.logins import AdminLogin, Login, RolesConfig, Section, TlsConfig
from shardkit.sections import (
    FAILOVER_PATIENCE,
    MAP_AGE,
    MAX_ROWS,
    STATEMENT_TIMEOUT,
    BackupConfig,
    CacheConfig,
    ClusterConfig,
    DurabilityConfig,
    FailoverConfig,
    LimitsConfig,
    MigrationsConfig,
    PgBouncerConfig,
    PhysicalConfig,
    PoolConfig,
    RebalanceConfig,
    ReplicaConfig,
    ReplicasConfig,
    TokensConfig,
    parse_ranges,
)
from shardkit.topology import PhysicalShard, ShardMap, Topology

__all__ = [
    "FAILOVER_PATIENCE",
    "MAP_AGE",
    "MAX_ROWS",
    "STATEMENT_TIMEOUT",
    "AdminLogin",
    "BackupConfig",
    "CacheConfig",
    "ClusterConfig",
    "Config",
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
    "RolesConfig",
    "TlsConfig",
    "TokensConfig",
    "default_file",
    "format_ranges",
    "load",
    "parse_ranges",
]

_SERVED: Final = frozenset({"memcached", "redis", "redis-cluster"})
"""Kinds of cache that have servers."""


class Config(Section):
    """The whole file, validated."""

    cluster: ClusterConfig
    admin: AdminLogin
    roles: RolesConfig = RolesConfig()
    tls: TlsConfig = TlsConfig()
    pool: PoolConfig = PoolConfig()
    limits: LimitsConfig = LimitsConfig()
    replicas: ReplicasConfig = ReplicasConfig()
    tokens: TokensConfig = TokensConfig()
    migrations: MigrationsConfig = MigrationsConfig()
    pgbouncer: PgBouncerConfig = PgBouncerConfig()
    cache: CacheConfig = CacheConfig()
    backup: BackupConfig = BackupConfig()
    rebalance: RebalanceConfig = RebalanceConfig()
    durability: DurabilityConfig = DurabilityConfig()
    failover: FailoverConfig = FailoverConfig()
    physical: Annotated[tuple[PhysicalConfig, ...], Field(min_length=1, strict=False)]
    services: Mapping[str, str] = Field(default_factory=dict)
    """Addresses of servers beside PostgreSQL, by name: `redis`, `memcached`."""

    @model_validator(mode="after")
    def _has_a_cache(self) -> Self:
        kind = self.cache.backend
        if kind in _SERVED and not self.cache.nodes and kind not in self.services:
            raise ValueError(
                f"cache.nodes: where is {kind}? Name its servers here, or one under [services]"
            )
        try:
            _ = self.found_cache
        except ValidationError as error:
            raise ValueError(f"services.{kind}: {_first_problem(error)}") from None
        return self

    @property
    def found_cache(self) -> CacheConfig:
        """`[cache]` with its servers: those of `[services]` when it names none."""
        kind = self.cache.backend
        if kind in _SERVED and not self.cache.nodes:
            return CacheConfig.model_validate(
                {**self.cache.model_dump(), "nodes": (self.services[kind],)}
            )
        return self.cache

    @model_validator(mode="after")
    def _placed_once(self) -> Self:
        total = self.cluster.logical_shards
        owner: dict[int, str] = {}
        names: set[str] = set()
        for shard in self.physical:
            if shard.name in names:
                raise ValueError(f"physical: name {shard.name!r} is used twice; rename one")
            names.add(shard.name)
            for number in shard.shard_numbers:
                if number >= total:
                    raise ValueError(
                        f"physical.{shard.name}.logical_shards: {number} is beyond the last "
                        f"logical shard {total - 1}; cluster.logical_shards is {total}"
                    )
                if number in owner:
                    raise ValueError(
                        f"physical.{shard.name}.logical_shards: {number} is already placed on "
                        f"{owner[number]!r}; each logical shard has one owner"
                    )
                owner[number] = shard.name
        if missing := sorted(set(range(total)) - owner.keys()):
            raise ValueError(
                f"physical.logical_shards: {format_ranges(missing)} placed nowhere; "
                f"every logical shard from 0 to {total - 1} needs an owner"
            )
        for name in self.rebalance.pins:
            if name not in names:
                raise ValueError(
                    f"rebalance.pins.{name}: no physical shard is called that; "
                    f"there are {', '.join(sorted(names))}"
                )
        for number, name in self.rebalance.pinned.items():
            if number >= total:
                raise ValueError(
                    f"rebalance.pins.{name}: {number} is beyond the last logical shard {total - 1}"
                )
        return self

    def topology(self, folder: Path) -> Topology:
        """Return the topology the file describes.

        Args:
            folder: where a relative `password_file` is looked up.

        Raises:
            ConfigurationError: an address cannot be read, or two endpoints share one.
        """
        addresses = Addresses(self.admin, self.roles, self.tls, folder)
        physical: dict[str, PhysicalShard] = {}
        seen: dict[tuple[str | None, int, str | None], str] = {}
        owners: list[str] = [""] * self.cluster.logical_shards
        for shard in self.physical:
            found = physical[shard.name] = addresses.shard(shard)
            for place, endpoint in zip(
                (f"physical.{shard.name}.primary",
                 *(f"physical.{shard.name}.replicas[{n}]" for n in range(len(found.replicas)))),
                found.endpoints,
                strict=True,
            ):  # fmt: skip
                url = endpoint.url
                address = (url.host, url.port or 5432, url.database)
                if address in seen:
                    raise ConfigurationError(
                        f"{place}: {url.host}:{address[1]}/{url.database} is already "
                        f"{seen[address]}; two endpoints cannot be one server"
                    )
                seen[address] = place
            for number in shard.shard_numbers:
                owners[number] = shard.name
        shard_map = ShardMap(tuple(owners), (1,) * len(owners))
        return Topology(self.cluster.name, physical, shard_map)


def default_file() -> Path:
    """Return the file a command reads when none is named.

    `shardkit.toml` in the working directory; without one, that of the embedded cluster below it.
    """
    here, embedded = Path("shardkit.toml"), Path(".shardkit/shardkit.toml")
    return embedded if embedded.exists() and not here.exists() else here


def load(path: str | os.PathLike[str]) -> tuple[Config, Topology]:
    """Read and validate a configuration file.

    Args:
        path: the file, usually `shardkit.toml`.

    Raises:
        ConfigurationError: one line with the file, the key and the remedy.
    """
    file = Path(path)
    found = _loaded(file)
    # What was read stands in the frames below, so an error starts here.
    if isinstance(found, ConfigurationError):
        raise found
    return found


def _loaded(file: Path) -> tuple[Config, Topology] | ConfigurationError:
    """Return what a file says, or what is wrong with it, told without what was read."""
    try:
        return _read(file)
    except FileNotFoundError:
        problem = "no such file; name one with --config, or run `shardkit local up`"
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        problem = f"cannot be read: {reason}"
    except tomllib.TOMLDecodeError as error:
        problem = f"not valid TOML: {error}"
    except ValidationError as error:
        problem = _first_problem(error)
    except ConfigurationError as error:
        problem = error.message
    return ConfigurationError(f"{file}: {problem}")


def _read(file: Path) -> tuple[Config, Topology]:
    mode = file.stat().st_mode
    if stat.S_ISDIR(mode):
        raise ConfigurationError("is a directory; name the shardkit.toml in it")
    config = Config.model_validate(tomllib.loads(file.read_text(encoding="utf-8")))
    if stat.S_IMODE(mode) & 0o007 and _holds_secret(config):
        raise ConfigurationError(f"holds passwords and others may read it; run `chmod 600 {file}`")
    return config, config.topology(file.parent)


def format_ranges(numbers: Iterable[int]) -> str:
    """Return sorted numbers as ranges: 0, 1, 2, 7 gives `"0-2, 7"`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _holds_secret(config: Config) -> bool:
    urls = [
        u
        for p in config.physical
        for u in (
            p.primary,
            p.reader,
            p.admin,
            *(u for r in p.replica_configs for u in (r.url, r.server)),
        )
        if u
    ]
    return (
        config.admin.password is not None
        or any(login.password is not None for _, login in config.roles.logins)
        or config.backup.password is not None
        or bool(config.tokens.keys)
        or any("@" in node for node in (*config.cache.nodes, *config.cache.gutter))
        or any(make_url(u.get_secret_value()).password for u in urls)
    )


def _first_problem(error: ValidationError) -> str:
    """Turn the first finding of pydantic into `key: what is wrong; remedy`."""
    problem = error.errors(include_url=False, include_input=False)[0]
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        allowed = _allowed_keys(problem["loc"][:-1])
        close = difflib.get_close_matches(str(problem["loc"][-1]), allowed, n=1)
        meant = f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(allowed)}"
        return f"{key}: unknown key; {meant}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" if key else message


def _allowed_keys(location: tuple[int | str, ...]) -> list[str]:
    tables: dict[Any, type[Section]] = {
        "cluster": ClusterConfig,
        "admin": AdminLogin,
        "roles": RolesConfig,
        "tls": TlsConfig,
        "pool": PoolConfig,
        "limits": LimitsConfig,
        "replicas": ReplicasConfig,
        "tokens": TokensConfig,
        "migrations": MigrationsConfig,
        "pgbouncer": PgBouncerConfig,
        "cache": CacheConfig,
        "backup": BackupConfig,
        "rebalance": RebalanceConfig,
        "durability": DurabilityConfig,
        "failover": FailoverConfig,
        "physical": PhysicalConfig,
    }
    if len(location) == 2 and location[0] == "roles":
        return sorted(Login.model_fields)
    return sorted(tables[location[0]].model_fields if location else Config.model_fields)
