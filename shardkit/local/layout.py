"""Where an embedded cluster keeps its files.

    DIRECTORY/                what the user named; `.shardkit` by default
      shardkit.toml           0600  the configuration applications read
      state.json              0600  what runs, and who owns it
      passwords.json          0600
      shardkit.lock                 held by the owner while it lives
      logs/NAME.log           0600  one per server
    DATA/                     DIRECTORY/data, or a folder under /var/tmp when the account that
      conf/                   runs the servers cannot reach DIRECTORY
      run/                    unix sockets; elsewhere when the path is too long for one
      NAME/                   0700  one per server, owned by that account

Folders that hold configuration belong to the user of this process, so that the servers' account
cannot put a symbolic link where root writes. Called by `cluster`; starts nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from shardkit.errors import LocalServerError, RefusedError
from shardkit.local.account import Account, claim_folder, is_reachable, write_file
from shardkit.local.binaries import SHARED_FOLDER

__all__ = ["LOCK_NAME", "Layout"]

_LONGEST_SOCKET_PATH = 107
"""Bytes a unix socket's path may have on Linux. Source: unix(7), `sun_path`."""

LOCK_NAME = "shardkit.lock"
_FILES = (LOCK_NAME, "shardkit.toml", "state.json", "passwords.json", "supervisor.log")
_ROLES = ("shardkit_admin", "shardkit_app", "shardkit_replication")


@dataclass(frozen=True, slots=True)
class Layout:
    """The folders of one embedded cluster.

    Attributes:
        directory: what the user named, absolute.
        data: holds one folder per server.
        sockets: holds PostgreSQL's unix sockets.
        account: who runs the servers.
    """

    directory: Path
    data: Path
    sockets: Path
    account: Account

    @classmethod
    def of(cls, directory: Path, account: Account) -> Layout:
        """Create the directory where it is missing and decide where the rest goes.

        Raises:
            RefusedError: the directory holds other things.
            LocalServerError: a folder belongs to somebody else.
        """
        directory.parent.mkdir(parents=True, exist_ok=True)
        directory = directory.parent.resolve() / directory.name
        if directory.is_dir() and not (directory / LOCK_NAME).exists() and any(directory.iterdir()):
            raise RefusedError(
                f"{directory}: holds other files and no cluster; it is left alone",
                hint="name an empty or a new folder with --dir",
            )
        claim_folder(directory, 0o711 if account.is_switched else 0o700)
        digest = hashlib.sha256(os.fsencode(directory)).hexdigest()[:12]
        inside = directory / "data"
        outside = SHARED_FOLDER / f"shardkit-{account.name}-{digest}"
        # Data stay where they were made, whoever may reach the directory by now.
        if not account.is_switched or inside.is_dir():
            data = inside
        elif outside.is_dir() or not is_reachable(directory, account):
            data = outside
        else:
            data = inside
        sockets = data / "run"
        if len(os.fsencode(sockets / ".s.PGSQL.65535")) > _LONGEST_SOCKET_PATH:
            sockets = SHARED_FOLDER / f"shardkit-sockets-{digest}"
        return cls(directory, data, sockets, account)

    @property
    def config(self) -> Path:
        """The `shardkit.toml` for applications."""
        return self.directory / "shardkit.toml"

    @property
    def state(self) -> Path:
        """The state file."""
        return self.directory / "state.json"

    @property
    def lock(self) -> Path:
        """The file whose lock says that the owner lives."""
        return self.directory / LOCK_NAME

    @property
    def conf(self) -> Path:
        """The folder of the servers' own configuration files."""
        return self.data / "conf"

    def log(self, name: str) -> Path:
        """Return the log file of a server."""
        return self.directory / "logs" / f"{name}.log"

    def folder(self, name: str) -> Path:
        """Return the data folder of a server."""
        return self.data / name

    def prepare(self) -> None:
        """Create every folder but the servers' own.

        Raises:
            LocalServerError: a folder belongs to somebody else.
        """
        claim_folder(self.directory / "logs", 0o700)
        claim_folder(self.data, 0o711)
        # For whoever finds it: under /var/tmp nothing else tells where it belongs.
        write_file(self.data / "README", f"Data of the cluster in {self.directory}\n", 0o644)
        claim_folder(self.conf, 0o711)
        claim_folder(self.sockets, 0o700, self.account)

    def empty_folder(self, name: str) -> Path:
        """Return the data folder of a server, new and empty; what was in it is deleted."""
        folder = self.folder(name)
        if folder.exists():
            shutil.rmtree(folder)
        return claim_folder(folder, 0o700, self.account)

    def replace_folder(self, name: str, by: str) -> None:
        """Have the folder of one name be that of another; what was in it is deleted."""
        folder, old = self.folder(name), self.folder(f"{name}.old")
        shutil.rmtree(old, ignore_errors=True)  # of an owner that was killed in the middle
        if folder.exists():
            folder.rename(old)
        self.folder(by).rename(folder)
        shutil.rmtree(old, ignore_errors=True)

    def passwords(self) -> dict[str, str]:
        """Return the password of each role, made up on the first call.

        Raises:
            LocalServerError: the file cannot be read.
        """
        file = self.directory / "passwords.json"
        if not file.exists():
            made = {role: secrets.token_urlsafe(24) for role in _ROLES}
            write_file(file, json.dumps(made, indent=1) + "\n", 0o600)
            return made
        try:
            read = json.loads(file.read_text(encoding="utf-8"))
            return {role: str(read[role]) for role in _ROLES}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LocalServerError(f"{file}: cannot be read: {error}") from error

    def delete(self) -> None:
        """Delete everything the cluster kept, its data included, and nothing else."""
        for folder in (self.sockets, self.data, self.directory / "logs"):
            if folder.exists():
                claim_folder(folder, 0o700, self.account if folder == self.sockets else None)
                shutil.rmtree(folder)
        for name in _FILES:
            (self.directory / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.directory.rmdir()
