"""A volume as a file of the operating system: its name, its descriptor, the claim on it.

Called by volumes; knows nothing of needles.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

from app.photos.store.needle import DATA_AT, REPLACED_AT

__all__ = [
    "Claim",
    "VolumeFile",
    "make_folder",
    "numbers_in",
    "sync_folder",
    "volume_path",
    "write_at",
    "write_flushed",
]


def volume_path(root: Path, number: int) -> Path:
    """Return the file of a volume."""
    return root / f"{number:08x}.volume"


def numbers_in(root: Path) -> list[int]:
    """Return the volumes of a folder, ascending."""
    return sorted(int(path.stem, 16) for path in root.glob("????????.volume"))


class VolumeFile:
    """An open file that is closed when nobody reads it any more.

    Args:
        path: the volume.

    Attributes:
        descriptor: for reading and writing.
        inode: number of the file, whatever its name is now.
        head: its first bytes, as they are in this moment.
    """

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        # Reading ahead would fetch neighbours that nobody asked for; the advice is per open file.
        os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        self.inode = os.fstat(self.descriptor).st_ino
        # What is looked at with every read costs no system call.
        self.head = mmap.mmap(self.descriptor, DATA_AT, mmap.MAP_SHARED, mmap.PROT_READ)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)

    def is_current(self, path: Path) -> bool:
        """Tell whether this is the file of that name, or a compaction has put another there."""
        return not self.head[REPLACED_AT] or path.stat().st_ino == self.inode

    def read_cached(self, n: int, position: int) -> bytearray:
        """Return bytes that are in the operating system's memory.

        Raises:
            BlockingIOError: not all of them are, or the file system cannot tell.
        """
        buffer = bytearray(n)
        try:
            n_read = os.preadv(self.descriptor, [buffer], position, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            n_read = 0
        if n_read < n:
            raise BlockingIOError
        return buffer

    @property
    def n_bytes(self) -> int:
        """Length of the file of now."""
        return os.fstat(self.descriptor).st_size


class Claim:
    """The right to append to a volume or to compact it; ends with the process.

    Args:
        descriptor: of the locked file.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    @classmethod
    def take(cls, root: Path, number: int) -> Claim | None:
        """Return the claim, or None when another has it."""
        path = root / f"{number:08x}.claim"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return None
        return cls(descriptor)

    def release(self) -> None:
        """Give it up; idempotent."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def write_at(descriptor: int, buffers: Sequence[bytes], position: int) -> int:
    """Write buffers one behind the other and return where they end; short writes are continued."""
    total = sum(map(len, buffers))
    written = os.pwritev(descriptor, buffers, position)
    if written < total:
        rest = b"".join(buffers)[written:]
        while rest:
            n = os.pwrite(descriptor, rest, position + written)
            rest, written = rest[n:], written + n
    return position + total


def write_flushed(path: Path, data: bytes) -> None:
    """Write a whole file and flush it; its name is flushed with the folder."""
    with open(path, "wb", opener=_private) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder: those made, changed or removed survive a crash."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents so that they survive a crash."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o640)
