"""Where an entry is: blocks, rows, and the head of a block. No I/O.

Ids are cut into blocks of consecutive ids, a block into rows of 64. A block is one string of
Redis, as large as a class of its allocator has room for. Every row carries a check of what it
holds and of where it belongs, so that one row can be read and believed alone.

    offset  size  head of a block
         0     2  magic, 9d 1d
         2     1  format, 1
         3     1  encoding: 1 dense, 2 sparse rows, 3 list
         4     1  bytes of a value in this block
         5     1  bytes of a value that the map was made for; the size of blocks follows from it
         6     2  check of these six and of the block's number

What follows it: `shardkit.idmap.blocks`. Numbers are big-endian.

Source: the size classes, jemalloc(3), "Implementation notes"; the head of a string, Redis' sds.h.
CRC-32 is zlib's. Why 64 and 16 KiB: docs/idmap.md.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property
from typing import Final
from zlib import crc32

from shardkit.errors import ConfigurationError, DamagedMapError, InvalidMappingError

__all__ = [
    "DENSE",
    "HEAD",
    "LIST",
    "MAX_ID",
    "MAX_VALUE",
    "ROW",
    "SPARSE",
    "Head",
    "Layout",
    "allocated",
    "row_size",
    "width_of",
]

MAX_ID: Final = 2**63 - 1
MAX_VALUE: Final = 2**63 - 1
ROW: Final = 64
"""Ids in a row: how much one read carries, and checks."""
HEAD: Final = 8
"""Bytes of a head."""
CHECK: Final = 4
"""Bytes of a row's check."""
TARGET: Final = 16 * 1024
"""The size class that a dense block fills."""
_SDS: Final = 6
"""Bytes that Redis adds to a string of 256 to 65,535 bytes: head and end."""
DENSE: Final = 1
SPARSE: Final = 2
LIST: Final = 3

_MAGIC: Final = b"\x9d\x1d\x01"
_HEAD: Final = struct.Struct(">3sBBBH")
_PLACE: Final = struct.Struct(">8sQH")

Head = tuple[int, int]
"""Encoding, and bytes of a value."""


def row_size(width: int) -> int:
    """Return the bytes of a dense row."""
    return CHECK + ROW * width


def width_of(cell: int) -> int:
    """Return how many bytes hold a cell."""
    return (cell.bit_length() + 7) // 8


def allocated(size: int) -> int:
    """Return the bytes that jemalloc gives for a string of `size` bytes."""
    whole = size + (4 if size < 256 else _SDS if size < 65_536 else 10)
    if whole <= 128:
        return (whole + 15) // 16 * 16
    step = 1 << (whole - 1).bit_length() - 3
    return (whole + step - 1) // step * step


@dataclass(frozen=True)
class Layout:
    """How the ids of one map are laid out.

    Attributes:
        width: bytes of a value, 2 to 8: 3 hold values below 16,777,215. A block that gets a larger
            one is widened; the size of blocks stays what it was made for.
    """

    width: int = 3

    def __post_init__(self) -> None:
        if type(self.width) is not int or not 2 <= self.width <= 8:
            raise ConfigurationError(
                f"width={self.width!r}: a value of an id map takes 2 to 8 bytes",
                hint="3 is right for values below 16,777,215, 8 for ids of this library",
            )

    @cached_property
    def n_rows(self) -> int:
        """Rows of a block."""
        return (TARGET - _SDS - HEAD) // row_size(self.width)

    @cached_property
    def n_slots(self) -> int:
        """Ids of a block."""
        return self.n_rows * ROW

    def place(self, id: int) -> tuple[int, int]:  # noqa: A002  the glossary's word
        """Return block and slot of an id.

        Raises:
            InvalidMappingError: it is no id.
        """
        if type(id) is not int or not 0 <= id <= MAX_ID:
            raise InvalidMappingError(f"{id!r} is no id of a map; give an int from 0 to 2^63 - 1")
        return divmod(id, self.n_slots)

    def cell(self, value: int) -> int:
        """Return what stands for a value; zero stands for none.

        Raises:
            InvalidMappingError: it is no value.
        """
        if type(value) is not int or not 0 <= value <= MAX_VALUE:
            raise InvalidMappingError(
                f"{value!r} is no value of a map; give an int from 0 to 2^63 - 1"
            )
        return value + 1

    def head(self, block: int, encoding: int, width: int) -> bytes:
        """Return the head of a block."""
        start = _HEAD.pack(_MAGIC, encoding, width, self.width, 0)[:6]
        return start + (crc32(start + block.to_bytes(8, "big")) & 0xFFFF).to_bytes(2, "big")

    def read_head(self, block: int, data: bytes) -> Head:
        """Return encoding and width of a block, from its first bytes.

        Raises:
            DamagedMapError: that is not the head of this block.
        """
        if len(data) >= HEAD:
            magic, encoding, width, made_for, _ = _HEAD.unpack_from(data)
            if (
                magic == _MAGIC
                and made_for == self.width <= width <= 8
                and DENSE <= encoding <= LIST
                and data[:HEAD] == self.head(block, encoding, width)
            ):
                return encoding, width
        raise self.damage(block, "its head is not one of this map")

    def check(self, block: int, head: bytes, row: int, data: bytes | memoryview) -> bytes:
        """Return the check of a row's bytes, in its place."""
        return crc32(data, crc32(_PLACE.pack(head, block, row))).to_bytes(CHECK, "big")

    def damage(self, block: int, what: str) -> DamagedMapError:
        """Return the error to raise for a block that is not what was written."""
        first = block * self.n_slots
        return DamagedMapError(
            f"block {block} of the map, ids {first} to {first + self.n_slots - 1}: {what}",
            hint="delete its key and load these ids again",
            block=block,
        )
