"""The layout of a volume: a superblock, then needles; pure, no files.

After the Haystack paper (Beaver et al., OSDI 2010, figure 5). Everything begins at a multiple of
32 bytes (`UNIT`): an offset in units fits 32 bits up to 128 GiB, a length 16 bits up to 2 MiB.
All integers are little-endian. A needle:

    offset  size  field
    0       4     magic "ndl1"
    4       4     cookie      random, a part of the address: addresses cannot be guessed
    8       8     key         one picture
    16      4     alternate   one variant of it: format << 16 | longest side in pixels
    20      1     flags       LIVE or DELETED; anything else is damage; changed in place
    21      1     number      of this needle among those of the upload, from 0
    22      1     total       of the needles of the upload
    23      1     0
    24      4     size        bytes of data
    28      4     CRC-32 of bytes 0-27 with flags 0, begun with the volume's seed
    32      size  data
            4     magic "/ndl"
            4     CRC-32 of the data, begun with the header's
            0-31  zeros

The needles of one upload stand one behind the other, written in one write. The seed is random
and known to nobody outside, so that a picture cannot contain what would pass for a needle
when its surroundings are damaged. Called by volumes and the tools over them. CRC-32 is
zlib's, of the standard library: 4 GB/s where it multiplies without carries, 6 µs for a picture.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple
from zlib import crc32

__all__ = [
    "DATA_AT",
    "DELETED",
    "FLAGS_AT",
    "HEADER_BYTES",
    "LIVE",
    "MAGIC",
    "MAX_DATA_BYTES",
    "MAX_VOLUME_BYTES",
    "REPLACED_AT",
    "SEALED_AT",
    "UNIT",
    "UNWRITTEN_AT",
    "Address",
    "Header",
    "Superblock",
    "alternate_of",
    "data_of",
    "encode_upload",
    "variant_of",
]

UNIT: Final = 32
MAGIC: Final = b"ndl1"
END_MAGIC: Final = b"/ndl"
HEADER_BYTES: Final = 32
FOOTER_BYTES: Final = 8
FLAGS_AT: Final = 20
LIVE: Final = 0xA5
DELETED: Final = 0x5A
"""Far apart in bits, so that a flipped bit makes neither of the other."""

MAX_DATA_BYTES: Final = 0xFFFF * UNIT - HEADER_BYTES - FOOTER_BYTES
MAX_VOLUME_BYTES: Final = 0xFFFFFFFF * UNIT
MAX_COUNT: Final = 8
SUPER_BYTES: Final = 64
SEALED_AT: Final = 2 * SUPER_BYTES
"""Of a byte that is not 0 once nothing is appended any more."""

REPLACED_AT: Final = SEALED_AT + 1
"""Of a byte that is not 0 once another file may be in this one's place."""

UNWRITTEN_AT: Final = SEALED_AT + 4
"""Of a 32-bit count of deletes that are in the needles only: there was no room in the journal."""

DATA_AT: Final = 3 * SUPER_BYTES
"""Where needles begin: the superblock stands there twice, then the seal."""

_HEADER: Final = struct.Struct("<4sIQIBBBBII")
_HEAD: Final = struct.Struct("<4sIQIBBBBI")
_FOOTERS: Final = [struct.Struct(f"<4sI{padding}x") for padding in range(UNIT)]
_SUPER: Final = struct.Struct("<4sHBBI16s8I")
_SUPER_MAGIC: Final = b"lbv1"
_FORMATS: Final = ("jpg", "webp")


class Address(NamedTuple):
    """What a blob key says: where a picture is, and which one it is.

    Attributes:
        volume: number of the volume; 32 bits.
        key: 64 bits.
        cookie: 32 bits.
    """

    volume: int
    key: int
    cookie: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """Return what a blob key says; the caller has checked its form."""
        return cls(int(text[:8], 16), int(text[8:24], 16), int(text[24:], 16))

    def __str__(self) -> str:
        return f"{self.volume:08x}{self.key:016x}{self.cookie:08x}"


