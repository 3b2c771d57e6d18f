"""An embedded cluster seen from another process: what runs, and how to end it.

Called by `shardkit local status` and `shardkit local down`. Works from the state file, so it needs
neither the owner nor the programs.
"""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardkit.clock import SYSTEM, Clock
from shardkit.errors import LocalServerError, RefusedError
from shardkit.local import processes
from shardkit.local.account import server_account
from shardkit.local.layout import LOCK_NAME, Layout
from shardkit.local.options import LocalOptions
from shardkit.local.owner import end_leftovers
from shardkit.local.ports import HOST
from shardkit.local.postgres import role_of
from shardkit.local.server import LocalServer, ServerKind, ServerStatus
from shardkit.local.state import DirectoryLock, ServerState, State

__all__ = ["LocalStatus", "read_status", "stop_cluster"]

_STOP_TIMEOUT = 60.0
_POLL = 0.05


@dataclass(frozen=True, slots=True)
class LocalStatus:
    """An embedded cluster as its state file and the kernel describe it.

    Attributes:
        directory: where it lives.
        config: its `shardkit.toml`.
        owner_pid: the process that runs it, or None when that is gone.
        is_ready: whether every server came up and the owner lives.
        options: the shape it was last started with, or None when there is no cluster.
        servers: in the order they were made; empty when there is no cluster.
    """

    directory: Path
    config: Path
    owner_pid: int | None
    is_ready: bool
    options: LocalOptions | None
    servers: tuple[LocalServer, ...]

    @property
    def n_running(self) -> int:
        """Number of servers that run."""
        return sum(server.status is not ServerStatus.STOPPED for server in self.servers)

    def as_json(self) -> dict[str, Any]:
        """Return plain values for `--json`."""
        return {
            "directory": str(self.directory),
            "config": str(self.config),
            "owner_pid": self.owner_pid,
            "ready": self.is_ready,
            "servers": [
                {
                    "name": server.name,
                    "kind": server.kind,
                    "physical": server.physical,
                    "role": server.role,
                    "host": server.host,
                    "port": server.port,
                    "pid": server.pid,
                    "status": server.status,
                    "version": server.version,
                    "log": str(server.log),
                }
                for server in self.servers
            ],
        }


def read_status(directory: str | os.PathLike[str]) -> LocalStatus:
    """Return what runs in a directory; nothing when there is no cluster.

    Raises:
        LocalServerError: the state file cannot be read.
    """
    folder = _resolved(directory)
    state = State.load(folder / "state.json")
    owner = state.owner if state is not None and state.is_owned else None
    return LocalStatus(
        directory=folder,
        config=folder / "shardkit.toml",
        owner_pid=owner.pid if owner else None,
        is_ready=state is not None and owner is not None and state.is_ready,
        options=state.options if state else None,
        servers=tuple(_seen(s, state, folder) for s in state.servers.values()) if state else (),
    )


def stop_cluster(
    directory: str | os.PathLike[str], *, delete_data: bool = False, clock: Clock = SYSTEM
) -> int:
    """Stop the cluster of a directory, whoever runs it; end what a killed owner left.

    Args:
        directory: where it lives.
        delete_data: whether to delete everything it kept, too.
        clock: where the time comes from.

    Returns:
        Number of servers that were running.

    Raises:
        RefusedError: its owner is not `shardkit local up` but another program.
        LocalServerError: it does not end in time.
    """
    folder = _resolved(directory)
    if not (folder / LOCK_NAME).exists():
        return 0
    state = _load(folder / "state.json", is_needed=not delete_data)
    n_running = 0
    if state is not None:
        n_running = sum(_is_running(server) for server in state.servers.values())
        _ask_owner(state, folder)
    layout = Layout.of(folder, server_account())
    with _acquired(layout, clock):
        end_leftovers(_load(layout.state, is_needed=not delete_data), layout.data)
        if delete_data:
            layout.delete()
    return n_running


def _resolved(directory: str | os.PathLike[str]) -> Path:
    """Return the directory as the state file names it."""
    folder = Path(directory).absolute()
    return folder.parent.resolve() / folder.name


def _load(file: Path, *, is_needed: bool) -> State | None:
    """Read the state; when everything is deleted anyway, one that cannot be read is none."""
    try:
        return State.load(file)
    except LocalServerError:
        if is_needed:
            raise
        return None


def _ask_owner(state: State, folder: Path) -> None:
    """Ask the owner, if it lives and is a supervisor, to stop its servers and end."""
    if state.owner is None or not state.is_owned:
        return
    if not state.is_supervised:
        raise RefusedError(
            f"{folder}: process {state.owner.pid} runs this cluster as part of another program",
            hint="end that program; its servers end with it",
        )
    processes.send(state.owner, signal.SIGTERM)


def _is_running(server: ServerState) -> bool:
    return server.process is not None and processes.is_alive(server.process)


def _acquired(layout: Layout, clock: Clock) -> DirectoryLock:
    """Wait for the owner to let go of the directory, and take it."""
    lock = DirectoryLock(layout.lock)
    pause = threading.Event()
    deadline = clock.monotonic() + _STOP_TIMEOUT
    while not lock.acquire():
        if clock.monotonic() > deadline:
            raise LocalServerError(
                f"{layout.directory}: its owner did not end within {_STOP_TIMEOUT:g} seconds",
                hint=f"see the logs in {layout.directory / 'logs'}",
            )
        pause.wait(_POLL)
    return lock


def _seen(server: ServerState, state: State, folder: Path) -> LocalServer:
    mark = server.process if _is_running(server) else None
    status = ServerStatus.RUNNING if mark else ServerStatus.STOPPED
    if mark is not None and processes.is_paused(mark):
        status = ServerStatus.PAUSED
    is_postgres = server.kind == ServerKind.POSTGRESQL
    return LocalServer(
        name=server.name,
        kind=ServerKind(server.kind),
        physical=server.physical,
        role=role_of(state.data / server.name) if is_postgres else None,
        host=HOST,
        port=server.port,
        pid=mark.pid if mark else None,
        status=status,
        version=server.version,
        log=folder / "logs" / f"{server.name}.log",
    )
