"""What happens to the servers when their owner ends: the warden, and the next start's cleaning.

Called by `cluster` and by `shardkit local down`. Ends only processes that the state file marks or
that work in a server's own folder.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from shardkit.errors import LocalServerError
from shardkit.local import processes
from shardkit.local.processes import ProcessMark
from shardkit.local.server import STOP_TIMEOUT, ServerKind
from shardkit.local.state import State

__all__ = ["Warden", "end_leftovers", "stop_signal"]


def stop_signal(kind: str) -> signal.Signals:
    """Return the signal that ends a server in good order."""
    return signal.SIGINT if kind == ServerKind.POSTGRESQL else signal.SIGTERM


class Warden:
    """The helper process that ends the servers when this process dies without doing it.

    *Invariant:* it knows every process passed to the last `watch`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(__file__).with_name("warden.py"))],
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def watch(self, marks: Mapping[ProcessMark, signal.Signals]) -> None:
        """Tell it which processes to end, and how; replaces what it was told before."""
        entries = [[mark.pid, mark.started, int(number)] for mark, number in marks.items()]
        line = json.dumps(entries) + "\n"
        with self._lock:
            if self._child.stdin is None or self._child.stdin.closed:
                return
            try:
                self._child.stdin.write(line.encode())
                self._child.stdin.flush()
            except BrokenPipeError:
                # Somebody ended it. The servers still run, and the next start cleans up.
                return

    def dismiss(self) -> None:
        """Let it go without ending anything."""
        self.watch({})
        with self._lock:
            if self._child.stdin is not None and not self._child.stdin.closed:
                self._child.stdin.close()
        self._child.wait()


def end_leftovers(state: State) -> int:
    """End the servers that an owner left behind when it was killed.

    Args:
        state: as that owner last wrote it; the caller holds the lock of the directory.

    Returns:
        Number of processes that were found running.

    Raises:
        LocalServerError: a process survives SIGKILL.
    """
    found: set[ProcessMark] = set()
    for server in state.servers.values():
        inside = processes.processes_in(state.data / server.name)
        main = server.process if server.process and processes.is_alive(server.process) else None
        for mark in inside:
            processes.send(mark, signal.SIGCONT)
        if main is not None:
            processes.send(main, signal.SIGCONT)
            processes.send(main, stop_signal(server.kind))
        found |= {*inside, *({main} if main else ())}
    for patience in (STOP_TIMEOUT, STOP_TIMEOUT):
        left = processes.wait_gone(found, patience if _has_main(state) else 0.0)
        if not left:
            return len(found)
        for mark in left:
            processes.send(mark, signal.SIGKILL)
    if left := processes.wait_gone(found, STOP_TIMEOUT):
        raise LocalServerError(f"processes {', '.join(str(m.pid) for m in left)} cannot be ended")
    return len(found)


def _has_main(state: State) -> bool:
    """Return whether an asked main process is still ending its children in good order."""
    return any(s.process and processes.is_alive(s.process) for s in state.servers.values())
