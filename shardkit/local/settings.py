"""The text of every configuration file an embedded cluster needs. Pure: writes nothing.

Called by `postgres`, `services` and `cluster`, which write what they get.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from shardkit.local.options import LocalOptions
from shardkit.local.ports import HOST

__all__ = [
    "ADMIN_ROLE",
    "APP_ROLE",
    "DATABASE",
    "READER_DATABASE",
    "REPLICATION_ROLE",
    "SUPERUSER",
    "PhysicalAddresses",
    "host_rules",
    "ident_map",
    "postgres_conf",
    "shardkit_toml",
]

DATABASE = "shardkit"
READER_DATABASE = f"{DATABASE}_read"
"""What readers of the primary ask a PgBouncer for: the same database, which refuses to write."""

ADMIN_ROLE = "shardkit_admin"
APP_ROLE = "shardkit_app"
REPLICATION_ROLE = "shardkit_replication"
SUPERUSER = "postgres"
"""Used to create the roles, over the unix socket by its owner only; it has no password."""

_MANY_SHARDS = 64
"""Above so many logical shards a scatter locks more relations than the smaller lock table holds."""


def postgres_conf(
    *,
    name: str,
    port: int,
    sockets: str,
    options: LocalOptions,
    folder: str,
    primary_conninfo: str | None,
) -> str:
    """Return the `postgresql.conf` of one server.

    Args:
        name: server name; becomes `cluster_name` and the standby's `application_name`.
        port: TCP port.
        sockets: folder of the unix socket.
        options: shape of the cluster.
        folder: where the host rules and the ident map lie.
        primary_conninfo: how a replica reaches its primary; None on a primary.
    """
    locks = 1024 if options.logical_shards > _MANY_SHARDS else 256
    values = {
        "listen_addresses": HOST,
        "port": str(port),
        "unix_socket_directories": sockets,
        "hba_file": f"{folder}/pg_hba.conf",
        "ident_file": f"{folder}/pg_ident.conf",
        "cluster_name": name,
        "max_connections": "200",
        "max_prepared_transactions": "64",
        "max_locks_per_transaction": str(locks),
        "max_worker_processes": "32",
        "max_wal_senders": "24",
        "max_replication_slots": "24",
        "max_logical_replication_workers": "16",
        "shared_buffers": f"{options.shared_buffers_mb}MB",
        "wal_level": "logical",
        # Log kept for replicas that were away, without slots: a slot would hold log without
        # bound for a replica that never returns, and does not follow a failover.
        "wal_keep_size": "512MB",
        "max_slot_wal_keep_size": "2GB",
        "wal_log_hints": "on",
        "wal_retrieve_retry_interval": "200ms",
        # A replica that hears nothing asks after half of it: so a failover finds a frozen primary.
        "wal_receiver_timeout": "5s",
        "hot_standby": "on",
        "hot_standby_feedback": "on",
        "fsync": "on" if options.fsync else "off",
        "password_encryption": "scram-sha-256",
        "timezone": "UTC",
        "log_timezone": "UTC",
        "log_line_prefix": "%m [%p] %q%u@%d %a ",
        "log_lock_waits": "on",
        "lc_messages": "C",
    }
    if options.confirm:
        physical, _, own = name.rpartition("_")
        others = [f"{physical}_{n}" for n in range(options.replicas + 1) if str(n) != own]
        values["synchronous_standby_names"] = f"ANY {options.confirm} ({', '.join(others)})"
    if primary_conninfo is not None:
        values["primary_conninfo"] = primary_conninfo
    values.update(options.settings)
    lines = [f"{key} = {_quoted(value)}" for key, value in values.items()]
    heading = "# Written by shardkit at every start; use ALTER SYSTEM instead."
    return "\n".join([heading, *lines, ""])


def host_rules() -> str:
    """Return `pg_hba.conf`: passwords for everybody, and the owner as superuser by socket."""
    return f"""\