@dataclass(frozen=True, slots=True)
class Superblock:
    """The first 64 bytes of a volume, and once more behind them; written once.

    Attributes:
        volume: its number.
        incarnation: 16 random bytes; an index of another one is stale. The first four are the
            seed of the needles' checksums, the others are new after each compaction.
        alternates: the variants an upload may have here, in the order in which they stand.
    """

    volume: int
    incarnation: bytes
    alternates: tuple[int, ...]

    @property
    def seed(self) -> int:
        """What the checksum of each needle begins with."""
        return int.from_bytes(self.incarnation[:4], "little")

    def encode(self) -> bytes:
        """Return the bytes, both copies and the seal."""
        padded = (*self.alternates, *[0] * (MAX_COUNT - len(self.alternates)))
        body = _SUPER.pack(
            _SUPER_MAGIC, UNIT, len(self.alternates), 0, self.volume, self.incarnation, *padded
        )
        copy = body + crc32(body).to_bytes(4, "little")
        return (copy + copy).ljust(DATA_AT, b"\0")

    @classmethod
    def parse(cls, data: bytes) -> Superblock | None:
        """Return what one of the copies says, or None when both are damaged."""
        return cls._parse(data) or cls._parse(data[SUPER_BYTES:])

    @classmethod
    def _parse(cls, data: bytes) -> Superblock | None:
        body = data[: _SUPER.size]
        if len(data) < SUPER_BYTES or crc32(body) != int.from_bytes(data[60:64], "little"):
            return None
        magic, unit, n, _, volume, incarnation, *alternates = _SUPER.unpack(body)
        if magic != _SUPER_MAGIC or unit != UNIT or n > MAX_COUNT:
            return None
        return cls(volume, incarnation, tuple(alternates[:n]))


class Header(NamedTuple):
    """The header of a needle whose CRC was right."""

    cookie: int
    key: int
    alternate: int
    flags: int
    number: int
    total: int
    size: int
    checksum: int

    @property
    def units(self) -> int:
        """Length of the needle with header, footer and padding, in units."""
        return units_of(self.size)

    @classmethod
    def parse(cls, data: bytes | bytearray | memoryview, seed: int) -> Header | None:
        """Return the header at the beginning of some bytes, or None when there is none."""
        if len(data) < HEADER_BYTES or data[:4] != MAGIC:
            return None
        head = bytearray(data[:28])
        head[FLAGS_AT] = 0
        fields = _HEADER.unpack_from(data)
        if crc32(head, seed) != fields[9] or fields[8] > MAX_DATA_BYTES:
            return None
        return cls(*fields[1:7], *fields[8:])


def units_of(size: int) -> int:
    """Return the length of a needle with so many bytes of data, in units."""
    return (HEADER_BYTES + size + FOOTER_BYTES + UNIT - 1) // UNIT


def data_of(header: Header, needle: bytes | bytearray | memoryview) -> memoryview | None:
    """Return the data of a whole needle, or None when it is damaged."""
    end = HEADER_BYTES + header.size
    view = memoryview(needle)
    if len(view) < end + FOOTER_BYTES or bytes(view[end : end + 4]) != END_MAGIC:
        return None
    data = view[HEADER_BYTES:end]
    checksum = int.from_bytes(view[end + 4 : end + 8], "little")
    return data if crc32(data, header.checksum) == checksum else None


def encode_upload(
    key: int, cookie: int, variants: Sequence[tuple[int, bytes | memoryview]], seed: int
) -> tuple[bytes, list[int]]:
    """Return the needles of one upload as bytes, and the units of each.

    Args:
        key: of the picture.
        cookie: of the picture.
        variants: alternate and data, in the order of the volume's alternates.
        seed: of the volume.

    Raises:
        ValueError: one is larger than a needle can be, 2 MiB.
    """
    parts: list[bytes | memoryview] = []
    lengths = []
    count = len(variants)
    for number, (alternate, data) in enumerate(variants):
        size = len(data)
        if size > MAX_DATA_BYTES:
            raise ValueError(f"a variant of {size} bytes is larger than {MAX_DATA_BYTES}")
        head = _HEAD.pack(MAGIC, cookie, key, alternate, 0, number, count, 0, size)
        checksum = crc32(head, seed)
        units = units_of(size)
        padding = units * UNIT - HEADER_BYTES - size - FOOTER_BYTES
        parts += (
            _HEADER.pack(MAGIC, cookie, key, alternate, LIVE, number, count, 0, size, checksum),
            data,
            _FOOTERS[padding].pack(END_MAGIC, crc32(data, checksum)),
        )
        lengths.append(units)
    return b"".join(parts), lengths


def alternate_of(variant: str) -> int:
    """Return the number of a variant, such as 1080 for `1080.jpg`; its form was checked."""
    size, _, ending = variant.partition(".")
    return _FORMATS.index(ending) << 16 | int(size)


def variant_of(alternate: int) -> str:
    """Return the name of a variant's number."""
    return f"{alternate & 0xFFFF}.{_FORMATS[alternate >> 16]}"
