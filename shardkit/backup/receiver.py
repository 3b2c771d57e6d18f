"""The log of one server, streamed into a folder by pg_receivewal.

It writes a file of log under another name until the file is whole and on disk, then renames it;
it never overwrites one. Called by `create`, for as long as a backup takes, and by `archive`.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Final

from sqlalchemy import URL

from shardkit.backup.tools import Tools, failure, login
from shardkit.clock import SYSTEM, Clock
from shardkit.errors import BackupError

__all__ = ["Receiver"]

_POLL: Final = 0.02
_PATIENCE: Final = 60.0


class Receiver:
    """A running pg_receivewal.

    Args:
        tools: which run it.
        url: of the primary, with a login that may replicate.
        folder: where files of log go; made if it is missing.
        where: the server, for errors.
        slot: a slot of the server that keeps log while this does not run; None for none.
        clock: what pauses.
    """

    def __init__(
        self,
        tools: Tools,
        url: URL,
        folder: Path,
        *,
        where: str,
        slot: str | None = None,
        clock: Clock = SYSTEM,
    ) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder = folder
        self._tools = tools
        self._where = where
        self._clock = clock
        self._log = folder.with_name(f".{folder.name}.log")
        conninfo, secret = login(url, application="shardkit backup")
        options = ["--slot", slot] if slot else []
        with self._log.open("w") as log:
            self._child: subprocess.Popen[str] = tools.start(
                "pg_receivewal",
                *("--directory", folder, "--no-loop", "--synchronous", "--no-password"),
                *("--status-interval", "1", "--dbname", conninfo, *options),
                secret=secret,
                log=log,
            )

    def check(self) -> None:
        """Make sure that it runs.

        Raises:
            EndpointUnavailableError: the server went away (retryable).
            BackupError: it ended for another reason.
        """
        if self._child.poll() is not None:
            said = self._log.read_text(encoding="utf-8", errors="replace").strip()
            raise failure("pg_receivewal", said, self._where)

    def wait_started(self) -> None:
        """Wait until what is written to the log from now on arrives."""
        self._wait(lambda: any(self.folder.glob("*.partial")), "the first byte of log")

    def wait_for(self, segment: str) -> None:
        """Wait until a file of log is whole."""
        self._wait((self.folder / segment).exists, f"the file of log {segment}")

    def end(self) -> None:
        """End it; files that are not whole stay."""
        self._tools.end(self._child)
        self._log.unlink(missing_ok=True)

    def _wait(self, fact: object, what: str) -> None:
        deadline = self._clock.monotonic() + _PATIENCE
        assert callable(fact)
        while not fact():
            self.check()
            if self._clock.monotonic() > deadline:
                raise BackupError(
                    f"{what} did not arrive within {_PATIENCE:g} seconds", endpoint=self._where
                )
            self._clock.sleep(_POLL)