# TYPE  DATABASE     USER                       ADDRESS       METHOD
local   all          {SUPERUSER}                                 peer map=owner
local   all          all                                      scram-sha-256
host    all          {ADMIN_ROLE},{APP_ROLE}   {HOST}/32  scram-sha-256
host    all          {SUPERUSER}                   all           reject
host    {DATABASE}     all                        {HOST}/32  scram-sha-256
host    replication  {REPLICATION_ROLE},{ADMIN_ROLE}  {HOST}/32  scram-sha-256
"""


def ident_map(users: Sequence[str]) -> str:
    """Return `pg_ident.conf`: the users of the system who may be the superuser."""
    return "".join(f"owner {json.dumps(user)} {SUPERUSER}\n" for user in dict.fromkeys(users))


@dataclass(frozen=True, slots=True)
class PhysicalAddresses:
    """Where one physical shard's servers listen.

    Attributes:
        name: of the physical shard.
        logical_shards: what is first placed there, as ranges.
        primary: port of the primary.
        replicas: ports of the replicas by the names that a PgBouncer gives them.
        pooler: port and version of the PgBouncer in front of them, or None.
    """

    name: str
    logical_shards: str
    primary: int
    replicas: Mapping[str, int] = field(default_factory=dict)
    pooler: tuple[int, str] | None = None

    def endpoints(self, login: str) -> list[str]:
        """Return the lines that say where applications and commands connect.

        Args:
            login: `user:password` of the application.
        """

        def url(port: int, database: str = DATABASE) -> str:
            return _toml(f"postgresql://{login}@{HOST}:{port}/{database}")

        if self.pooler is None:
            replicas = ", ".join(url(port) for port in self.replicas.values())
            return [f"primary = {url(self.primary)}", f"replicas = [{replicas}]"]
        port, version = self.pooler
        replicas = ", ".join(
            f"{{ url = {url(port, name)}, server = {url(server)} }}"
            for name, server in self.replicas.items()
        )
        return [
            f"pooler = {_toml(f'pgbouncer {version}')}",
            f"primary = {url(port)}",
            f"reader = {url(port, READER_DATABASE)}",
            f"replicas = [{replicas}]",
            f"admin = {_toml(f'postgresql://{ADMIN_ROLE}@{HOST}:{self.primary}/{DATABASE}')}",
        ]


def shardkit_toml(
    *,
    logical_shards: int,
    physical: Sequence[PhysicalAddresses],
    services: Mapping[str, str],
    passwords: Mapping[str, str],
    kept: Mapping[str, Mapping[str, object]] | None = None,
) -> str:
    """Return a complete `shardkit.toml`.

    Args:
        logical_shards: their fixed number.
        physical: one entry per physical shard.
        services: addresses of the other servers, by name.
        passwords: by role.
        kept: further tables, of plain values, as a person wrote them; None for none.
    """
    login = f"{APP_ROLE}:{passwords[APP_ROLE]}"
    lines = [
        "# Written by `shardkit local up`, and again when an address changes. Addresses and",
        "# logins are its own; tables that you add, such as [pool], are kept.",
        "[cluster]",
        'name = "local"',
        f"logical_shards = {logical_shards}",
        "",
        "[admin]",
        f"user = {_toml(ADMIN_ROLE)}",
        f"password = {_toml(passwords[ADMIN_ROLE])}",
    ]
    for name, table in (kept or {}).items():
        lines += ["", f"[{name}]", *(f"{key} = {json.dumps(v)}" for key, v in table.items())]
    for shard in physical:
        lines += [
            "",
            "[[physical]]",
            f"name = {_toml(shard.name)}",
            f"logical_shards = {_toml(shard.logical_shards)}",
            *shard.endpoints(login),
        ]
    if services:
        lines += ["", "[services]", *(f"{key} = {_toml(value)}" for key, value in services.items())]
    return "\n".join([*lines, ""])


def _toml(text: str) -> str:
    """Return a TOML basic string; JSON's escapes are a subset of TOML's."""
    return json.dumps(text)


def _quoted(value: str) -> str:
    """Return a value as PostgreSQL's configuration files quote it."""
    return "'" + value.replace("\\", "\\\\").replace("'", "''") + "'"
