"""Gives the bytes of deleted needles back, and checks those that are there; beside the service.

Compaction copies what lives into a new file, then takes the lock of the volume's deletes, repeats
those that came meanwhile, and puts the new file in the old one's place. Killed at any point it
leaves the old volume or the new one: an index or a journal of the other is known by its
incarnation. Blocking; called by `python -m app.photos`.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from app.photos.store.indexfile import append_block
from app.photos.store.needle import (
    DATA_AT,
    DELETED,
    REPLACED_AT,
    SEALED_AT,
    UNIT,
    UNWRITTEN_AT,
    Header,
    Superblock,
    data_of,
    variant_of,
)
from app.photos.store.needlemap import Entry, table_of
from app.photos.store.scan import needles
from app.photos.store.state import State, mark
from app.photos.store.volume import Volume
from app.photos.store.volumefile import (
    Claim,
    VolumeFile,
    numbers_in,
    sync_folder,
    write_at,
    write_flushed,
)

__all__ = ["Compacted", "Scrubbed", "VolumeStats", "compact", "scrub", "stats"]

WRITE_BYTES: Final = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class VolumeStats:
    """One volume in figures.

    Attributes:
        volume: its number.
        bytes: length of the file.
        dead_bytes: of it, what compaction gives back.
        uploads: pictures.
        images: their variants.
        map_bytes: memory of the map.
        is_sealed: whether nothing is appended any more.
        is_claimed: whether a process appends to it or compacts it now.
    """

    volume: int
    bytes: int
    dead_bytes: int
    uploads: int
    images: int
    map_bytes: int
    is_sealed: bool
    is_claimed: bool


@dataclass(slots=True)
class Scrubbed:
    """What a scrub found in one volume.

    Attributes:
        volume: its number.
        needles: good ones, deleted ones included.
        damaged: keys and variants of pictures that are there and cannot be read, as text.
        lost_bytes: in no good needle.
    """

    volume: int
    needles: int = 0
    damaged: list[str] = field(default_factory=list)
    lost_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Compacted:
    """What a compaction did to one volume: its length before and after, in bytes."""

    volume: int
    before: int
    after: int


def stats(root: Path) -> list[VolumeStats]:
    """Return every volume in figures."""
    found = []
    for number in numbers_in(root):
        claim = Claim.take(root, number)
        if claim is not None:
            claim.release()
        volume = Volume(root, number)
        entries = list(volume.state.map.entries())
        live = sum(entry.units for entry in entries) * UNIT
        found.append(
            VolumeStats(
                volume=number,
                bytes=volume.state.end,
                dead_bytes=volume.state.end - DATA_AT - live,
                uploads=len(entries),
                images=sum(units > 0 for entry in entries for units in entry.lengths),
                map_bytes=volume.state.map.n_bytes,
                is_sealed=volume.is_sealed,
                is_claimed=claim is None,
            )
        )
    return found


def scrub(root: Path, number: int) -> Scrubbed:
    """Read a volume whole and check every needle; what is appended meanwhile is left out."""
    volume = Volume(root, number)
    state = volume.state
    descriptor, seed = state.file.descriptor, state.super.seed
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    good: set[int] = set()
    n_units = 0
    for found in needles(descriptor, DATA_AT, state.end, seed, verify=True):
        if not found.is_good:
            continue
        good.add(found.offset)
        n_units += found.header.units
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # leave the cache to the readers
    result = Scrubbed(number, len(good), [], state.end - DATA_AT - n_units * UNIT)
    for entry in state.map.entries():
        for slot, alternate in enumerate(state.super.alternates):
            offset, units = entry.at(slot)
            if units and offset not in good:
                result.damaged.append(f"{number:08x}{entry.key:016x} {variant_of(alternate)}")
    return result


def compact(root: Path, number: int) -> Compacted | None:
    """Copy what lives in a volume to a new one and put that in its place.

    Returns:
        What was done, or None when another process appends to it; it is sealed then, so that the
        process takes another volume at its next write and a later call succeeds.

    Raises:
        OSError: it could not be copied; the volume is what it was.
    """
    claim = Claim.take(root, number)
    if claim is None:
        Volume(root, number).seal()
        return None
    try:
        volume = Volume(root, number, claim)
        old = volume.state
        superblock = Superblock(
            number, old.super.incarnation[:4] + secrets.token_bytes(12), old.super.alternates
        )
        draft = volume.path.with_suffix(".draft")
        draft_index = volume.path.with_suffix(".draft-index")
        draft_index.unlink(missing_ok=True)
        n_unwritten = _unwritten(old)
        head = bytearray(superblock.encode())
        head[SEALED_AT] = volume.is_sealed
        write_flushed(draft, bytes(head))
        copy = VolumeFile(draft)
        entries, end = _copy(old, copy)
        os.fsync(copy.descriptor)
        append_block(
            draft_index, superblock.incarnation, end, table_of(entries, len(superblock.alternates))
        )
        with volume.journal.locked():
            if _unwritten(old) != n_unwritten:
                raise OSError(errno.EAGAIN, "pictures were deleted while the disk was full; again")
            _repeat_deletes(volume, old, copy, {entry.key: entry for entry in entries})
            # First the mark: a reader that sees it looks which file has the name.
            os.pwrite(old.file.descriptor, b"\1", REPLACED_AT)
            draft.rename(volume.path)
            draft_index.rename(volume.index_path)
            sync_folder(root)
            volume.journal.clear()
        return Compacted(number, old.end, end)
    finally:
        claim.release()


def _unwritten(state: State) -> bytes:
    """Return the count of deletes that the journal does not have."""
    return os.pread(state.file.descriptor, 4, UNWRITTEN_AT)


def _copy(old: State, copy: VolumeFile) -> tuple[list[Entry], int]:
    """Copy good needles of what lives; return their entries and the length of the copy."""
    entries: list[Entry] = []
    waiting: list[bytes] = []
    position = end = DATA_AT
    for entry in old.map.entries():
        lengths = []
        group = []
        for needle, header in _good_needles(old, entry):
            lengths.append(0 if header is None else header.units)
            if header is not None:
                group.append(needle)
        if not group:
            continue
        entries.append(Entry(entry.key, end // UNIT, tuple(lengths)))
        waiting += group
        end += sum(map(len, group))
        if end - position >= WRITE_BYTES:
            position = write_at(copy.descriptor, waiting, position)
            waiting = []
    write_at(copy.descriptor, waiting, position)
    return entries, end


def _good_needles(state: State, entry: Entry) -> Iterator[tuple[bytes, Header | None]]:
    """Yield the needle of every slot, with its header if it lives and is what was written."""
    for slot in range(len(entry.lengths)):
        offset, units = entry.at(slot)
        needle = os.pread(state.file.descriptor, units * UNIT, offset * UNIT)
        header = Header.parse(needle, state.super.seed)
        is_good = (
            header is not None
            and header.key == entry.key
            and header.flags != DELETED
            and data_of(header, needle) is not None
        )
        yield needle, header if is_good else None


def _repeat_deletes(
    volume: Volume, old: State, copy: VolumeFile, entries: dict[int, Entry]
) -> None:
    """Mark in the copy what was deleted since the map of the old volume was read."""
    deleted, _ = volume.journal.read(old.journal_end)
    for each in deleted:
        entry = entries.get(each.key)
        if entry is not None:
            mark(copy, entry)
