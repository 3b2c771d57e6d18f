"""One server process of an embedded cluster: launched, watched, paused and ended.

`postgres` and `services` say what to launch and how to tell that it is ready. Called by
`cluster`. Never decides which servers exist.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO, ClassVar

from shardkit.clock import SYSTEM, Clock
from shardkit.errors import LocalServerError
from shardkit.local import ports, processes
from shardkit.local.account import Account, child_environment
from shardkit.local.binaries import Program
from shardkit.local.processes import ProcessMark
from shardkit.topology import Role

__all__ = ["LocalServer", "ServerKind", "ServerProcess", "ServerStatus", "log_tail", "run_tool"]

START_TIMEOUT = 60.0
STOP_TIMEOUT = 20.0
_POLL = 0.02
_TAIL_LINES = 12
_TAIL_BYTES = 8192


class ServerKind(StrEnum):
    """What a server is."""

    POSTGRESQL = "postgresql"
    PGBOUNCER = "pgbouncer"
    REDIS = "redis"
    MEMCACHED = "memcached"


class ServerStatus(StrEnum):
    """What a server does."""

    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class LocalServer:
    """One server of an embedded cluster, as it was when asked.

    Attributes:
        name: `alpha_0`, `redis`, `pgbouncer_alpha`.
        kind: what it is.
        physical: the physical shard it belongs to, or None.
        role: primary or replica, now, for PostgreSQL; else None.
        host: address it listens on.
        port: TCP port it listens on.
        pid: main process, or None when stopped.
        status: running, paused or stopped.
        version: of the program.
        log: its log file.
    """

    name: str
    kind: ServerKind
    physical: str | None
    role: Role | None
    host: str
    port: int
    pid: int | None
    status: ServerStatus
    version: str
    log: Path


class ServerProcess(ABC):
    """One server: its program, its folder and, while it runs, its processes.

    Attributes:
        name: unique within the cluster.
        program: what runs.
        physical: the physical shard it belongs to, or None.
        port: TCP port; changes only while stopped.
        folder: its data, and the working folder of every one of its processes.
        log: what it prints.
    """

    kind: ClassVar[ServerKind]
    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM

    def __init__(
        self,
        name: str,
        program: Program,
        *,
        physical: str | None,
        port: int,
        folder: Path,
        log: Path,
        account: Account,
        clock: Clock = SYSTEM,
    ) -> None:
        self.name = name
        self.program = program
        self.physical = physical
        self.port = port
        self.folder = folder
        self.log = log
        self.account = account
        self._clock = clock
        self._child: subprocess.Popen[bytes] | None = None
        self._mark: ProcessMark | None = None
        self._changing = threading.Lock()
        self._is_wanted = False
        self._log_start = 0

    @abstractmethod
    def command(self) -> Sequence[str | Path]:
        """Return the program and its arguments, for the foreground."""

    @abstractmethod
    def is_ready(self) -> bool:
        """Return whether the running server accepts connections."""

    def before_launch(self) -> None:  # noqa: B027  most have nothing to write
        """Write the configuration; called while no process of the server runs."""

    def has_data(self) -> bool:
        """Return whether the folder holds what an earlier start made."""
        return self.folder.is_dir()

    @property
    def role(self) -> Role | None:
        """Primary or replica for PostgreSQL, else None."""
        return None

    @property
    def mark(self) -> ProcessMark | None:
        """The main process while it runs, or None."""
        self._reap()
        return self._mark

    @property
    def has_ended(self) -> bool:
        """Whether it was launched, and ended without being told to."""
        return self.mark is None and self._is_wanted

    def snapshot(self) -> LocalServer:
        """Return the server as a value."""
        mark = self.mark
        if mark is None:
            status = ServerStatus.STOPPED
        elif processes.is_paused(mark):
            status = ServerStatus.PAUSED
        else:
            status = ServerStatus.RUNNING
        return LocalServer(
            name=self.name,
            kind=self.kind,
            physical=self.physical,
            role=self.role,
            host=ports.HOST,
            port=self.port,
            pid=mark.pid if mark else None,
            status=status,
            version=self.program.version,
            log=self.log,
        )

    def launch(self) -> ProcessMark:
        """Start the process and return at once.

        Raises:
            LocalServerError: the program cannot be run.
        """
        self.before_launch()
        with open_log(self.log) as log:
            self._log_start = log.tell()
            try:
                child = subprocess.Popen(
                    [str(part) for part in self.command()],
                    cwd=self.folder,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=dict(child_environment()),
                    start_new_session=True,
                    umask=0o077,
                    **self.account.spawn_arguments,
                )
            except OSError as error:
                raise LocalServerError(
                    f"{self.name}: {self.program.path} cannot be run: {error}"
                ) from error
        with self._changing:
            mark = processes.find(child.pid)
            self._child, self._mark, self._is_wanted = child, mark, True
        if mark is None:
            raise self.failure("ended at once")
        return mark

    def wait_ready(self, cancelled: threading.Event, timeout: float = START_TIMEOUT) -> None:
        """Wait until the server accepts connections.

        Args:
            cancelled: gives up when set.
            timeout: seconds to wait.

        Raises:
            LocalServerError: it ended, or is not ready in time; shows the end of its log.
        """
        deadline = self._clock.monotonic() + timeout
        while True:
            if self._reap() is not None:
                raise self.failure("did not start")
            if self.is_ready():
                return
            if self._clock.monotonic() > deadline:
                raise self.failure(f"is not ready after {timeout:g} seconds")
            if cancelled.wait(_POLL):
                raise LocalServerError(f"{self.name}: start was interrupted")

    def processes(self) -> list[ProcessMark]:
        """Return every process of the server, orphans included; empty when stopped."""
        found = processes.processes_in(self.folder)
        mark = self.mark
        return found if mark is None or mark in found else [mark, *found]

    def stop(self, timeout: float = STOP_TIMEOUT) -> None:
        """End the server in good order; by force when it takes longer than `timeout` seconds.

        Raises:
            LocalServerError: a process survives SIGKILL, which only a broken disk brings about.
        """
        self._is_wanted = False
        self.resume()
        if (mark := self.mark) is not None:
            processes.send(mark, self.stop_signal)
            self._wait(timeout)
        self.kill()

    def kill(self) -> None:
        """End every process of the server at once with SIGKILL, as a crash would.

        Raises:
            LocalServerError: a process survives, which only a broken disk brings about.
        """
        self._is_wanted = False
        # The main process first: it must not replace the children that end.
        if (mark := self.mark) is not None:
            processes.send(mark, signal.SIGKILL)
        others = processes.processes_in(self.folder)
        for other in others:
            processes.send(other, signal.SIGKILL)
        self._wait(STOP_TIMEOUT)
        if processes.wait_gone(others, STOP_TIMEOUT):
            raise self.failure("cannot be ended")

    def pause(self) -> None:
        """Freeze every process of the server; clients wait, connections stay open."""
        if (mark := self.mark) is not None:
            processes.send(mark, signal.SIGSTOP)
            for other in self.processes():
                processes.send(other, signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused server go on; does nothing to one that runs."""
        for mark in reversed(self.processes()):
            processes.send(mark, signal.SIGCONT)

    def failure(self, what: str) -> LocalServerError:
        """Return the error that says what happened and shows the end of the log."""
        tail = log_tail(self.log, self._log_start)
        return LocalServerError(
            f"{self.name} {what}; the end of its log:\n{tail}", hint=f"the whole log: {self.log}"
        )

    def _reap(self) -> int | None:
        """Collect the exit code of an ended child; None while it runs or was never started."""
        child = self._child
        if child is None:
            return None
        code = child.poll()
        if code is not None:
            self._ended(child)
        return code

    def _wait(self, timeout: float) -> None:
        child = self._child
        if child is not None:
            try:
                child.wait(timeout)
            except subprocess.TimeoutExpired:
                return
            self._ended(child)

    def _ended(self, child: subprocess.Popen[bytes]) -> None:
        """Forget the mark of a child; any thread may look at a server while one starts it again."""
        with self._changing:
            if self._child is child:
                self._mark = None


def open_log(path: Path) -> BinaryIO:
    """Open a log file for appending, readable by its owner only."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    file = os.fdopen(descriptor, "ab")
    file.seek(0, os.SEEK_END)
    return file


def log_tail(path: Path, start: int = 0, lines: int = _TAIL_LINES) -> str:
    """Return the last lines of a log, from byte `start` on; empty when there is none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(start, size - _TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(f"  {line}" for line in text.splitlines()[-lines:])


def run_tool(command: Sequence[str | Path], *, account: Account, log: Path, cwd: Path) -> None:
    """Run a program to its end under an account, its output appended to a log.

    Raises:
        LocalServerError: it failed; shows the end of the log.
    """
    environment: Mapping[str, str] = child_environment()
    with open_log(log) as file:
        start = file.tell()
        code = subprocess.run(
            [str(part) for part in command],
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=dict(environment),
            check=False,
            start_new_session=True,
            umask=0o077,
            **account.spawn_arguments,
        ).returncode
    if code != 0:
        name = Path(command[0]).name
        raise LocalServerError(
            f"{name} failed with code {code}; the end of its log:\n{log_tail(log, start)}",
            hint=f"the whole log: {log}",
        )
