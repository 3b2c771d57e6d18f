"""A blob store in plain files: one folder per picture, one file per size.

    root/ab/cd/abcd…/1080.jpg

A picture is written into a temporary folder beside its place, every file is fsynced, then the
folder is renamed and its parent fsynced: a reader sees all sizes or none, also after a crash.
The baseline backend; volumes that hold many pictures in one file come later.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from app.photos.store.protocol import is_blob_key

__all__ = ["FileBlobStore"]


class FileBlobStore:
    """Keeps pictures in files under one folder.

    Args:
        root: the folder; made when missing.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    async def put(self, key: str, sizes: Mapping[int, bytes]) -> None:
        """Store all sizes of one picture, or nothing; see `BlobStore.put`."""
        await asyncio.to_thread(self._put, key, sizes)

    async def get(self, key: str, size: int) -> bytes | None:
        """Return one size, or None when it is not there."""
        if not is_blob_key(key):
            return None
        return await asyncio.to_thread(_read, self._folder(key) / f"{size:d}.jpg")

    async def delete(self, key: str) -> None:
        """Remove all sizes; removing what is not there is no error."""
        if is_blob_key(key):
            await asyncio.to_thread(shutil.rmtree, self._folder(key), ignore_errors=True)

    def _folder(self, key: str) -> Path:
        return self.root / key[:2] / key[2:4] / key

    def _put(self, key: str, sizes: Mapping[int, bytes]) -> None:
        if not is_blob_key(key):
            raise ValueError(f"{key!r} is not a blob key")
        folder = self._folder(key)
        _make_folder(folder.parent)
        draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=folder.parent))
        try:
            for size, data in sizes.items():
                with (draft / f"{size:d}.jpg").open("xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            _sync_folder(draft)
            try:
                draft.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
                shutil.rmtree(draft, ignore_errors=True)
            _sync_folder(folder.parent)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _make_folder(folder: Path) -> None:
    """Make a folder and its parents so that they survive a crash."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
