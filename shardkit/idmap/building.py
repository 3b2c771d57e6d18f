"""Cuts a stream of entries into blocks, to be stored whole. No I/O."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

from shardkit.errors import InvalidMappingError
from shardkit.idmap.blocks import empty
from shardkit.idmap.layout import MAX_VALUE, Layout

__all__ = ["Loaded", "built", "windows"]

_BLOCKS_AT_ONCE = 32
"""Half a mebibyte on its way; the cells that it is packed from take eight bytes each."""


class Loaded(NamedTuple):
    """How far a load is.

    Attributes:
        entries: read so far; one that came twice counts twice.
        blocks: stored so far; one that came in two pieces counts twice.
        size_bytes: of the blocks that were new.
        last_id: last id stored; a load that was interrupted may go on behind it if sorted.
    """

    entries: int = 0
    blocks: int = 0
    size_bytes: int = 0
    last_id: int = -1


Built = tuple[int, "array[int]", int, int]
"""Number of a block, its cells, how many entries were read for it, and the last id."""


def built(layout: Layout, entries: Iterable[tuple[int, int]]) -> Iterator[Built]:
    """Return blocks as they fill up: one after the other when ids are sorted.

    Raises:
        InvalidMappingError: an id or a value cannot be one; names it.
    """
    n_slots = layout.n_slots
    block, first, n, last = -1, 0, 0, -1
    cells: array[int] = array("Q")
    for id, value in entries:  # noqa: A001  the glossary's word
        try:
            slot = id - first
            if not (n and 0 <= slot < n_slots):
                if n:
                    yield block, cells, n, last
                block = layout.place(id)[0]
                first, n, cells = block * n_slots, 0, empty(layout)
                slot = id - first
            if not 0 <= value <= MAX_VALUE:
                layout.cell(value)
            cells[slot] = value + 1
        except TypeError:
            raise InvalidMappingError(f"{id!r}: {value!r} is no entry of a map") from None
        n += 1
        last = id
    if n:
        yield block, cells, n, last


def windows(
    layout: Layout, entries: Iterable[tuple[int, int]]
) -> Iterator[tuple[list[tuple[int, array[int]]], Loaded]]:
    """Return blocks to store in one round trip, and what they add.

    A block that comes twice in one window begins the next: each is stored once a round trip.
    """
    source = built(layout, entries)
    held: Built | None = None
    while True:
        found: dict[int, array[int]] = {}
        n = 0
        last = -1
        for each in [held] if held else islice(source, 1):
            found[each[0]], n, last = each[1], each[2], each[3]
        held = None
        if not found:
            return
        for block, cells, more, end in islice(source, _BLOCKS_AT_ONCE - 1):
            if block in found:
                held = (block, cells, more, end)
                break
            found[block] = cells
            n += more
            last = end
        yield [*found.items()], Loaded(n, len(found), 0, last)
