"""`shardkit.toml`: reads it, validates it, makes a `Topology`.

A file looks like this (written by `shardkit local up`, or by hand):

    [cluster]
    name = "demo"
    logical_shards = 64

    [admin]                                  # the login that owns the schemas; commands use it
    user = "shardkit_admin"
    password = "…"                           # or password_file = "/run/secrets/admin"

    [pool]
    size = 5                                 # connections kept per endpoint and process
    overflow = 5                             # more than that under load
    timeout = 5.0                            # seconds to wait for one

    [limits]
    max_rows = 300_000                       # rows a statement over logical shards may fetch
    statement_timeout = 30.0                 # seconds for one answer, where no deadline says less
    adaptive = false                         # true: shed what a server cannot answer quickly

    [replicas]
    region = "eu-west"                       # where this process runs: near replicas go first
    patience = 0.02                          # seconds a replica may wait for what it must have
    hedge = false                            # true: ask a second replica when one is slow

    [tokens]
    keys = ["…"]                             # sign tokens that leave the process, newest first

    [migrations]
    location = "app:migrations"              # package:folder, or a path from this file's folder
    models = "app.models:Base"               # optional: record how the models place their rows

    [pgbouncer]
    processes = 8                            # for `shardkit pgbouncer render`: docs/pgbouncer.md

    [[physical]]
    name = "alpha"
    logical_shards = "0-31"                  # ranges and numbers: "0-7, 16, 20-31"
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
import math
import os
import stat
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from shardkit.errors import ConfigurationError
from shardkit.topology import (
    MAX_LOGICAL_SHARDS,
    Endpoint,
    PhysicalShard,
    Pooler,
    Role,
    ShardMap,
    Topology,
)

__all__ = [
    "MAX_ROWS",
    "STATEMENT_TIMEOUT",
    "AdminLogin",
    "ClusterConfig",
    "Config",
    "LimitsConfig",
    "MigrationsConfig",
    "PgBouncerConfig",
    "PhysicalConfig",
    "PoolConfig",
    "ReplicaConfig",
    "ReplicasConfig",
    "TokensConfig",
    "default_file",
    "load",
]

DRIVER = "postgresql+psycopg"


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,40}$")]


class ClusterConfig(_Table):
    """`[cluster]`: what is fixed when the cluster is created."""

    name: Name
    logical_shards: Annotated[int, Field(ge=1, le=MAX_LOGICAL_SHARDS)]


class AdminLogin(_Table):
    """`[admin]`: the login that owns schemas and runs migrations."""

    user: Annotated[str, Field(min_length=1, max_length=63)]
    password: SecretStr | None = None
    password_file: str | None = None

    def secret(self, folder: Path) -> str | None:
        """Return the password; `SHARDKIT_ADMIN_PASSWORD` in the environment wins."""
        if from_environment := os.environ.get("SHARDKIT_ADMIN_PASSWORD"):
            return from_environment
        if self.password_file is not None:
            return (folder / self.password_file).read_text(encoding="utf-8").strip()
        return self.password.get_secret_value() if self.password else None


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("must be finite")
    return value


class PoolConfig(_Table):
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


class LimitsConfig(_Table):
    """`[limits]`: how far statements may go that do not say it themselves."""

    max_rows: Annotated[int, Field(ge=1, le=2**31)] = MAX_ROWS
    """Rows fetched from all servers together, before they are merged."""

    statement_timeout: Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)] = (
        STATEMENT_TIMEOUT
    )
    """Seconds a session waits for one answer of a server, where no deadline says less."""

    adaptive: bool = False
    """Whether the number of sessions at a time on one server follows how quickly it answers."""


class ReplicasConfig(_Table):
    """`[replicas]`: how readers use replicas; durations in seconds."""

    region: str | None = None
    """Where this process runs; `SHARDKIT_REGION` in the environment wins. None for nowhere."""

    patience: Annotated[float, Field(ge=0, le=10)] = 0.02
    """How long a replica may wait for log that it has not replayed, before the primary is asked.
    Source: `python -m benchmarks stale`."""

    hedge: bool = False
    """Whether a read that takes longer than 19 of 20 do is asked of a second replica as well. For
    threads; at most one read of twenty is."""

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


class TokensConfig(_Table):
    """`[tokens]`: what signs tokens that leave the process."""

    keys: tuple[SecretStr, ...] = Field(default=(), strict=False)
    """At least 16 bytes each; the first signs, all are accepted."""

    def secrets(self) -> tuple[str, ...]:
        """Return the keys; `SHARDKIT_TOKEN_KEYS`, separated by commas, wins."""
        if from_environment := os.environ.get("SHARDKIT_TOKEN_KEYS"):
            return tuple(key.strip() for key in from_environment.split(","))
        return tuple(key.get_secret_value() for key in self.keys)


class ReplicaConfig(_Table):
    """One of `physical.replicas`, where an address alone does not say enough."""

    url: SecretStr
    region: str = ""
    """Where it stands."""

    standby: str = ""
    """Its name in `synchronous_standby_names`; empty when commits do not wait for it."""

    server: SecretStr | None = None
    """Address of PostgreSQL itself, when `url` names a PgBouncer; `shardkit pgbouncer render` needs
    it. Login and password are those of `url`."""


class PgBouncerConfig(_Table):
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


class MigrationsConfig(_Table):
    """`[migrations]`: where the revisions of the application's tables and its models are."""

    location: Annotated[str, Field(min_length=1)] | None = None
    """`package:folder`, or a path from the folder of the file; None when there are none."""

    models: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] | None = None
    """`module:Base` of a module that imports every model; None leaves unrecorded how rows are
    placed."""


