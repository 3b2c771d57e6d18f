"""The bytes of blocks: cells to bytes and back, whole blocks and single rows. No I/O.

    dense     head, then every row: check (4), 64 cells of the block's width
    sparse    head, end of every row (2 each, from the end of this directory), then the rows that
              are not empty: check (4), which of the 64 there are (8), their cells
    list      head, check (4), then the slots of all entries (2 each, ascending), then their cells

A cell is the value plus one, and zero where there is none. A block takes the encoding that costs
least memory; a dense one is read and written at less cost, so it may take an eighth more.
"""

from __future__ import annotations

import struct
import sys
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from typing import Final

from shardkit.idmap.layout import (
    CHECK,
    DENSE,
    HEAD,
    LIST,
    ROW,
    SPARSE,
    Layout,
    allocated,
    row_size,
    width_of,
)

__all__ = ["cell_of", "decode", "empty", "encode", "row_cells", "row_of"]

_LONGEST_LIST: Final = 512
"""Entries of a list: it is always read whole. With more, rows are smaller than a list."""
_LIST_ROW: Final = 0xFFFF
_MASK: Final = 8
_BITS: Final = [1 << (63 - n) for n in range(ROW)]
_EDGE: Final = CHECK + _MASK


def empty(layout: Layout) -> array[int]:
    """Return the cells of a block without entries."""
    return array("Q", bytes(8 * layout.n_slots))


def encode(layout: Layout, block: int, cells: array[int]) -> bytes:
    """Return the bytes of a block: nothing for one without entries."""
    n = len(cells) - cells.count(0)
    if not n:
        return b""
    width = max(layout.width, width_of(max(cells)))
    size = HEAD + layout.n_rows * row_size(width)
    room = allocated(size) * 7 // 8
    if n <= _LONGEST_LIST and (listed := HEAD + CHECK + n * (2 + width)) < size:
        spread = HEAD + layout.n_rows * 2 + n * width + _used(layout, cells) * _EDGE
        if allocated(listed) <= min(room, allocated(spread)):
            return _list(layout, block, cells, width)
    if allocated(HEAD + layout.n_rows * 2 + n * width) <= room:  # it may be worth counting rows
        spread = HEAD + layout.n_rows * 2 + n * width + _used(layout, cells) * _EDGE
        if allocated(spread) <= room:
            return _sparse(layout, block, cells, width)
    return _dense(layout, block, cells, width)


def _used(layout: Layout, cells: array[int]) -> int:
    return sum(any(cells[at : at + ROW]) for at in range(0, layout.n_slots, ROW))


def _packed(cells: array[int], width: int) -> bytes:
    """Return cells as numbers of so many bytes: the eight planes of an array, fewer of them."""
    whole = array("Q", cells)
    if sys.byteorder == "little":
        whole.byteswap()
    raw = whole.tobytes()
    if width == 8:
        return raw
    packed = bytearray(len(cells) * width)
    for n in range(width):
        packed[n::width] = raw[8 - width + n :: 8]
    return bytes(packed)


