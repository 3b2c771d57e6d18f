"""How an entry is written down: a header of 14 bytes and the payload.

Every backend stores this; what does not read as such is garbage, which readers remove.

| offset | field | bytes | range |
|---|---|---|---|
| 0 | format | 1 | 0xC1; other formats are garbage to this version |
| 1 | kind | 1 | 0 VALUE, 1 ABSENCE, 2 MARKER |
| 2 | version | 8 | signed, big-endian |
| 10 | checksum | 4 | CRC-32 of the bytes before it and of the payload |
| 14 | payload | any | the encoded row; of a marker the value it replaces, or nothing |

A lease has no bytes at all: Memcached makes it by itself.
"""

from __future__ import annotations

import struct
from typing import Final
from zlib import crc32

from shardkit.caching.operations import Answer, Cas, Kind, Outcome

__all__ = ["LARGEST_ENTRY", "carried", "decode", "encode", "uncarried"]

LARGEST_ENTRY: Final = 1_000_000
"""Bytes above which nothing is cached; Memcached refuses 1 MiB with key and item header.

Source: memcached, doc/protocol.txt and option -I.
"""

_FORMAT: Final = 0xC1
_HEAD: Final = struct.Struct(">BBq")
_SUM: Final = struct.Struct(">I")
_WHOLE: Final = struct.Struct(">BBqI")
_KINDS: Final = (Kind.VALUE, Kind.ABSENCE, Kind.MARKER)
_VERSION: Final = struct.Struct(">q")


def encode(kind: Kind, version: int, payload: bytes) -> bytes:
    """Return the bytes of an entry."""
    head = _HEAD.pack(_FORMAT, kind, version)
    return head + _SUM.pack(crc32(payload, crc32(head))) + payload


def decode(data: bytes, cas: Cas) -> Answer:
    """Return what a server holds, whatever its bytes are."""
    if not data:
        return Answer(Outcome.FOUND, cas, Kind.LEASE)
    if len(data) >= 14:
        form, kind, version, checksum = _WHOLE.unpack_from(data)
        payload = data[14:]
        if form == _FORMAT and kind < 3 and crc32(payload, crc32(data[:10])) == checksum:
            return Answer(Outcome.FOUND, cas, _KINDS[kind], version, payload)
    return Answer(Outcome.FOUND, cas, Kind.GARBAGE)


def carried(value: Answer) -> bytes:
    """Return a value as the payload of the marker that is put in its place."""
    return _VERSION.pack(value.version) + value.payload


def uncarried(payload: bytes) -> tuple[int, bytes]:
    """Return version and payload of the value that a marker carries."""
    return _VERSION.unpack_from(payload)[0], payload[8:]
