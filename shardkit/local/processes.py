"""Processes of the operating system, named so that a recycled pid is never mistaken for one.

Called by everything in this package that signals a process. Linux only: reads `/proc`.
Never signals by name, and never a process whose start time is not the one remembered.
Source: proc(5), pidfd_open(2), pidfd_send_signal(2).
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from shardkit.clock import SYSTEM, Clock

__all__ = [
    "ProcessMark",
    "boot_id",
    "find",
    "is_alive",
    "is_paused",
    "processes_in",
    "send",
    "wait_gone",
]

SERVER_COMMANDS = frozenset(
    {"postgres", "initdb", "pg_basebackup", "redis-server", "memcached", "pgbouncer"}
)
"""Command names (`/proc/PID/comm`) that may be ended for running in a server's folder."""

_POLL = 0.01


@dataclass(frozen=True, slots=True, order=True)
class ProcessMark:
    """One process for good: a pid with the moment it started.

    Attributes:
        pid: process number.
        started: clock ticks since boot; a later process with the same pid has another value.
    """

    pid: int
    started: int


def boot_id() -> str:
    """Return the random name of this boot; marks of another boot name nothing."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def find(pid: int) -> ProcessMark | None:
    """Return the mark of a running process, or None when there is none or it is a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in {"Z", "X"} else ProcessMark(pid, int(fields[19]))


def is_alive(mark: ProcessMark) -> bool:
    """Return whether this very process still runs."""
    return find(mark.pid) == mark


def is_paused(mark: ProcessMark) -> bool:
    """Return whether the process is stopped by SIGSTOP."""
    try:
        text = Path(f"/proc/{mark.pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] in {"T", "t"} and is_alive(mark)


def send(mark: ProcessMark, number: signal.Signals) -> bool:
    """Signal this very process; return False when it is gone.

    The pid is pinned by a descriptor before the start time is compared, so the process that is
    compared is the process that is signalled.
    """
    try:
        descriptor = os.pidfd_open(mark.pid)
    except ProcessLookupError:
        return False
    try:
        if not is_alive(mark):
            return False
        signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        return False
    else:
        return True
    finally:
        os.close(descriptor)


def processes_in(folder: Path) -> list[ProcessMark]:
    """Return the server processes whose working directory is a folder, ascending by pid.

    PostgreSQL's processes all work in their data folder, whoever their parent is by now, so
    this finds orphans that no pid file names.
    """
    wanted = {str(folder), f"{folder} (deleted)"}
    return sorted(mark for mark in _servers() if _working_folder(mark.pid) in wanted)


def wait_gone(
    marks: Iterable[ProcessMark], timeout: float, *, clock: Clock = SYSTEM
) -> list[ProcessMark]:
    """Wait until processes are gone.

    Args:
        marks: which ones.
        timeout: seconds to wait.
        clock: where the time comes from.

    Returns:
        Those that still run after that time; empty when all are gone.
    """
    pause = threading.Event()
    deadline = clock.monotonic() + timeout
    left = [mark for mark in marks if is_alive(mark)]
    while left and clock.monotonic() < deadline:
        pause.wait(_POLL)
        left = [mark for mark in left if is_alive(mark)]
    return left


def _servers() -> Iterator[ProcessMark]:
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            command = Path(f"/proc/{entry.name}/comm").read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            continue
        if command in SERVER_COMMANDS and (mark := find(int(entry.name))):
            yield mark


def _working_folder(pid: int) -> str | None:
    try:
        return str(Path(f"/proc/{pid}/cwd").readlink())
    except OSError:
        return None
