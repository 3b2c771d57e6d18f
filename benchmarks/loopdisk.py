"""A disk of the benchmark's own: a file as a block device, formatted and mounted.

The kernel counts its reads apart from all others, and unmounting drops what is cached of it,
directories and inodes too. Needs root and loop devices, and says so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

__all__ = ["Counts", "LoopDisk"]

SECTOR_BYTES: Final = 512
"""The kernel counts in these, whatever the disk has."""


class Counts(NamedTuple):
    """What a disk has read.

    Attributes:
        reads: requests completed.
        n_bytes: bytes of them.
    """

    reads: int
    n_bytes: int


class LoopDisk:
    """A mounted disk.

    Attributes:
        folder: where it is mounted.
        device: its name, such as `loop3`.
    """

    def __init__(self, folder: Path, device: str) -> None:
        self.folder = folder
        self.device = device

    @classmethod
    @contextmanager
    def made(cls, gigabytes: int) -> Iterator[LoopDisk]:
        """Have a disk for the time of a `with` block."""
        if os.geteuid() or not shutil.which("losetup") or not Path("/dev/loop-control").exists():
            sys.exit("this benchmark makes a disk of its own: it needs root and loop devices")
        with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="photos-") as text:
            image, folder = Path(text) / "disk", Path(text) / "mounted"
            folder.mkdir()
            image.touch()
            os.truncate(image, gigabytes << 30)
            device = _run("losetup", "--direct-io=on", "--find", "--show", image).strip()
            try:
                _run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", device)
                _run("mount", "-o", "relatime", device, folder)
                try:
                    yield cls(folder, Path(device).name)
                except BaseException:
                    _run("umount", "--lazy", folder)  # whatever is open on it, it goes
                    raise
                _run("umount", folder)
            finally:
                subprocess.run(["losetup", "--detach", device], check=False, capture_output=True)

    def forget(self) -> None:
        """Drop everything that is cached of the disk; nothing may be open on it."""
        _run("umount", self.folder)
        _run("mount", "-o", "relatime", f"/dev/{self.device}", self.folder)

    def counts(self) -> Counts:
        """Return what the disk has read so far; fields 4 and 6 of /proc/diskstats."""
        for line in Path("/proc/diskstats").read_text("ascii").splitlines():
            fields = line.split()
            if fields[2] == self.device:
                return Counts(int(fields[3]), int(fields[5]) * SECTOR_BYTES)
        raise OSError(f"{self.device} is not in /proc/diskstats")


def _run(*command: str | Path) -> str:
    done = subprocess.run([*map(str, command)], check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
    return done.stdout
