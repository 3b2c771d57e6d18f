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
        self.abandon()

    def abandon(self) -> None:
        """Leave it as the death of this process would: it ends what it watches."""
        with self._lock:
            if self._child.stdin is not None and not self._child.stdin.closed:
                self._child.stdin.close()
        self._child.wait()


def end_leftovers(state: State | None, data: Path) -> int:
    """End the servers that an owner left behind when it was killed.

    Args:
        state: as that owner last wrote it, or None when it cannot be read; the caller holds
            the lock of the directory.
        data: folder of the servers' data.

    Returns:
        Number of processes that were found running.

    Raises:
        LocalServerError: a process survives SIGKILL.
    """
    found = _inside(data)
    has_main = False
    for server in state.servers.values() if state else ():
        main = server.process
        if main is not None and processes.is_alive(main):
            found.add(main)
            # Paused or not, it gets the chance to end in good order.
            processes.send(main, signal.SIGCONT)
            has_main |= processes.send(main, stop_signal(server.kind))
    for mark in found:
        processes.send(mark, signal.SIGCONT)
    if has_main:
        processes.wait_gone(found, STOP_TIMEOUT)
    # What was forked meanwhile is in the folders, too.
    left = _inside(data) | {mark for mark in found if processes.is_alive(mark)}
    for mark in left:
        processes.send(mark, signal.SIGKILL)
    if stuck := processes.wait_gone(left, STOP_TIMEOUT):
        raise LocalServerError(f"processes {', '.join(str(m.pid) for m in stuck)} cannot be ended")
    return len(found)


def _inside(data: Path) -> set[ProcessMark]:
    """Return the server processes that work in any server's folder."""
    folders = data.iterdir() if data.is_dir() else ()
    return {mark for folder in folders for mark in processes.processes_in(folder)}
