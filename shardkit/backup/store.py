"""The folder that backups are kept in: one at a time is made, whole or not at all.

    STORE/
      20261121T081500.123Z/   a backup (shardkit.backup.manifest)
      .new-…                  one that is being made, or was interrupted
      wal/PHYSICAL/           log without gaps, while `shardkit backup archive` runs
      labels/                 labels taken in it
      lock                    held by whoever changes something here

What is being made has another name until everything in it has reached the disk. Called by the
modules of `shardkit.backup`; knows nothing of servers.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shardkit.backup import manifest
from shardkit.errors import BackupError, ConfigurationError, RefusedError
from shardkit.ops.files import replace_file

__all__ = ["Damaged", "Store", "flush_folder"]

_NEW = ".new-"


@dataclass(frozen=True, slots=True)
class Damaged:
    """A backup that cannot be used.

    Attributes:
        name: of its folder.
        error: why.
    """

    name: str
    error: BackupError


@dataclass(frozen=True, slots=True)
class Store:
    """A folder of backups.

    Attributes:
        folder: where; need not exist yet.
    """

    folder: Path

    def backups(self) -> list[manifest.Manifest | Damaged]:
        """Return every finished backup, oldest first; possibly none."""
        found: list[manifest.Manifest | Damaged] = []
        for folder in sorted(self._finished()):
            try:
                found.append(manifest.read(folder))
            except BackupError as error:
                found.append(Damaged(folder.name, error))
        return found

    def path(self, name: str) -> Path:
        """Return the folder of a backup.

        Raises:
            ConfigurationError: the name is not one of a backup, or there is no such backup.
        """
        if not manifest.NAME.match(name) or not (self.folder / name).is_dir():
            names = ", ".join(sorted(folder.name for folder in self._finished())) or "none"
            raise ConfigurationError(
                f"{self.folder}: no backup {name!r}", hint=f"there are: {names}"
            )
        return self.folder / name

    def wal(self, physical: str) -> Path:
        """Return the folder of archived log of a physical shard."""
        return self.folder / "wal" / physical

    def labels(self) -> list[manifest.LabelFile]:
        """Return the labels in the archived log, oldest first; damaged ones are left out."""
        found = []
        for file in sorted((self.folder / "labels").glob("*.json")):
            with contextlib.suppress(BackupError):
                found.append(manifest.decode(file, manifest.LabelFile, file.stem))
        return found

    def keep_label(self, label: manifest.LabelFile) -> None:
        """Write a label, whole or not at all."""
        folder = self.folder / "labels"
        folder.mkdir(mode=0o700, exist_ok=True)
        replace_file(folder / f"{label.name}.json", manifest.encode(label), 0o600)
        flush_folder(folder)

    def newest(self, before: dt.datetime | None = None) -> manifest.Manifest:
        """Return the newest backup that can be used.

        Args:
            before: the label must not be later; None for any.

        Raises:
            BackupError: there is none.
        """
        for found in reversed(self.backups()):
            if isinstance(found, manifest.Manifest) and (
                before is None or found.label_at <= before
            ):
                return found
        raise BackupError(
            f"{self.folder}: holds no backup that can be used", hint="run shardkit backup create"
        )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep others from changing the folder; creates it.

        Raises:
            RefusedError: somebody does so now.
            BackupError: the folder cannot be written to.
        """
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
            descriptor = os.open(self.folder / "lock", flags, 0o600)
        except OSError as error:
            raise BackupError(f"{self.folder}: cannot be written to: {error.strerror}") from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RefusedError(
                    f"{self.folder}: another command is making or removing a backup",
                    hint="wait for it to end; nothing was changed",
                ) from error
            yield
        finally:
            os.close(descriptor)  # and so unlocks

    @contextlib.contextmanager
    def making(self, name: str) -> Iterator[Path]:
        """Lend an empty folder that becomes a backup at the end, or is gone.

        To be used while `locked`; what interrupted runs left behind is removed first.
        """
        for leftover in self.folder.glob(f"{_NEW}*"):
            shutil.rmtree(leftover)
        folder = self.folder / f"{_NEW}{name}"
        try:
            folder.mkdir(mode=0o700)
            yield folder
            for path in (*folder.iterdir(), folder):
                if path.is_dir():
                    flush_folder(path)
            folder.rename(self.folder / name)
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError):
                raise BackupError(
                    f"{folder.name}: {error.strerror}",
                    hint="make room, or name another folder; nothing is left behind",
                ) from error
            raise
        flush_folder(self.folder)

    def thin(self, keep: int) -> list[str]:
        """Remove the oldest usable backups; returns their names.

        Args:
            keep: how many stay, 1 or more. Damaged ones do not count and stay, for whoever looks
                into them.
        """
        usable = [b.name for b in self.backups() if isinstance(b, manifest.Manifest)]
        gone = usable[:-keep]
        for name in gone:
            # Renamed first: a removal that is interrupted leaves nothing that looks like one.
            doomed = self.folder / f"{_NEW}{name}"
            (self.folder / name).rename(doomed)
            shutil.rmtree(doomed)
        return gone

    def _finished(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return [p for p in self.folder.iterdir() if manifest.NAME.match(p.name) and p.is_dir()]


def flush_folder(path: Path) -> None:
    """Make the names in a folder survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
