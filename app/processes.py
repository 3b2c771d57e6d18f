"""Keeps a process running beside this one: begun again when it ends, ended with this one.

The child reads its standard input, and ends when that does, so it goes also when this process is
killed. Called by `app.run`.
"""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Sequence
from typing import Self

__all__ = ["KeptProcess"]

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before a process that ended is begun again; each time twice as long."""

STOP_TIMEOUT = 10.0
"""Seconds to end by itself, before it is killed."""


class KeptProcess:
    """A process that runs for the time of a `with` block.

    Args:
        command: what to run.
        said: told when it has ended by itself and begins again, with its exit code.
    """

    def __init__(self, command: Sequence[str], said: Callable[[int], None]) -> None:
        self._command = command
        self._said = said
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="kept process", daemon=True)
        self._process = self._start()

    @property
    def pid(self) -> int:
        """The process of now."""
        return self._process.pid

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self._command, stdin=subprocess.PIPE)  # noqa: S603 - our own

    def _keep(self) -> None:
        pause = FIRST_PAUSE
        while not self._stopping.is_set():
            try:
                code = self._process.wait(0.2)
            except subprocess.TimeoutExpired:
                continue
            if not self._stopping.is_set():
                self._said(code)
            if self._stopping.wait(pause):
                break
            pause = min(2 * pause, LONGEST_PAUSE)
            self._process = self._start()
        self._end()

    def _end(self) -> None:
        process = self._process
        if process.stdin is not None:
            process.stdin.close()
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
