"""Finds the needles of a volume by reading it: what is behind the index, or everything.

A header that is damaged ends nothing: the search goes on at the next header whose checksum is
right. Needles of one upload are gathered into an entry of the map; a damaged one among them keeps
its place, so that the others are where the sums say. Reads only. Called by volumes, the scrubber
and compaction.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from app.photos.store.needle import (
    DELETED,
    HEADER_BYTES,
    MAGIC,
    MAX_DATA_BYTES,
    UNIT,
    Header,
    data_of,
)
from app.photos.store.needlemap import Entry

__all__ = ["Found", "entries_of", "good_end", "needles"]

CHUNK: Final = 4 * 1024 * 1024
LONGEST: Final = MAX_DATA_BYTES + 2 * UNIT
MAX_LENGTH: Final = 0xFFFF


@dataclass(frozen=True, slots=True)
class Found:
    """A needle: where it begins, in units, and whether its data is what was written."""

    offset: int
    header: Header
    is_good: bool = True

    @property
    def end(self) -> int:
        """Where it ends, in units."""
        return self.offset + self.header.units


class _Window:
    """A part of a file, read ahead."""

    def __init__(self, descriptor: int, end: int) -> None:
        self._descriptor = descriptor
        self._end = end
        self._start = 0
        self._data = b""

    def at(self, position: int, n: int) -> memoryview:
        """Return up to `n` bytes at a position, fewer at the end."""
        n = min(n, self._end - position)
        if not self._start <= position <= self._start + len(self._data) - n:
            self._data = os.pread(self._descriptor, min(CHUNK, self._end - position), position)
            self._start = position
        begin = position - self._start
        return memoryview(self._data)[begin : begin + n]

    def next_magic(self, position: int) -> int | None:
        """Return where the next aligned magic is, or None."""
        while position < self._end:
            view = self.at(position, CHUNK)
            data = bytes(view)
            found = data.find(MAGIC)
            while found >= 0:
                if found % UNIT == 0:
                    return position + found
                found = data.find(MAGIC, found + 1)
            position += max(UNIT, len(data) // UNIT * UNIT)
        return None


def needles(descriptor: int, start: int, end: int, seed: int, *, verify: bool) -> Iterator[Found]:
    """Yield the needles between two positions in bytes.

    Args:
        descriptor: the volume.
        start: a multiple of the unit.
        end: where the file ends.
        seed: of the volume.
        verify: read the data too and say whether it is good; else only headers are looked at.
    """
    window = _Window(descriptor, end)
    position: int | None = start
    while position is not None and position + HEADER_BYTES <= end:
        header = Header.parse(window.at(position, HEADER_BYTES), seed)
        if header is None:
            position = window.next_magic(position + UNIT)
            continue
        n = header.units * UNIT
        if position + n <= end:
            is_good = not verify or data_of(header, window.at(position, n)) is not None
            yield Found(position // UNIT, header, is_good)
        position += n


def good_end(found: Iterable[Found], start: int) -> int:
    """Return where the last upload ends of which the last header is there, in bytes.

    What is damaged before it may have been acknowledged and is kept; what is behind cannot have
    been.
    """
    end = start
    for each in found:
        if each.header.number + 1 == each.header.total:
            end = each.end * UNIT
    return end


def entries_of(found: Iterable[Found], alternates: tuple[int, ...]) -> Iterator[Entry]:
    """Gather needles into entries; one whose needles are all deleted has the offset 0."""
    slots = {alternate: slot for slot, alternate in enumerate(alternates)}
    group: list[Found] = []
    for each in found:
        if each.header.alternate not in slots or not each.is_good:
            continue
        if group and (
            group[0].header.key != each.header.key or group[-1].header.number >= each.header.number
        ):
            yield from _entry(group, slots)
            group = []
        group.append(each)
    if group:
        yield from _entry(group, slots)


def _entry(group: list[Found], slots: dict[int, int]) -> Iterator[Entry]:
    """Make the entry of an upload; where a needle is missing, another slot stands for its bytes."""
    if all(each.header.flags == DELETED for each in group):
        yield Entry(group[0].header.key, 0, (0,) * len(slots))
        return
    lengths = [0] * len(slots)
    begin = position = group[0].offset
    for each in group:
        slot = slots[each.header.alternate]
        gap = each.offset - position
        if gap and (slot == 0 or lengths[slot - 1] or gap > MAX_LENGTH):
            break
        if gap:
            lengths[slot - 1] = gap
        lengths[slot] = each.header.units
        position = each.end
    yield Entry(group[0].header.key, begin, tuple(lengths))