class PhysicalConfig(_Table):
    """`[[physical]]`: one primary, its replicas and the logical shards first placed there."""

    name: Name
    logical_shards: str
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
        return tuple(parse_ranges(self.logical_shards))

    @property
    def pooler_in_front(self) -> Pooler | None:
        """The pooler as a value."""
        if self.pooler is None:
            return None
        numbers = self.pooler.partition(" ")[2]
        return Pooler(tuple(int(number) for number in numbers.split(".") if number))


class Config(_Table):
    """The whole file, validated."""

    cluster: ClusterConfig
    admin: AdminLogin
    pool: PoolConfig = PoolConfig()
    limits: LimitsConfig = LimitsConfig()
    replicas: ReplicasConfig = ReplicasConfig()
    tokens: TokensConfig = TokensConfig()
    migrations: MigrationsConfig = MigrationsConfig()
    pgbouncer: PgBouncerConfig = PgBouncerConfig()
    physical: Annotated[tuple[PhysicalConfig, ...], Field(min_length=1, strict=False)]
    services: Mapping[str, str] = Field(default_factory=dict)
    """Addresses of servers beside PostgreSQL, by name: `redis`, `memcached`."""

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
        return self

    def topology(self, folder: Path) -> Topology:
        """Return the topology the file describes.

        Args:
            folder: where a relative `password_file` is looked up.

        Raises:
            ConfigurationError: an address cannot be read, or two endpoints share one.
        """
        password = self.admin.secret(folder)
        physical: dict[str, PhysicalShard] = {}
        seen: dict[tuple[str | None, int, str | None], str] = {}
        owners: list[str] = [""] * self.cluster.logical_shards
        for shard in self.physical:
            key = f"physical.{shard.name}"
            primary = _url(shard.primary, f"{key}.primary")
            found = shard.replica_configs
            reader = _url(shard.reader, f"{key}.reader") if shard.reader else None
            replicas = [_url(r.url, f"{key}.replicas[{i}]") for i, r in enumerate(found)]
            for place, url in [
                (f"{key}.primary", primary),
                *((f"{key}.replicas[{i}]", url) for i, url in enumerate(replicas)),
            ]:
                address = (url.host, url.port or 5432, url.database)
                if address in seen:
                    raise ConfigurationError(
                        f"{place}: {url.host}:{address[1]}/{url.database} is already "
                        f"{seen[address]}; two endpoints cannot be one server"
                    )
                seen[address] = place
            admin = _url(shard.admin, f"{key}.admin") if shard.admin else primary
            physical[shard.name] = PhysicalShard(
                name=shard.name,
                primary=Endpoint(shard.name, Role.PRIMARY, primary, reader),
                replicas=tuple(
                    Endpoint(
                        shard.name,
                        Role.REPLICA,
                        url,
                        region=replica.region,
                        standby=replica.standby,
                        server_url=None
                        if replica.server is None
                        else _url(replica.server, f"{key}.replicas.server"),
                    )
                    for url, replica in zip(replicas, found, strict=True)
                ),
                admin_url=admin.set(username=self.admin.user, password=password),
                pooler=shard.pooler_in_front,
            )
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
    try:
        mode = file.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ConfigurationError(f"{file}: is a directory; name the shardkit.toml in it")
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigurationError(
            f"{file}: no such file; name one with --config, or run `shardkit local up`"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{file}: cannot be read: {error}") from None
    try:
        config = Config.model_validate(tomllib.loads(text))
        if stat.S_IMODE(mode) & 0o007 and _holds_secret(config):
            raise ConfigurationError(
                f"{file}: holds passwords and others may read it; run `chmod 600 {file}`"
            )
        return config, config.topology(file.parent)
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{file}: not valid TOML: {error}") from None
    except ValidationError as error:
        raise ConfigurationError(f"{file}: {_first_problem(error)}") from None
    except ConfigurationError as error:
        if error.message.startswith(str(file)):
            raise
        raise ConfigurationError(f"{file}: {error.message}") from None
    except OSError as error:
        raise ConfigurationError(f"{file}: admin.password_file: {error}") from None


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


def format_ranges(numbers: Iterable[int]) -> str:
    """Return sorted numbers as ranges: 0, 1, 2, 7 gives `"0-2, 7"`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _url(secret: SecretStr, place: str) -> URL:
    try:
        url = make_url(secret.get_secret_value())
    except (ArgumentError, ValueError):
        raise ConfigurationError(
            f"{place}: not an address; write postgresql://user:password@host:port/database"
        ) from None
    if url.get_backend_name() != "postgresql" or not (url.host and url.database and url.username):
        raise ConfigurationError(
            f"{place}: must be postgresql:// with user, host and database, all of them"
        )
    return url.set(drivername=DRIVER)


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
        or bool(config.tokens.keys)
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
    tables: dict[Any, type[_Table]] = {
        "cluster": ClusterConfig,
        "admin": AdminLogin,
        "pool": PoolConfig,
        "limits": LimitsConfig,
        "replicas": ReplicasConfig,
        "tokens": TokensConfig,
        "migrations": MigrationsConfig,
        "pgbouncer": PgBouncerConfig,
        "physical": PhysicalConfig,
    }
    return sorted(tables[location[0]].model_fields if location else Config.model_fields)
