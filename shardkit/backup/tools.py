"""PostgreSQL's own programs, run as children that end with this process.

Passwords reach them by the environment, never as an argument. What fails shows the end of what
the program said. Called by the modules of `shardkit.backup`.
"""

from __future__ import annotations

import re
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

from psycopg.conninfo import make_conninfo
from sqlalchemy import URL

from shardkit.errors import (
    BackupError,
    ConfigurationError,
    EndpointUnavailableError,
    LocalServerError,
    ShardkitError,
)
from shardkit.local import processes
from shardkit.local.account import child_environment, server_account
from shardkit.local.binaries import Program, find_postgres
from shardkit.local.owner import Warden
from shardkit.local.processes import ProcessMark
from shardkit.ops.direct import parameters

__all__ = ["Tools", "failure", "login"]

_TAIL: Final = 8
_PATIENCE: Final = 20.0
_AWAY = re.compile(r"could not connect|connection to server|server closed|not connect|terminating")
_FULL = re.compile(r"No space left|Disk quota exceeded|File too large")


def login(url: URL, *, application: str) -> tuple[str, dict[str, str]]:
    """Return how a program connects: a connection string for everybody's eyes, and the secret.

    Args:
        url: the address with login and password.
        application: what `pg_stat_activity` shows.

    Raises:
        ConfigurationError: it has a secret that only an argument could carry.
    """
    given = parameters(url, application=application)
    password = given.pop("password", None)
    if "sslpassword" in given:
        raise ConfigurationError(
            "sslpassword cannot be given to PostgreSQL's programs but as an argument",
            hint="use a key file without a password that only its owner can read",
        )
    secret = {} if password is None else {"PGPASSWORD": str(password)}
    return make_conninfo(**{k: v for k, v in given.items() if k != "dbname"}), secret


class Tools:
    """PostgreSQL's programs; a context that ends what still runs.

    Args:
        major: the version they must have, to read what it wrote; None for the newest, which can
            talk to older servers.

    Raises:
        BackupError: they are not installed.
    """

    def __init__(self, major: int | None = None) -> None:
        try:
            self.program: Program = find_postgres(server_account(), major)
        except LocalServerError as error:
            raise BackupError(error.message, hint=error.hint) from error
        self._children: dict[ProcessMark, subprocess.Popen[str]] = {}
        self._lock = threading.Lock()
        self._warden: Warden | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.end_all()
        if self._warden is not None:
            self._warden.dismiss()

    def runs(self, name: str) -> bool:
        """Return whether a program is there and can be run at all."""
        try:
            answer = subprocess.run(
                [self.program.tool(name), "--version"],
                capture_output=True,
                check=False,
                env=dict(child_environment()),
            )
        except OSError:
            return False
        return answer.returncode == 0

    def read(self, name: str, *arguments: str | Path) -> list[str]:
        """Return the lines that a program prints, also where it ends with an error."""
        answer = subprocess.run(
            [self.program.tool(name), *(str(a) for a in arguments)],
            capture_output=True,
            text=True,
            check=False,
            env=dict(child_environment()),
        )
        return answer.stdout.splitlines()

    def start(
        self,
        name: str,
        *arguments: str | Path,
        secret: Mapping[str, str] | None = None,
        log: IO[Any],
    ) -> subprocess.Popen[str]:
        """Start a program in the background; its messages go to a file or, with PIPE, to us."""
        command = [self.program.tool(name), *(str(a) for a in arguments)]
        try:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                text=True,
                env={**child_environment(), **(secret or {})},
                start_new_session=True,
                umask=0o077,
                # Like us they ignore SIGXFSZ, and so say that a file grew too large.
                restore_signals=False,
            )
        except OSError as error:
            raise BackupError(f"{name} cannot be run: {error}") from error
        mark = processes.find(child.pid)
        if mark is not None:
            with self._lock:
                self._children[mark] = child
                self._watch()
        return child

    def run(
        self,
        name: str,
        *arguments: str | Path,
        secret: Mapping[str, str] | None = None,
        on_line: Callable[[str], None] = lambda _: None,
        where: str | None = None,
    ) -> None:
        """Run a program to its end.

        Args:
            name: of the program.
            arguments: none of them a secret.
            secret: environment variables beside the usual ones.
            on_line: told what it says.
            where: the server concerned.

        Raises:
            EndpointUnavailableError: the server went away (retryable).
            BackupError: it failed; shows what it said last.
        """
        child = self.start(name, *arguments, secret=secret, log=subprocess.PIPE)  # type: ignore[arg-type]
        tail: deque[str] = deque(maxlen=_TAIL)
        assert child.stderr is not None
        try:
            with child.stderr as lines:
                for line in lines:
                    if line.strip():
                        tail.append(line.strip())
                        on_line(line)
            code = child.wait()
        except BaseException:
            self.end(child)
            raise
        self._forget(child)
        if code != 0:
            raise failure(name, "\n".join(tail), where)

    def end(self, child: subprocess.Popen[str]) -> int:
        """Ask a program to end in good order, make it after some seconds; returns its code."""
        if child.poll() is None:
            child.send_signal(signal.SIGINT)
            try:
                child.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        self._forget(child)
        return int(child.returncode)

    def end_all(self) -> None:
        """End every program that still runs."""
        for child in list(self._children.values()):
            self.end(child)

    def _forget(self, child: subprocess.Popen[str]) -> None:
        with self._lock:
            for mark, known in list(self._children.items()):
                if known is child:
                    del self._children[mark]
                    self._watch()

    def _watch(self) -> None:
        if self._warden is None:
            self._warden = Warden()
        self._warden.watch(dict.fromkeys(self._children, signal.SIGINT))


def failure(name: str, said: str, where: str | None) -> ShardkitError:
    """Return the error that tells why a program failed."""
    lines = said.splitlines() or ["it said nothing"]
    last = lines[-1]
    if full := [line for line in lines if _FULL.search(line)]:
        return BackupError(
            f"{name}: {full[0]}", hint="make room, or name another folder; nothing is left behind"
        )
    if _AWAY.search(said):
        return EndpointUnavailableError(
            f"{name}: {last}", endpoint=where, hint="nothing is left behind; run it again"
        )
    return BackupError(f"{name} failed: {said or last}", endpoint=where)
