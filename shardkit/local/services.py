"""The embedded servers beside PostgreSQL: Redis, Memcached and PgBouncer.

Called by `cluster`; each class says how one program is launched in the foreground.
"""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from shardkit.local import processes
from shardkit.local.account import write_file
from shardkit.local.layout import Layout
from shardkit.local.ports import HOST
from shardkit.local.server import ServerKind, ServerProcess
from shardkit.local.settings import ADMIN_ROLE, APP_ROLE
from shardkit.ops.pgbouncer import (
    PooledDatabase,
    PoolerSettings,
    render_ini,
    render_userlist,
)

__all__ = ["MemcachedServer", "PgBouncerServer", "RedisServer"]

_ANSWER_TIMEOUT = 1.0


class RedisServer(ServerProcess):
    """A Redis that keeps its data in an append-only file.

    Attributes:
        fsync: whether that file is written out every second.
    """

    kind: ClassVar[ServerKind] = ServerKind.REDIS
    fsync: bool = True

    @property
    def address(self) -> str:
        """The address for `[services]`."""
        return f"redis://{HOST}:{self.port}/0"

    def command(self) -> Sequence[str | Path]:
        """Return the command line."""
        return [
            self.program.path,
            *("--bind", HOST, "--port", str(self.port), "--dir", str(self.folder)),
            *("--daemonize", "no", "--save", "", "--appendonly", "yes"),
            *("--appendfsync", "everysec" if self.fsync else "no"),
        ]

    def is_ready(self) -> bool:
        """Return whether it answers a ping; it does not while it loads its file."""
        return (_answer(self.port, b"PING\r\n") or b"").startswith(b"+PONG")


class MemcachedServer(ServerProcess):
    """A Memcached with 64 MiB, empty after every start."""

    kind: ClassVar[ServerKind] = ServerKind.MEMCACHED
    # It has nothing to write down, and looks for another signal once a second only.
    stop_signal: ClassVar[signal.Signals] = signal.SIGKILL

    @property
    def address(self) -> str:
        """The address for `[services]`."""
        return f"{HOST}:{self.port}"

    def command(self) -> Sequence[str | Path]:
        """Return the command line; no UDP."""
        return [self.program.path, "-l", HOST, "-p", str(self.port), "-U", "0", "-m", "64"]

    def is_ready(self) -> bool:
        """Return whether it answers a request for its version."""
        return (_answer(self.port, b"version\r\n") or b"").startswith(b"VERSION")


class PgBouncerServer(ServerProcess):
    """A PgBouncer in front of one physical shard.

    Clients ask for `shardkit` to reach the primary, for `shardkit_read` to reach it and only read,
    and for `shardkit_1`, `shardkit_2` to reach the replicas.

    Attributes:
        databases: says where the names lead, asked at each launch.
        settings: further settings by name.
    """

    kind: ClassVar[ServerKind] = ServerKind.PGBOUNCER

    layout: Layout
    passwords: Mapping[str, str]
    databases: Callable[[], Sequence[PooledDatabase]]
    settings: Mapping[str, str]

    def reload(self) -> None:
        """Write its configuration again, and have it read: names may lead elsewhere."""
        self._write()
        if (mark := self.mark) is not None:
            processes.send(mark, signal.SIGHUP)

    def before_launch(self) -> None:
        """Write its configuration; the logins are readable by the servers' account only."""
        self._write()
        (self.layout.sockets / f".s.PGSQL.{self.port}").unlink(missing_ok=True)

    def _write(self) -> None:
        file = self.layout.conf / f"{self.name}.userlist"
        logins = {role: self.passwords[role] for role in (APP_ROLE, ADMIN_ROLE)}
        write_file(file, render_userlist(logins), 0o600, self.account)
        write_file(self.layout.conf / f"{self.name}.ini", self._ini(str(file)), 0o644)

    def _ini(self, userlist: str) -> str:
        settings = PoolerSettings(
            databases=self.databases(),
            listen_addr=HOST,
            port=self.port,
            sockets=str(self.layout.sockets),
            userlist=userlist,
            stats_users=[ADMIN_ROLE],
            version=self.program.order,
            settings=self.settings,
        )
        return render_ini(settings)

    def command(self) -> Sequence[str | Path]:
        """Return the command line."""
        return [self.program.path, self.layout.conf / f"{self.name}.ini"]

    def is_ready(self) -> bool:
        """Return whether it accepts connections."""
        return _answer(self.port, b"") is not None


def _answer(port: int, request: bytes) -> bytes | None:
    """Return the first bytes a server answers to a request, or None when it does not."""
    try:
        with socket.create_connection((HOST, port), timeout=_ANSWER_TIMEOUT) as connection:
            if not request:
                return b""
            connection.sendall(request)
            return connection.recv(64)
    except OSError:
        return None
