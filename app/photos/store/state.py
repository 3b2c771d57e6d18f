"""What a process knows of one incarnation of a volume, and the mark of what is deleted in it.

Called by volumes and compaction.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from app.photos.store.needle import DELETED, FLAGS_AT, UNIT, Superblock
from app.photos.store.needlemap import Entry, NeedleMap
from app.photos.store.volumefile import VolumeFile

__all__ = ["State", "mark"]


@dataclass(slots=True)
class State:
    """What is known of one incarnation of a volume; replaced whole by a compaction.

    Attributes:
        file: the open file.
        super: its superblock.
        map: its uploads.
        end: length that the map covers, in bytes.
        checkpointed: length that the index covers, in bytes.
        journal_end: length of the journal that the map covers, in bytes.
        dead_bytes: taken by deleted needles, as far as the journal knows.
        unindexed: uploads that the index does not have.
    """

    file: VolumeFile
    super: Superblock
    map: NeedleMap
    end: int
    checkpointed: int
    journal_end: int = 0
    dead_bytes: int = 0
    unindexed: list[Entry] = field(default_factory=list)


def mark(file: VolumeFile, entry: Entry) -> None:
    """Set the flag of every needle of an upload, and flush; the caller holds the journal's lock."""
    position = entry.offset
    for units in entry.lengths:
        if units:
            os.pwrite(file.descriptor, bytes((DELETED,)), position * UNIT + FLAGS_AT)
        position += units
    os.fdatasync(file.descriptor)
