"""The deletes of one volume: a small file of records, each flushed before the needles are marked.

So a delete survives the loss of the index, and of the mark. The file is also the lock between the
processes that delete from a volume and the one that replaces it, in compaction. A record:

    offset  size  field
    0       4     magic "del1"
    4       4     cookie
    8       8     key
    16      4     offset of its needles, in units: what was put again behind them is not meant
    20      4     units that the needles take
    24      4     CRC-32 of the volume's incarnation: after a compaction it is another volume
    28      4     CRC-32 of bytes 0-27

Called by volumes.
"""

from __future__ import annotations

import fcntl
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from zlib import crc32

__all__ = ["Deleted", "Journal"]

_RECORD: Final = struct.Struct("<4sIQIII")
_MAGIC: Final = b"del1"
_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class Deleted:
    """One delete: of which picture, where it was, and how many units it took."""

    key: int
    cookie: int
    offset: int
    units: int
    incarnation: int

    def encode(self) -> bytes:
        """Return the bytes."""
        body = _RECORD.pack(
            _MAGIC, self.cookie, self.key, self.offset, self.units, self.incarnation
        )
        return body + crc32(body).to_bytes(4, "little")

    @classmethod
    def parse(cls, data: bytes) -> Deleted | None:
        """Return what a record says, or None when it is damaged."""
        if crc32(data[:28]) != int.from_bytes(data[28:32], "little"):
            return None
        magic, cookie, key, *where = _RECORD.unpack(data[:28])
        return cls(key, cookie, *where) if magic == _MAGIC else None


class Journal:
    """The journal of one volume.

    Args:
        path: the file; made when missing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()  # flock knows processes, not threads

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the volume's deletes, against threads and processes."""
        with self._lock:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                yield
            finally:
                os.close(descriptor)

    def read(self, start: int = 0) -> tuple[list[Deleted], int]:
        """Return the good records from a position on, and the position behind the last whole one.

        A record may be torn only where nobody was told that its delete had happened.
        """
        try:
            with self._path.open("rb") as file:
                file.seek(start)
                data = file.read()
        except FileNotFoundError:
            return [], 0
        n = len(data) // _BYTES
        records = (Deleted.parse(data[at * _BYTES : (at + 1) * _BYTES]) for at in range(n))
        return [each for each in records if each is not None], start + n * _BYTES

    def append(self, deleted: Deleted) -> None:
        """Add a record and flush it; the caller holds the lock."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        try:
            whole = os.fstat(descriptor).st_size // _BYTES * _BYTES
            os.ftruncate(descriptor, whole)
            os.pwrite(descriptor, deleted.encode(), whole)
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)

    def clear(self) -> None:
        """Forget all records; the caller holds the lock, and has replaced the volume."""
        os.truncate(self._path, 0)
