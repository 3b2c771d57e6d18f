"""A server on restored data: on this machine only, with no way in or out for replication.

Used while a restore replays the log, and by the drill. Its settings stand in a file of their own in
the data folder, so nothing of the old server's counts: it listens on the loopback, archives nothing
(the archive is the old cluster's), sends no log, follows nobody, and runs no subscription.
"""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Self

from shardkit.backup import manifest
from shardkit.errors import BackupError, LocalServerError
from shardkit.local.account import Account, write_file
from shardkit.local.binaries import find_postgres
from shardkit.local.owner import Warden
from shardkit.local.ports import HOST, choose
from shardkit.local.postgres import PostgresServer
from shardkit.local.server import log_tail

__all__ = ["CONFIG", "RestoredServer", "running"]

CONFIG: Final = "shardkit_restored.conf"
_HBA: Final = "shardkit_restored_hba.conf"
_IDENT: Final = "shardkit_restored_ident.conf"

RECOVERY: Final = 24 * 3600.0
"""Seconds that replaying the log may take; it ends earlier when the server does."""


class RestoredServer(PostgresServer):
    """A primary on data that a backup brought back.

    Attributes:
        users: logins that may come in, with their passwords, from this machine.
    """

    users: Sequence[str] = ()

    @classmethod
    def of(
        cls,
        physical: str,
        part: manifest.Part,
        folder: Path,
        *,
        sockets: Path,
        account: Account,
        users: Sequence[str],
    ) -> RestoredServer:
        """Describe the server of one physical shard.

        Args:
            physical: name of the physical shard.
            part: of the backup.
            folder: the data.
            sockets: folder of the unix socket, which nobody else can enter.
            account: who runs it and owns both.
            users: logins that may come in.

        Raises:
            BackupError: the PostgreSQL that made the data is not installed.
        """
        try:
            program = find_postgres(account, part.version // 10_000)
        except LocalServerError as error:
            raise BackupError(error.message, hint=error.hint) from error
        server = cls(
            f"restored_{physical}",
            program,
            physical=physical,
            port=choose(()),
            folder=folder,
            log=folder.with_name(f"{folder.name}.log"),
            account=account,
        )
        server.users = users
        server.configure(part, sockets)
        return server

    def configure(self, part: manifest.Part, sockets: Path) -> None:
        """Write the settings, before the first start."""
        values = {
            "listen_addresses": HOST,
            "port": str(self.port),
            "unix_socket_directories": str(sockets),
            "unix_socket_permissions": "0700",
            "hba_file": str(self.folder / _HBA),
            "ident_file": str(self.folder / _IDENT),
            "cluster_name": self.name,
            "max_wal_senders": "0",
            "max_logical_replication_workers": "0",
            "archive_mode": "off",
            "primary_conninfo": "",
            "synchronous_standby_names": "",
            "hot_standby": "off",
            "wal_level": "replica",
            "max_wal_size": "4GB",
            "timezone": "UTC",
            "log_timezone": "UTC",
            "lc_messages": "C",
            **{name: str(value) for name, value in part.settings.items()},
            # What is restored lies in pg_wal already; there is nowhere else to ask.
            "restore_command": "false",
            "recovery_target_action": "promote",
            "recovery_target_timeline": "current",
        }
        lines = [f"{name} = {_quoted(value)}" for name, value in values.items()]
        users = ",".join(json.dumps(user) for user in dict.fromkeys(self.users))
        texts = {
            CONFIG: "\n".join(["# Written by shardkit backup: replication is off.", *lines, ""]),
            _HBA: f"host all {users} {HOST}/32 scram-sha-256\n",
            _IDENT: "",
            # Of ALTER SYSTEM on the old server: where its log went, whom it followed.
            "postgresql.auto.conf": "# Emptied by shardkit backup restore.\n",
        }
        for name, text in texts.items():
            (self.folder / name).unlink(missing_ok=True)
            write_file(self.folder / name, text, 0o600, self.account)

    def aim(self, name: str, *, sync: bool) -> None:
        """Make the first start replay the log up to a label and no further."""
        path = self.folder / CONFIG
        text = path.read_text(encoding="utf-8") + f"recovery_target_name = {_quoted(name)}\n"
        if not sync:
            text += "fsync = off\n"
        write_file(path, text, 0o600, self.account)
        for signal_file in ("standby.signal", "recovery.signal"):
            (self.folder / signal_file).unlink(missing_ok=True)
        write_file(self.folder / "recovery.signal", "", 0o600, self.account)

    def before_launch(self) -> None:
        """Nothing is written: the settings stand since `configure`."""

    def command(self) -> Sequence[str | Path]:
        """Return the command line of the postmaster."""
        return [
            self.program.path,
            *("-D", self.folder, "-c", f"config_file={self.folder / CONFIG}"),
        ]

    def recover(self) -> None:
        """Wait, once it was launched, until it has replayed the log and takes writes.

        Raises:
            BackupError: it does not reach the label; shows the end of its log.
        """
        try:
            self.wait_ready(threading.Event(), RECOVERY)
        except LocalServerError as error:
            raise BackupError(error.message, hint=error.hint) from error

    def has_reached(self, name: str) -> bool:
        """Return whether its history says that it left the old timeline at the label."""
        histories = sorted((self.folder / "pg_wal").glob("*.history"))
        if not histories:
            return False
        text = histories[-1].read_text(encoding="utf-8")
        return re.search(rf'at restore point "{re.escape(name)}"', text) is not None

    def said(self) -> str:
        """Return the end of its log."""
        return log_tail(self.log)


class running:  # noqa: N801  reads as a word: `with running(servers)`
    """Ends servers at the end of the block, and when this process dies."""

    def __init__(self, servers: Mapping[str, RestoredServer]) -> None:
        self._servers = servers
        self._warden = Warden()

    def __enter__(self) -> Self:
        return self

    def watch(self) -> None:
        """Make sure that what was launched ends with this process."""
        marks = [server.mark for server in self._servers.values()]
        self._warden.watch({mark: signal.SIGINT for mark in marks if mark is not None})

    def __exit__(self, *_: object) -> None:
        try:
            for server in self._servers.values():
                server.stop()
        finally:
            self._warden.dismiss()


def _quoted(value: str) -> str:
    return "'" + value.replace("\\", "\\\\").replace("'", "''") + "'"