def _unpacked(data: bytes, width: int) -> array[int]:
    raw = bytearray(len(data) // width * 8)
    for n in range(width):
        raw[8 - width + n :: 8] = data[n::width]
    cells = array("Q", bytes(raw))
    if sys.byteorder == "little":
        cells.byteswap()
    return cells


def _dense(layout: Layout, block: int, cells: array[int], width: int) -> bytes:
    head = layout.head(block, DENSE, width)
    packed, size = memoryview(_packed(cells, width)), ROW * width
    parts: list[bytes | memoryview] = [head]
    for row in range(layout.n_rows):
        body = packed[row * size : (row + 1) * size]
        parts.append(layout.check(block, head, row, body))
        parts.append(body)
    return b"".join(parts)


def _sparse(layout: Layout, block: int, cells: array[int], width: int) -> bytes:
    head = layout.head(block, SPARSE, width)
    ends, rows, end = [], [], 0
    for row in range(layout.n_rows):
        body = _sparse_row(cells[row * ROW : (row + 1) * ROW], width)
        if body:
            rows.append(layout.check(block, head, row, body))
            rows.append(body)
            end += CHECK + len(body)
        ends.append(end)
    return head + struct.pack(f">{layout.n_rows}H", *ends) + b"".join(rows)


def _sparse_row(cells: array[int], width: int) -> bytes:
    mask = sum(bit for bit, cell in zip(_BITS, cells, strict=True) if cell)
    if not mask:
        return b""
    found = b"".join(cell.to_bytes(width, "big") for cell in cells if cell)
    return mask.to_bytes(_MASK, "big") + found


def _list(layout: Layout, block: int, cells: array[int], width: int) -> bytes:
    head = layout.head(block, LIST, width)
    slots = [slot for slot, cell in enumerate(cells) if cell]
    found = array("Q", [cells[slot] for slot in slots])
    body = struct.pack(f">{len(slots)}H", *slots) + _packed(found, width)
    return head + layout.check(block, head, _LIST_ROW, body) + body


def decode(layout: Layout, block: int, data: bytes) -> array[int]:
    """Return the cells of a block; `data` may be empty.

    Raises:
        DamagedMapError: these are not the bytes of this block.
    """
    if not data:
        return empty(layout)
    encoding, width = layout.read_head(block, data)
    head = data[:HEAD]
    if encoding == LIST:
        cells = empty(layout)
        slots, found = _listed(layout, block, head, data[HEAD:], width)
        for slot, cell in zip(slots, _unpacked(found, width), strict=True):
            cells[slot] = cell
        return cells
    if encoding == DENSE:
        size = row_size(width)
        if len(data) != HEAD + layout.n_rows * size:
            raise layout.damage(block, f"it has {len(data)} bytes")
        ends = [*range(HEAD + size, len(data) + 1, size)]
    else:
        first = HEAD + 2 * layout.n_rows
        if len(data) < first:
            raise layout.damage(block, f"it has {len(data)} bytes")
        ends = [first + end for end in struct.unpack_from(f">{layout.n_rows}H", data, HEAD)]
        if ends[-1] != len(data) or ends != sorted(ends):
            raise layout.damage(block, "its directory does not fit")
    cells, at = array("Q"), HEAD if encoding == DENSE else HEAD + 2 * layout.n_rows
    for row, end in enumerate(ends):
        cells += row_cells(layout, block, head, row, data[at:end])
        at = end
    return cells


def row_cells(layout: Layout, block: int, head: bytes, row: int, data: bytes) -> array[int]:
    """Return the 64 cells of a row, of a dense or sparse block.

    Args:
        layout: of the map.
        block: its number.
        head: of the block, as it was read.
        row: which of the block's.
        data: of the row, with its check.

    Raises:
        DamagedMapError: these are not the bytes of this row.
    """
    encoding, width = layout.read_head(block, head)
    if encoding == SPARSE and not data:
        return array("Q", bytes(8 * ROW))
    body = data[CHECK:]
    _believe(layout, block, head, row, data)
    if encoding == DENSE:
        if len(body) != ROW * width:
            raise layout.damage(block, f"row {row} has {len(body)} bytes")
        return _unpacked(body, width)
    mask = int.from_bytes(body[:_MASK], "big")
    if len(body) != _MASK + mask.bit_count() * width:
        raise layout.damage(block, f"row {row} has {len(body)} bytes")
    found = iter(_unpacked(body[_MASK:], width))
    return array("Q", [next(found) if mask & bit else 0 for bit in _BITS])


def cell_of(layout: Layout, block: int, head: bytes, slot: int, data: bytes) -> int:
    """Return one cell out of its row, or out of a whole list.

    Raises:
        DamagedMapError: these are not the bytes that belong there.
    """
    encoding, width = layout.read_head(block, head)
    if encoding == LIST:
        slots, found = _listed(layout, block, head, data, width)
        at = bisect_left(slots, slot)
        if at == len(slots) or slots[at] != slot:
            return 0
        return int.from_bytes(found[at * width : (at + 1) * width], "big")
    row, column = divmod(slot, ROW)
    if encoding == SPARSE:
        return row_cells(layout, block, head, row, data)[column] if data else 0
    _believe(layout, block, head, row, data)
    if len(data) != row_size(width):
        raise layout.damage(block, f"row {row} has {len(data)} bytes")
    at = CHECK + column * width
    return int.from_bytes(data[at : at + width], "big")


def row_of(layout: Layout, block: int, head: bytes, row: int, cells: array[int]) -> bytes:
    """Return the bytes of a dense row with its check."""
    body = _packed(cells, layout.read_head(block, head)[1])
    return layout.check(block, head, row, body) + body


def _believe(layout: Layout, block: int, head: bytes, row: int, data: bytes) -> None:
    if layout.check(block, head, row, memoryview(data)[CHECK:]) != data[:CHECK]:
        raise layout.damage(block, f"row {row} is not what was written")


def _listed(
    layout: Layout, block: int, head: bytes, data: bytes, width: int
) -> tuple[Sequence[int], bytes]:
    """Return the slots of a list, ascending, and the bytes of their cells."""
    _believe(layout, block, head, _LIST_ROW, data)
    n, rest = divmod(len(data) - CHECK, 2 + width)
    if rest or not 0 < n <= layout.n_slots:
        raise layout.damage(block, f"its list has {len(data)} bytes")
    slots = struct.unpack_from(f">{n}H", data, CHECK)
    if slots[-1] >= layout.n_slots:
        raise layout.damage(block, "its list names ids of another block")
    return slots, data[CHECK + 2 * n :]
