"""The servers of one embedded cluster as objects: which exist, on which ports, in which folders.

Made by `cluster` at each start from the options and the state of the last one. Finds the programs
and chooses the ports; launches nothing.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from shardkit.clock import Clock
from shardkit.errors import LocalServerError
from shardkit.local import ports
from shardkit.local.account import claim_folder, write_file
from shardkit.local.binaries import Program, find_postgres, find_service
from shardkit.local.layout import Layout
from shardkit.local.options import LocalOptions
from shardkit.local.postgres import PostgresServer
from shardkit.local.server import ServerKind, ServerProcess
from shardkit.local.services import MemcachedServer, PgBouncerServer, RedisServer
from shardkit.local.settings import (
    DATABASE,
    READER_DATABASE,
    REPLICATION_ROLE,
    host_rules,
    ident_map,
)
from shardkit.local.state import ServerState, State
from shardkit.ops.pgbouncer import PooledDatabase
from shardkit.topology import Role

__all__ = ["Fleet", "pooled_name"]

AnyServer = TypeVar("AnyServer", bound=ServerProcess)


@dataclass(slots=True)
class Fleet:
    """Every server of a cluster.

    Attributes:
        layout: where its files are.
        options: its shape.
        passwords: by role.
        clock: where the time comes from.
        old: the state of the last start, or None.
        servers: by name, in the order they are shown.
        missing: programs that were wanted but are not installed.
        leaders: names of primaries that a failover has made, by physical shard.

    *Invariant:* no two servers share a port or a folder.
    """

    layout: Layout
    options: LocalOptions
    passwords: Mapping[str, str]
    clock: Clock
    old: State | None
    servers: dict[str, ServerProcess] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    leaders: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, layout: Layout, options: LocalOptions, old: State | None, clock: Clock) -> Fleet:
        """Find the programs, choose the ports and make an object for every server.

        Raises:
            LocalServerError: PostgreSQL, or the version that made the data, is not installed.
        """
        fleet = cls(layout, options, layout.passwords(), clock, old)
        fleet._add_postgres()
        fleet._add_services()
        fleet._write_shared()
        return fleet

    @property
    def ports(self) -> set[int]:
        """Ports in use by this cluster."""
        return {server.port for server in self.servers.values()}

    @property
    def caches(self) -> list[ServerProcess]:
        """The servers that belong to no physical shard."""
        return [server for server in self.servers.values() if server.physical is None]

    def members(self, physical: str) -> list[PostgresServer]:
        """Return the PostgreSQL servers of a physical shard, in the order they were made."""
        return [
            server
            for server in self.servers.values()
            if isinstance(server, PostgresServer) and server.physical == physical
        ]

    def poolers(self, physical: str) -> list[PgBouncerServer]:
        """Return the PgBouncer of a physical shard, if any."""
        return [
            server
            for server in self.servers.values()
            if isinstance(server, PgBouncerServer) and server.physical == physical
        ]

    def stop_order(self) -> list[list[ServerProcess]]:
        """Return groups of servers to stop together, one group after the other."""
        everything = list(self.servers.values())
        last = [server for server in everything if server.role is Role.PRIMARY]
        poolers = [server for server in everything if server.kind is ServerKind.PGBOUNCER]
        middle = [server for server in everything if server not in (*last, *poolers)]
        return [group for group in (poolers, middle, last) if group]

    def remembered(self) -> dict[str, ServerState]:
        """Return every server as the state file keeps it, none running."""
        remembered = {}
        for server in self.servers.values():
            known = self.old.servers.get(server.name) if self.old else None
            remembered[server.name] = ServerState(
                server.name,
                server.kind,
                server.physical,
                server.port,
                server.program.version,
                is_initialised=known is not None and known.is_initialised and server.has_data(),
            )
        return remembered

    def led(self, physical: str) -> list[PostgresServer]:
        """Return the PostgreSQL servers of a physical shard, the present primary first."""
        members = self.members(physical)
        name = self.leaders.get(physical)
        primary = next(s for s in members if (s.name == name if name else s.role is Role.PRIMARY))
        return [primary, *(server for server in members if server is not primary)]

    def pooled(self, physical: str) -> list[PooledDatabase]:
        """Return what is behind a PgBouncer; only `shardkit` takes writes."""
        primary, *others = self.led(physical)
        places = [
            (DATABASE, primary),
            (READER_DATABASE, primary),
            *((pooled_name(n), server) for n, server in enumerate(others, start=1)),
        ]
        return [
            PooledDatabase(name, ports.HOST, server.port, DATABASE, is_read_only=name != DATABASE)
            for name, server in places
        ]

    def _add_postgres(self) -> None:
        program = find_postgres(self.layout.account, self._data_version())
        for physical in self.options.physical_names:
            for number in range(self.options.replicas + 1):
                server = self._make(PostgresServer, f"{physical}_{number}", program, physical)
                server.layout, server.options = self.layout, self.options

    def _add_services(self) -> None:
        missing: list[str] = []

        def program(name: str, *, is_wanted: bool) -> Program | None:
            if not is_wanted:
                return None
            found = find_service(name, self.layout.account)
            if found is None:
                missing.append(name)
            return found

        if found := program("pgbouncer", is_wanted=self.options.pgbouncer):
            for physical in self.options.physical_names:
                pooler = self._make(PgBouncerServer, f"pgbouncer_{physical}", found, physical)
                pooler.layout, pooler.passwords = self.layout, self.passwords
                pooler.settings = self.options.pgbouncer_settings
                pooler.databases = partial(self.pooled, physical)
        if found := program("redis-server", is_wanted=self.options.redis):
            self._make(RedisServer, "redis", found, None).fsync = self.options.fsync
        if found := program("memcached", is_wanted=self.options.memcached):
            self._make(MemcachedServer, "memcached", found, None)
        self.missing = tuple(missing)

    def _make(
        self, kind: type[AnyServer], name: str, program: Program, physical: str | None
    ) -> AnyServer:
        """Make one server on the port of the last start while that is free, else on another."""
        known = self.old.servers.get(name) if self.old else None
        taken = self.ports | {s.port for s in self.old.servers.values()} if self.old else self.ports
        is_kept = known is not None and known.port not in self.ports and ports.is_free(known.port)
        folder = self.layout.folder(name)
        server = kind(
            name,
            program,
            physical=physical,
            port=known.port if known is not None and is_kept else ports.choose(taken),
            folder=folder,
            log=self.layout.log(name),
            account=self.layout.account,
            clock=self.clock,
        )
        if not folder.exists():
            claim_folder(folder, 0o700, self.layout.account)
        self.servers[name] = server
        return server

    def _write_shared(self) -> None:
        """Write the files that all PostgreSQL servers read."""
        conf, account = self.layout.conf, self.layout.account
        owner = pwd.getpwuid(os.geteuid()).pw_name
        write_file(conf / "pg_hba.conf", host_rules(), 0o644)
        write_file(conf / "pg_ident.conf", ident_map((owner, account.name)), 0o644)
        login = f"*:*:*:{REPLICATION_ROLE}:{self.passwords[REPLICATION_ROLE]}\n"
        write_file(conf / "replication.pgpass", login, 0o600, account)

    def _data_version(self) -> int | None:
        """Return the major version that made the existing data, or None for new data."""
        for server in self.old.servers.values() if self.old else ():
            file = self.layout.folder(server.name) / "PG_VERSION"
            if server.is_initialised and file.exists():
                text = file.read_text(encoding="ascii").strip()
                if not text.isdigit():
                    raise LocalServerError(f"{file}: {text!r} is not a version of PostgreSQL")
                return int(text)
        return None


def pooled_name(number: int) -> str:
    """Return the database by which a PgBouncer knows a replica: `shardkit_1` is the first.

    The first of those that are replicas now: after a failover names lead to other servers, and
    clients go on with theirs.
    """
    return f"{DATABASE}_{number}"
