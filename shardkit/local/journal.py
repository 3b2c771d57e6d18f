"""Keeps the state file, the warden and the listener in step with what the servers do.

Called by `cluster` and `launch` after every change to a server, from any thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from shardkit.local.owner import Warden, stop_signal
from shardkit.local.server import ServerProcess
from shardkit.local.state import State

__all__ = ["Journal", "LocalProgress", "Progress"]


@dataclass(frozen=True, slots=True)
class LocalProgress:
    """How far a start or stop has come.

    Attributes:
        done: servers that are up (or down).
        total: servers altogether.
        what: what just happened, for people.
    """

    done: int
    total: int
    what: str


Progress = Callable[[LocalProgress], None]


class Journal:
    """What is written down about the servers of a running cluster.

    *Invariant:* a process is in the state file and known to the warden before anybody waits
    for it, so that neither a crash nor a kill of the owner loses it.
    """

    def __init__(self, file: Path, state: State, progress: Progress | None) -> None:
        self._file = file
        self._state = state
        self._warden = Warden()
        self._guard = threading.Lock()
        self._progress = progress
        self._done = 0
        state.save(file)

    def is_initialised(self, server: ServerProcess) -> bool:
        """Return whether a server's data folder is complete."""
        return self._state.servers[server.name].is_initialised

    def record(self, server: ServerProcess, *, is_initialised: bool | None = None) -> None:
        """Write down a server's process and port.

        Args:
            server: the one that changed.
            is_initialised: whether its data folder is complete; None for as before.
        """
        with self._guard:
            old = self._state.servers[server.name]
            new = replace(
                old,
                port=server.port,
                process=server.mark,
                is_initialised=old.is_initialised if is_initialised is None else is_initialised,
            )
            self._state = self._state.with_server(new)
            self._state.save(self._file)
            running = (s for s in self._state.servers.values() if s.process)
            self._warden.watch({s.process: stop_signal(s.kind) for s in running if s.process})

    def restart_count(self, progress: Progress | None) -> None:
        """Count from nothing again and tell another listener, as a stop does after a start."""
        with self._guard:
            self._progress, self._done = progress, 0

    def say(self, what: str) -> None:
        """Tell the listener that one more server is up or down."""
        with self._guard:
            self._done += 1
            if self._progress is not None:
                self._progress(LocalProgress(self._done, len(self._state.servers), what))

    def ready(self) -> None:
        """Write down that every server came up."""
        with self._guard:
            self._state = replace(self._state, is_ready=True)
            self._state.save(self._file)

    def close(self, *, is_orderly: bool) -> None:
        """Let the warden go, or let it end what did not stop in good order.

        Args:
            is_orderly: whether every server has stopped.
        """
        with self._guard:
            self._state = replace(
                self._state, is_ready=False, owner=None if is_orderly else self._state.owner
            )
            self._state.save(self._file)
        if is_orderly:
            self._warden.dismiss()
        else:
            self._warden.abandon()
