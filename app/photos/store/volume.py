"""One volume: a file of needles, its index and its journal of deletes.

    00000007.volume   needles, append-only but for the flags of deleted ones
    00000007.index    what the map was at some length
    00000007.deletes  the journal, and the lock of those who delete
    00000007.claim    the lock of the one process that appends or compacts

Any number of processes read and delete. Reading looks at the file's inode first, since a
compaction puts another file in its place, and a key that is not in the map is looked for behind
what the map covers, since another process may have appended it. Blocking; called by
`VolumeStore` in threads, and by the operator's tools.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final
from zlib import crc32

from app.photos.store.indexfile import append_block, read_blocks
from app.photos.store.journal import Deleted, Journal
from app.photos.store.needle import (
    DATA_AT,
    DELETED,
    HEADER_BYTES,
    LIVE,
    SEALED_AT,
    UNIT,
    UNWRITTEN_AT,
    Address,
    Header,
    Superblock,
    data_of,
    variant_of,
)
from app.photos.store.needlemap import Entry, NeedleMap, table_of
from app.photos.store.protocol import DamagedBlobError
from app.photos.store.scan import entries_of, good_end, needles
from app.photos.store.state import State, mark
from app.photos.store.volumefile import (
    Claim,
    VolumeFile,
    sync_folder,
    volume_path,
    write_at,
    write_flushed,
)

__all__ = ["Volume", "keys_of"]

log = logging.getLogger("app")

CHECKPOINT_BYTES: Final = 64 * 1024 * 1024
"""Bytes appended between two blocks of the index; as many are read at most after a crash."""

MAX_BUFFERS: Final = 512
"""Buffers of one write; the kernel takes 1,024."""


class Volume:
    """One volume, opened.

    *Invariant:* what `append` has returned from is flushed; nothing in front of `end` is ever
    written again but flags.

    Args:
        root: the folder.
        number: of the volume.
        claim: the right to append, or None for a reader.

    Raises:
        FileNotFoundError: there is no such volume.
        DamagedBlobError: both superblocks and the index are lost, and so is the seed.
    """

    def __init__(self, root: Path, number: int, claim: Claim | None = None) -> None:
        self.root = root
        self.number = number
        self.claim = claim
        self.path = volume_path(root, number)
        self.index_path = self.path.with_suffix(".index")
        self.journal = Journal(self.path.with_suffix(".deletes"))
        self.has_failed = False
        self._lock = threading.RLock()
        self.state = self._load()

    @classmethod
    def create(cls, root: Path, number: int, alternates: tuple[int, ...], claim: Claim) -> Volume:
        """Make an empty volume, which survives a crash from here on."""
        superblock = Superblock(number, secrets.token_bytes(16), alternates)
        path = volume_path(root, number)
        draft = path.with_suffix(".draft")
        write_flushed(draft, superblock.encode())
        draft.rename(path)
        sync_folder(root)
        return cls(root, number, claim)

    @property
    def is_sealed(self) -> bool:
        """Whether nothing is appended any more."""
        return self.state.file.head[SEALED_AT] != 0

    def refresh(self) -> None:
        """Take note of what other processes have done: appended, deleted, compacted."""
        if not self.state.file.is_current(self.path):
            with self._lock:
                self.state = self._load()
        with self._lock:
            state = self.state
            if not self._is_complete(state):
                self._read_tail(state, is_owner=False)
            deleted, state.journal_end = self.journal.read(state.journal_end)
            self._forget(state, deleted)

    def find(self, key: int, *, wait: bool = True) -> tuple[State, Entry] | None:
        """Return where an upload is, if it is.

        Raises:
            BlockingIOError: that has to be read from the disk, and `wait` is False.
        """
        state = self.state
        is_current = state.file.is_current(self.path)
        entry = state.map.find(key) if is_current else None
        if entry is None and not (is_current and self._is_complete(state)):
            if not wait:
                raise BlockingIOError
            self.refresh()
            state = self.state
            entry = state.map.find(key)
        return None if entry is None else (state, entry)

    def _is_complete(self, state: State) -> bool:
        """Tell whether the map has everything that the file has."""
        return self.claim is not None or state.file.n_bytes <= state.end

    def read(self, address: Address, alternate: int, *, wait: bool = True) -> bytes | None:
        """Return the data of one variant, or None when it is not there.

        Args:
            address: of the picture.
            alternate: which variant.
            wait: False raises instead of waiting for the disk.

        Raises:
            BlockingIOError: the bytes are not in memory, and `wait` is False.
            DamagedBlobError: the needle is not what was written.
        """
        found = self.find(address.key, wait=wait)
        if found is None or alternate not in found[0].super.alternates:
            return None
        state, entry = found
        offset, units = entry.at(state.super.alternates.index(alternate))
        if not units:
            return None
        n = units * UNIT
        needle: bytes | bytearray
        if wait:
            needle = os.pread(state.file.descriptor, n, offset * UNIT)
        else:
            needle = state.file.read_cached(n, offset * UNIT)
        return self._checked(state, needle, address, alternate)

    def append(self, uploads: Sequence[tuple[bytes, Entry]]) -> None:
        """Append uploads in one write, flush it, and only then add them to the map.

        Args:
            uploads: needles, and their entry with an offset from the end of the volume.

        Raises:
            OSError: nothing was appended; after a failed flush the volume takes nothing more.
        """
        with self._lock:
            state = self.state
            position = state.end
            descriptor = state.file.descriptor
            try:
                for at in range(0, len(uploads), MAX_BUFFERS):
                    buffers = [needles for needles, _ in uploads[at : at + MAX_BUFFERS]]
                    position = write_at(descriptor, buffers, position)
                os.fdatasync(descriptor)
            except OSError:
                self._give_up(descriptor, state.end)
                raise
            first = state.end // UNIT
            for _, entry in uploads:
                placed = Entry(entry.key, first + entry.offset, entry.lengths)
                state.map.add(placed)
                state.unindexed.append(placed)
            state.end = position
            if state.end - state.checkpointed >= CHECKPOINT_BYTES:
                self.checkpoint()

    def _give_up(self, descriptor: int, end: int) -> None:
        """Append nothing more after a failed write or flush.

        What the kernel could not flush it forgets, so a second flush proves nothing; and readers
        may have seen what is cut off here, so nothing else may ever stand in its place.
        """
        self.has_failed = True
        with contextlib.suppress(OSError):
            os.pwrite(descriptor, b"\1", SEALED_AT)
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, end)

    def delete(self, address: Address) -> bool:
        """Delete an upload in the journal and in the volume; tell whether it was there."""
        with self.journal.locked():
            self.refresh()
            found = self.find(address.key)
            if found is None:
                return False
            state, entry = found
            if not self._is_of(state, entry, address):
                return False
            tag = crc32(state.super.incarnation)
            deleted = Deleted(address.key, address.cookie, entry.offset, entry.units, tag)
            try:
                self.journal.append(deleted)
            except OSError as error:  # a full disk must not keep anybody from deleting
                if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
                    raise
                state.map.remove(address.key)
                descriptor = state.file.descriptor
                n = int.from_bytes(os.pread(descriptor, 4, UNWRITTEN_AT), "little") + 1
                os.pwrite(descriptor, n.to_bytes(4, "little"), UNWRITTEN_AT)
            mark(state.file, entry)
            with self._lock:
                deleted_since, state.journal_end = self.journal.read(state.journal_end)
                self._forget(state, deleted_since)
            return True

    def checkpoint(self) -> None:
        """Write what the index lacks into it."""
        with self._lock:
            state = self.state
            if state.end == state.checkpointed:
                return
            table = table_of(state.unindexed, len(state.super.alternates))
            append_block(self.index_path, state.super.incarnation, state.end, table)
            state.checkpointed = state.end
            state.unindexed = []

    def seal(self) -> None:
        """Append nothing any more; other processes see it too."""
        with self._lock:
            self.checkpoint()
            descriptor = self.state.file.descriptor
            os.pwrite(descriptor, b"\1", SEALED_AT)
            os.fdatasync(descriptor)

    def release(self) -> None:
        """Give the claim up, with the index complete; reading goes on. Idempotent."""
        if self.claim is not None:
            with contextlib.suppress(OSError):  # an index is a convenience
                self.checkpoint()
            self.claim.release()
            self.claim = None

    def _load(self) -> State:
        """Open the file of now with what its index, its tail and its journal say."""
        file = VolumeFile(self.path)
        superblock = Superblock.parse(os.pread(file.descriptor, DATA_AT, 0))
        if superblock is None:
            raise DamagedBlobError(f"{self.path}: both superblocks are damaged")
        n_slots = len(superblock.alternates)
        state = State(file, superblock, NeedleMap(n_slots), DATA_AT, DATA_AT)
        tables = []
        for table, covered, _ in read_blocks(self.index_path, superblock.incarnation, n_slots):
            if covered > file.n_bytes:
                log.error("%s is shorter than its index says", self.path)
                break
            tables.append(table)
            state.end = state.checkpointed = covered
        if tables:
            state.map.extend(tables)
        self._read_tail(state, is_owner=self.claim is not None)
        if self.claim is None:
            deleted, state.journal_end = self.journal.read()
            self._forget(state, deleted)
        else:
            with self.journal.locked():
                deleted, state.journal_end = self.journal.read()
                for each in deleted[-1:]:  # the lock allows one that is written and not marked
                    entry = state.map.find(each.key)
                    if entry is not None and entry.offset == each.offset:
                        mark(state.file, entry)
                self._forget(state, deleted)
        return state

    def _read_tail(self, state: State, *, is_owner: bool) -> None:
        """Add what stands behind the map.

        The owner finds there what was being written when its predecessor ended: it checks the
        data and cuts the torn end off. A reader sees what the owner is writing and leaves what is
        not whole yet; data is checked when it is read.
        """
        descriptor, size = state.file.descriptor, state.file.n_bytes
        found = list(needles(descriptor, state.end, size, state.super.seed, verify=is_owner))
        end = good_end(found, state.end)
        whole = (each for each in found if each.end * UNIT <= end)
        for entry in entries_of(whole, state.super.alternates):
            if entry.offset:
                state.map.add(entry)
            else:
                state.map.remove(entry.key)
            state.unindexed.append(entry)
        state.end = end
        if is_owner and size != end:
            log.warning("%s: %d torn bytes cut off", self.path, size - end)
            os.ftruncate(descriptor, end)
            os.fdatasync(descriptor)

    def _forget(self, state: State, deleted: Iterable[Deleted]) -> None:
        """Remove what the journal says was deleted from the map."""
        for each in deleted:
            if each.incarnation != crc32(state.super.incarnation):
                continue
            state.dead_bytes += each.units * UNIT
            entry = state.map.find(each.key)
            if entry is not None and entry.offset <= each.offset:
                state.map.remove(each.key)

    def _is_of(self, state: State, entry: Entry, address: Address) -> bool:
        """Tell whether an upload has the cookie of an address; one that is all damaged has any."""
        position = entry.offset
        for units in entry.lengths:
            head = os.pread(state.file.descriptor, HEADER_BYTES, position * UNIT) if units else b""
            header = Header.parse(head, state.super.seed)
            if header is not None:
                return header.cookie == address.cookie and header.key == address.key
            position += units
        return True

    def _checked(
        self, state: State, needle: bytes | bytearray, address: Address, alternate: int
    ) -> bytes | None:
        """Return the data of a needle as it was read, or None when it is another's or deleted."""
        header = Header.parse(needle, state.super.seed)
        if header is not None:
            if header.cookie != address.cookie or header.flags == DELETED:
                return None
            data = data_of(header, needle)
            is_right = (header.key, header.alternate) == (address.key, alternate)
            if data is not None and is_right and header.flags == LIVE:
                return bytes(data)
        variant = variant_of(alternate)
        raise DamagedBlobError(f"{self.path}: {variant} of {address} is damaged on disk")


def keys_of(volume: Volume) -> list[str]:
    """Return the blob keys of what a volume has; one short read for each, for the cookie."""
    state = volume.state
    keys = []
    for entry in state.map.entries():
        for slot, units in enumerate(entry.lengths):
            if not units:
                continue
            offset, _ = entry.at(slot)
            head = os.pread(state.file.descriptor, HEADER_BYTES, offset * UNIT)
            header = Header.parse(head, state.super.seed)
            if header is not None and header.flags == LIVE and header.key == entry.key:
                keys.append(str(Address(volume.number, entry.key, header.cookie)))
                break
    return keys
