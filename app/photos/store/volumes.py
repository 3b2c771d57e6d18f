"""The blob store in needle volumes: many pictures in few files, one read for each picture.

A process appends to one volume at a time, which it claims; uploads that arrive while a flush is
under way go into the next one together (group commit). It reads and deletes in all of them, also
in those that other processes write. Runs on an event loop; what waits for the disk is in threads.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Final

from app.photos.store.needle import (
    DATA_AT,
    MAX_DATA_BYTES,
    MAX_VOLUME_BYTES,
    SEALED_AT,
    UNIT,
    Address,
    Superblock,
    alternate_of,
    encode_upload,
)
from app.photos.store.needlemap import Entry
from app.photos.store.protocol import is_blob_key, is_name, is_variant
from app.photos.store.volume import Volume, keys_of
from app.photos.store.volumefile import Claim, make_folder, numbers_in, volume_path

__all__ = ["VolumeBlobStore"]

VOLUME_BYTES: Final = 8 * 1024**3
GROUP_BYTES: Final = 32 * 1024 * 1024
"""Bytes of one group, so that those who wait for it do not wait for long."""


class _Waiting:
    """An upload on its way into a volume."""

    __slots__ = ("cookie", "done", "key", "n_bytes", "variants")

    def __init__(self, name: str, variants: list[bytes | None], n_bytes: int) -> None:
        self.key = int(name[:16], 16)
        self.cookie = int(name[16:], 16)
        self.variants = variants
        self.n_bytes = n_bytes
        self.done: asyncio.Future[int] = asyncio.get_running_loop().create_future()


class VolumeBlobStore:
    """Pictures in volumes under one folder.

    *Invariant:* `put` returns after the flush that covers its needles.

    Args:
        root: the folder; made when missing.
        variants: what an upload may have, in the order in which it is stored.
        volume_bytes: length at which a volume is sealed; at most 128 GiB.
        group_uploads: uploads of one flush at most; 1 flushes each by itself.

    Attributes:
        n_flushes: groups that were written so far.
    """

    def __init__(
        self,
        root: Path,
        variants: tuple[str, ...],
        *,
        volume_bytes: int = VOLUME_BYTES,
        group_uploads: int = 1024,
    ) -> None:
        self.root = root
        self._slots = {variant: alternate_of(variant) for variant in variants}
        self.alternates = tuple(self._slots.values())
        self.volume_bytes = min(volume_bytes, MAX_VOLUME_BYTES)
        self.group_uploads = group_uploads
        self.n_flushes = 0
        self._volumes: dict[int, Volume] = {}
        self._active: Volume | None = None
        self._waiting: list[_Waiting] = []
        self._writer: asyncio.Task[None] | None = None
        self._opening = asyncio.Lock()

    async def put(self, name: str, variants: Mapping[str, bytes]) -> str:
        """Store all variants of one picture, or nothing; see `BlobStore.put`."""
        if not is_name(name) or not variants:
            raise ValueError(f"{name!r} with {list(variants)} cannot be stored")
        if not variants.keys() <= self._slots.keys():
            raise ValueError(f"{list(variants)} cannot be stored: volumes have {[*self._slots]}")
        lengths = [*map(len, variants.values())]
        if (largest := max(lengths)) > MAX_DATA_BYTES:
            raise ValueError(f"a variant of {largest} bytes is larger than {MAX_DATA_BYTES}")
        waiting = _Waiting(name, [*map(variants.get, self._slots)], sum(lengths))
        self._waiting.append(waiting)
        if self._writer is None:
            self._writer = asyncio.create_task(self._write())
        return f"{await waiting.done:08x}{name}"

    async def get(self, key: str, variant: str) -> bytes | None:
        """Return one variant, or None when it is not there; see `BlobStore.get`."""
        if not is_blob_key(key) or not is_variant(variant):
            return None
        address, alternate = Address.parse(key), alternate_of(variant)
        volume = self._volumes.get(address.volume)
        if volume is None:
            volume = await self._opened(address.volume)
            if volume is None:
                return None
        try:
            return volume.read(address, alternate, wait=False)
        except BlockingIOError:
            return await asyncio.to_thread(volume.read, address, alternate)

    async def delete(self, key: str) -> None:
        """Remove all variants; see `BlobStore.delete`."""
        if not is_blob_key(key):
            return
        address = Address.parse(key)
        volume = await self._opened(address.volume)
        if volume is not None:
            await asyncio.to_thread(volume.delete, address)

    async def iterate_keys(self) -> AsyncIterator[str]:
        """Iterate over the keys of everything stored, in the order of each volume."""
        for number in await asyncio.to_thread(numbers_in, self.root):
            volume = await self._opened(number)
            if volume is not None:
                for key in await asyncio.to_thread(keys_of, volume):
                    yield key

    async def close(self) -> None:
        """Finish what is being written and give the volume up; idempotent."""
        while self._writer is not None:
            await self._writer
        if self._active is not None:
            await asyncio.to_thread(self._active.release)
            self._active = None
        self._volumes = {}

    async def _opened(self, number: int) -> Volume | None:
        """Return a volume, opened for reading if it is not open, or None when there is none."""
        async with self._opening:
            volume = self._volumes.get(number)
            if volume is None and volume_path(self.root, number).exists():
                volume = await asyncio.to_thread(Volume, self.root, number)
                self._volumes[number] = volume
            return volume

    async def _write(self) -> None:
        """Write what waits, group after group, until nothing does."""
        try:
            while self._waiting:
                group, n_bytes = 0, 0
                while group < min(len(self._waiting), self.group_uploads) and n_bytes < GROUP_BYTES:
                    n_bytes += self._waiting[group].n_bytes
                    group += 1
                waiting, self._waiting = self._waiting[:group], self._waiting[group:]
                try:
                    number = await asyncio.to_thread(self._append, waiting)
                except Exception as error:  # noqa: BLE001 - everybody who waits is told
                    _tell(waiting, error)
                else:
                    _tell(waiting, number)
        finally:
            self._writer = None

    def _append(self, group: list[_Waiting]) -> int:
        """Append a group to the volume of this process and return its number."""
        volume = self._writable()
        seed = volume.state.super.seed
        uploads: list[tuple[bytes, Entry]] = []
        offset = 0
        for each in group:
            there = [
                (alternate, data)
                for alternate, data in zip(self.alternates, each.variants, strict=True)
                if data is not None
            ]
            needles, units = encode_upload(each.key, each.cookie, there, seed)
            if len(there) < len(self.alternates):
                by_slot = iter(units)
                units = [0 if data is None else next(by_slot) for data in each.variants]
            uploads.append((needles, Entry(each.key, offset, tuple(units))))
            offset += len(needles) // UNIT
        volume.append(uploads)
        self.n_flushes += 1
        return volume.number

    def _writable(self) -> Volume:
        """Return the volume to append to: the one it has, one that is free, or a new one."""
        active = self._active
        if active is not None:
            if not active.has_failed and not active.is_sealed:
                if active.state.end < self.volume_bytes:
                    return active
                active.seal()
            active.release()
            self._active = None
        make_folder(self.root)
        numbers = numbers_in(self.root)
        for number in numbers:
            volume = self._claimed(number)
            if volume is not None:
                return self._activate(volume)
        number = max(numbers, default=0)
        while True:
            number += 1
            claim = Claim.take(self.root, number)
            if claim is not None and not volume_path(self.root, number).exists():
                return self._activate(Volume.create(self.root, number, self.alternates, claim))
            if claim is not None:
                claim.release()

    def _claimed(self, number: int) -> Volume | None:
        """Return a volume that can be appended to and that nobody appends to, or None."""
        if not self._is_free(volume_path(self.root, number)):
            return None
        claim = Claim.take(self.root, number)
        if claim is None:
            return None
        try:
            return Volume(self.root, number, claim)
        except Exception:
            claim.release()
            raise

    def _is_free(self, path: Path) -> bool:
        """Tell by its first bytes that a volume is neither sealed, full nor of other variants."""
        with path.open("rb") as file:
            head = file.read(DATA_AT)
        found = Superblock.parse(head)
        return (
            found is not None
            and head[SEALED_AT] == 0
            and found.alternates == self.alternates
            and path.stat().st_size < self.volume_bytes
        )

    def _activate(self, volume: Volume) -> Volume:
        self._active = self._volumes[volume.number] = volume
        return volume


def _tell(group: list[_Waiting], result: int | Exception) -> None:
    """End the waiting of those who still wait."""
    for each in group:
        if each.done.done():
            continue
        if isinstance(result, Exception):
            each.done.set_exception(result)
        else:
            each.done.set_result(result)
