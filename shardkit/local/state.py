"""The state file: what runs, where, and who owns it; and the lock that proves the owner lives.

Read by the next start, by `down` and by `status` from another process. Never trusts a pid alone:
every process is kept as a mark, and marks of another boot count as gone.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from shardkit.errors import LocalServerError, RefusedError
from shardkit.local.account import write_file
from shardkit.local.layout import Layout
from shardkit.local.options import LocalOptions
from shardkit.local.processes import ProcessMark, boot_id, is_alive

__all__ = ["DirectoryLock", "ServerState", "State", "acquire"]

_FORMAT = 2


@dataclass(frozen=True, slots=True)
class ServerState:
    """One server as the state file keeps it.

    Attributes:
        name: name of the server.
        kind: `postgresql`, `redis`, `memcached` or `pgbouncer`.
        physical: the physical shard it belongs to, or None.
        port: its TCP port.
        version: of the program.
        is_initialised: whether its data folder is complete.
        process: the running process, or None.
    """

    name: str
    kind: str
    physical: str | None
    port: int
    version: str
    is_initialised: bool = False
    process: ProcessMark | None = None


@dataclass(frozen=True, slots=True)
class State:
    """The whole file.

    Attributes:
        options: shape of the cluster.
        data: folder of the servers' data.
        owner: the process that started the servers, or None after an orderly stop.
        is_ready: whether every server came up.
        is_supervised: whether the owner is a `shardkit local up`, which `down` may end.
        servers: by name, in the order they are shown.
    """

    options: LocalOptions
    data: Path
    owner: ProcessMark | None = None
    is_ready: bool = False
    is_supervised: bool = False
    servers: Mapping[str, ServerState] = field(default_factory=dict)

    @property
    def is_owned(self) -> bool:
        """Whether the owner still runs."""
        return self.owner is not None and is_alive(self.owner)

    @property
    def has_data(self) -> bool:
        """Whether any server's data were ever complete."""
        return any(server.is_initialised for server in self.servers.values())

    def with_server(self, server: ServerState) -> State:
        """Return the state with one server added or replaced."""
        return replace(self, servers={**self.servers, server.name: server})

    def save(self, file: Path) -> None:
        """Write the file in one step, readable by its owner only."""
        content = {
            "format": _FORMAT,
            "boot": boot_id(),
            "directory": str(file.parent),
            "owner": _mark_json(self.owner),
            "ready": self.is_ready,
            "supervised": self.is_supervised,
            "data": str(self.data),
            "options": self.options.as_json(),
            "servers": [
                {
                    "name": server.name,
                    "kind": server.kind,
                    "physical": server.physical,
                    "port": server.port,
                    "version": server.version,
                    "initialised": server.is_initialised,
                    "process": _mark_json(server.process),
                }
                for server in self.servers.values()
            ],
        }
        write_file(file, json.dumps(content, indent=1) + "\n", 0o600)

    @classmethod
    def load(cls, file: Path) -> State | None:
        """Read the file; return None when there is none.

        Raises:
            LocalServerError: it cannot be read or is of another format.
        """
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if content["format"] != _FORMAT:
                raise LocalServerError(
                    f"{file}: written by another version of shardkit",
                    hint="begin anew with `shardkit local down --delete-data`",
                )
            # Marks of another boot name nothing; those of a copied folder name servers of the
            # original.
            is_ours = content["boot"] == boot_id() and content["directory"] == str(file.parent)
            servers = [
                ServerState(
                    item["name"],
                    item["kind"],
                    item["physical"],
                    item["port"],
                    item["version"],
                    item["initialised"],
                    _mark(item["process"]) if is_ours else None,
                )
                for item in content["servers"]
            ]
            return cls(
                LocalOptions.from_json(content["options"]),
                Path(content["data"]),
                _mark(content["owner"]) if is_ours else None,
                bool(content["ready"]),
                bool(content["supervised"]),
                {server.name: server for server in servers},
            )
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LocalServerError(f"{file}: cannot be read: {error!r}") from error


class DirectoryLock:
    """The lock on a cluster's directory, held while its owner lives.

    *Invariant:* the kernel drops it with the process, however that ends.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._descriptor: int | None = None

    def acquire(self) -> bool:
        """Take the lock; return False when another process, or this one, holds it."""
        descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        """Give the lock back; does nothing when it is not held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def acquire(layout: Layout) -> DirectoryLock:
    """Take the lock of a cluster's directory.

    Raises:
        RefusedError: another process, or another object of this one, owns the cluster.
    """
    lock = DirectoryLock(layout.lock)
    if lock.acquire():
        return lock
    state = State.load(layout.state)
    owner = state.owner.pid if state and state.owner else "unknown"
    raise RefusedError(
        f"{layout.directory}: process {owner} already runs this cluster",
        hint="see `shardkit local status`; stop it with `shardkit local down`",
    )


def _mark_json(mark: ProcessMark | None) -> dict[str, int] | None:
    return None if mark is None else {"pid": mark.pid, "started": mark.started}


def _mark(value: Mapping[str, Any] | None) -> ProcessMark | None:
    return None if value is None else ProcessMark(int(value["pid"]), int(value["started"]))
