"""A blob store in plain files: one folder per picture, one file per variant.

    root/ab/cd/abcd…/1080.jpg

A picture is written into a temporary folder beside its place, every file is fsynced, then the
folder is renamed and its parent fsynced: a reader sees all variants or none, also after a crash.
For trying things out, and the baseline of `python -m benchmarks photos`: a cold read takes the disk
some three reads, for the directories and the inode, where a needle takes one.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path

from app.photos.store.protocol import is_blob_key, is_name, is_variant
from app.photos.store.volumefile import make_folder, sync_folder

__all__ = ["FileBlobStore"]

PREFIX = "00000000"
"""Where the key of a needle names its volume."""


class FileBlobStore:
    """Keeps pictures in files under one folder.

    Args:
        root: the folder; made when missing.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    async def put(self, name: str, variants: Mapping[str, bytes]) -> str:
        """Store all variants of one picture, or nothing; see `BlobStore.put`."""
        if not is_name(name) or not all(map(is_variant, variants)) or not variants:
            raise ValueError(f"{name!r} with {list(variants)} cannot be stored")
        await asyncio.to_thread(self._put, PREFIX + name, variants)
        return PREFIX + name

    async def get(self, key: str, variant: str) -> bytes | None:
        """Return one variant, or None when it is not there."""
        if not is_blob_key(key) or not is_variant(variant):
            return None
        return await asyncio.to_thread(_read, self._folder(key) / variant)

    async def delete(self, key: str) -> None:
        """Remove all variants; removing what is not there is no error."""
        if is_blob_key(key):
            await asyncio.to_thread(shutil.rmtree, self._folder(key), ignore_errors=True)

    async def iterate_keys(self) -> AsyncIterator[str]:
        """Iterate over the keys of everything stored."""
        for key in await asyncio.to_thread(lambda: list(self._keys())):
            yield key

    async def close(self) -> None:
        """Nothing is open."""

    def _keys(self) -> Iterator[str]:
        return (path.name for path in self.root.glob("??/??/*") if is_blob_key(path.name))

    def _folder(self, key: str) -> Path:
        return self.root / key[-2:] / key[-4:-2] / key  # a cookie's digits: random

    def _put(self, key: str, variants: Mapping[str, bytes]) -> None:
        folder = self._folder(key)
        make_folder(folder.parent)
        draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=folder.parent))
        try:
            for variant, data in variants.items():
                with (draft / variant).open("xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            sync_folder(draft)
            try:
                draft.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
                shutil.rmtree(draft, ignore_errors=True)
            sync_folder(folder.parent)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
