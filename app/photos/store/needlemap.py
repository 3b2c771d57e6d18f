"""Where the needles of one volume are, in memory: 12 bytes an upload and 2 for each variant.

Uploads are sorted by key in plain arrays: key (64 bits), offset of the first needle (32 bits, in
units) and the length of each variant's needle (16 bits, in units). Those of one upload stand one
behind the other, so offsets are sums. With four variants that is 20 bytes, 5 for an image. New
ones wait in a dictionary and are merged in when they are many. The cookie is not here: it is
checked in the needle that was read. One thread changes a map; any may look.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Entry", "NeedleMap", "Table", "table_of"]

RECENT: Final = 2048
"""Uploads in the dictionary, of some 300 bytes each, before they are merged into the arrays."""

GONE: Final = 0
"""Offset of an upload that was deleted; the superblock is there."""


class Entry(NamedTuple):
    """Where the needles of one upload are, in units.

    Attributes:
        key: of the picture.
        offset: of the first needle, from the beginning of the volume.
        lengths: of each alternate of the volume, 0 where the upload has none.
    """

    key: int
    offset: int
    lengths: tuple[int, ...]

    @property
    def units(self) -> int:
        """Length of all needles together."""
        return sum(self.lengths)

    def at(self, slot: int) -> tuple[int, int]:
        """Return offset and length of one variant, in units."""
        return self.offset + sum(self.lengths[:slot]), self.lengths[slot]


Table: TypeAlias = tuple[NDArray[np.uint64], NDArray[np.uint32], NDArray[np.uint16]]
"""Keys, offsets and lengths, row by row; sorted by key only inside a map."""


class _Base:
    """A sorted table, and its memory as Python reads it quickest, number by number."""

    __slots__ = ("keys", "lengths", "offsets", "table")

    def __init__(self, table: Table) -> None:
        self.table = table
        self.keys, self.offsets, self.lengths = (part.reshape(-1).data for part in table)

    def place(self, key: int) -> int | None:
        """Return the row of a key, or None."""
        at = bisect_left(self.keys, key)
        return at if at < len(self.keys) and self.keys[at] == key else None


class NeedleMap:
    """The map of one volume.

    *Invariant:* a key is there once, with what was added last.

    Args:
        n_slots: alternates of the volume.
    """

    def __init__(self, n_slots: int) -> None:
        self._n_slots = n_slots
        self._base = _Base(_table([], n_slots))
        self._recent: dict[int, tuple[int, tuple[int, ...]]] = {}

    def __len__(self) -> int:
        return sum(1 for _ in self.entries())

    @property
    def n_bytes(self) -> int:
        """Bytes of the arrays."""
        return sum(int(part.nbytes) for part in self._base.table)

    def find(self, key: int) -> Entry | None:
        """Return where an upload is, or None."""
        found = self._recent.get(key)  # first: a merge fills the arrays before it empties this
        if found is None:
            base, n = self._base, self._n_slots
            at = base.place(key)
            if at is None:
                return None
            found = base.offsets[at], tuple(base.lengths[at * n : (at + 1) * n])
        return None if found[0] == GONE else Entry(key, *found)

    def add(self, entry: Entry) -> None:
        """Add an upload; it replaces one of the same key."""
        self._recent[entry.key] = entry.offset, entry.lengths
        if len(self._recent) >= max(RECENT, len(self._base.keys) >> 7):
            self.merge()

    def remove(self, key: int) -> None:
        """Forget an upload."""
        if key in self._recent:
            self._recent[key] = GONE, (0,) * self._n_slots
            return
        at = self._base.place(key)
        if at is not None:
            self._base.table[1][at] = GONE

    def extend(self, tables: Sequence[Table]) -> None:
        """Add many rows, such as those of an index file; later ones replace earlier ones."""
        keys, offsets, lengths = zip(self._base.table, *tables, strict=True)
        self._base = _Base(
            _sorted(np.concatenate(keys), np.concatenate(offsets), np.concatenate(lengths))
        )

    def merge(self) -> None:
        """Move what is in the dictionary into the arrays."""
        recent = self._recent
        self.extend([_table([(key, *found) for key, found in recent.items()], self._n_slots)])
        self._recent = {}

    def entries(self) -> Iterator[Entry]:
        """Iterate over what is there in the order of the volume."""
        self.merge()
        keys, offsets, lengths = self._base.table
        for at in np.argsort(offsets, kind="stable"):
            if int(offsets[at]) != GONE:
                yield Entry(int(keys[at]), int(offsets[at]), tuple(lengths[at].tolist()))


def _table(rows: Sequence[Any], n_slots: int) -> Table:
    return (
        np.array([row[0] for row in rows], np.uint64),
        np.array([row[1] for row in rows], np.uint32),
        np.array([row[2] for row in rows], np.uint16).reshape(len(rows), n_slots),
    )


def table_of(entries: Sequence[Entry], n_slots: int) -> Table:
    """Return entries as arrays, in their order."""
    return _table([(each.key, each.offset, each.lengths) for each in entries], n_slots)


def _sorted(
    keys: NDArray[np.uint64], offsets: NDArray[np.uint32], lengths: NDArray[np.uint16]
) -> Table:
    """Return rows sorted by key, of equal keys the last only."""
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    last = np.ones(len(keys), np.bool_)
    last[:-1] = keys[1:] != keys[:-1]
    order = order[last]
    return keys[last], offsets[order], lengths[order]
