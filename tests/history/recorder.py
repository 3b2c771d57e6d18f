"""Writes what one client does, so that nothing of it is lost when the client is killed.

Each client of the history test has a recorder, and each recorder a file of its own: processes and
threads never wait for each other. A line is one write to the end of the file before the operation
is begun, and one after it, so whatever the database may have been told is in the file. Lines are
not synced: a killed process loses nothing that it has written, a crashed machine may.

    recorder = Recorder(folder, "client-3")
    n = recorder.invoke("append", [["append", "k1", 5], ["read", "k1"]], shard=42)
    recorder.ok(n, [[3, 5]])            # or recorder.fail(n, why=…), recorder.unknown(n, why=…)
    recorder.end()                      # nothing after this; what is pending then is a hang

Not thread-safe.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from tests.history.records import FORMAT

__all__ = ["HistoryFullError", "Recorder"]

_BOOT: Final = Path("/proc/sys/kernel/random/boot_id")
_ANSWERS: Final = 1 << 20
"""Bytes kept free for the answers to what has been begun."""


class HistoryFullError(Exception):
    """The file is as large as it may be: end the client, what it did so far can be judged."""


class Recorder:
    """The history of one client.

    Args:
        folder: of the history; made if missing.
        process: name of the client, unique in the history.
        limit_bytes: most bytes of the file; the last mebibyte of it is for answers only.
        now: monotonic time in nanoseconds, the same for all processes.
        clock: names that clock; None for this machine's since its last start.
        about: what else the first line says.

    Raises:
        FileExistsError: there is a client of that name.
        OSError: the disk is full; nothing more can be recorded.
    """

    def __init__(
        self,
        folder: Path,
        process: str,
        *,
        limit_bytes: int = 1 << 30,
        now: Callable[[], int] = time.monotonic_ns,
        clock: str | None = None,
        **about: Any,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{process}.jsonl"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        self._file = os.open(self.path, flags, 0o644)
        self._now = now
        self._limit = limit_bytes
        self._size = 0
        self._n = 0
        self._broken = False
        clock = clock or (_BOOT.read_text().strip() if _BOOT.exists() else "this machine")
        self._write({"history": FORMAT, "process": process, "clock": clock, **about})

    def invoke(self, kind: str, do: list[Any], **more: Any) -> int:
        """Write down what is about to be done; return its number.

        Raises:
            HistoryFullError: the file has reached its limit.
        """
        if self._size + _ANSWERS > self._limit:
            raise HistoryFullError(f"{self.path} has reached {self._limit:,} bytes")
        self._n += 1
        line = {"type": "invoke", "n": self._n, "at": self._now(), "kind": kind, "do": do, **more}
        self._write(line)
        return self._n

    def ok(self, n: int, got: Any = None, **more: Any) -> None:
        """Write down that an operation happened, and what it answered."""
        self._write({"type": "ok", "n": n, "at": self._now(), "got": got, **more})

    def fail(self, n: int, **more: Any) -> None:
        """Write down that an operation certainly did not happen and will not."""
        self._write({"type": "fail", "n": n, "at": self._now(), **more})

    def unknown(self, n: int, **more: Any) -> None:
        """Write down that nobody knows whether an operation happened."""
        self._write({"type": "info", "n": n, "at": self._now(), **more})

    def fact(self, fact: str, **more: Any) -> None:
        """Write down something that is no operation."""
        self._write({"type": "fact", "at": self._now(), "fact": fact, **more})

    def end(self) -> None:
        """Write down that the client is done, and close the file."""
        self._write({"type": "end", "at": self._now()})
        os.close(self._file)
        self._broken = True

    def _write(self, line: dict[str, Any]) -> None:
        if self._broken:
            raise OSError(f"{self.path} is closed, or its last line is torn")
        data = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        try:
            written = os.write(self._file, data)
        except OSError:
            self._broken = True
            raise
        self._size += written
        if written != len(data):  # what follows would make it a line in the middle
            self._broken = True
            raise OSError(f"{self.path}: no space for a line of {len(data)} bytes")
