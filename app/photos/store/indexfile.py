"""The index of a volume: what its map was when the volume had a certain length.

A checkpoint, so that a start reads some bytes an upload instead of the volume; whatever is lost or
damaged here is read from the volume again. Blocks are appended, each complete in itself:

    offset  size  field
    0       4     magic "idx1"
    4       4     number of uploads
    8       8     length of the volume, in bytes, that all blocks up to this one cover
    16      16    incarnation of the volume
    32      4     CRC-32 of bytes 0-31 and of the payload
    36      4     0
    40      n*8   keys, then n*4 offsets, then n*2 lengths for each alternate

A block is written after the needles it covers were flushed, and what follows the first bad block
counts for nothing. Called by volumes.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from zlib import crc32

import numpy as np

from app.photos.store.needlemap import Table

__all__ = ["append_block", "read_blocks"]

_HEAD: Final = struct.Struct("<4sIQ16s")
_HEAD_BYTES: Final = 40
_MAGIC: Final = b"idx1"


def append_block(path: Path, incarnation: bytes, covered: int, table: Table) -> None:
    """Append a block and flush it.

    Args:
        path: the index file; made when missing.
        incarnation: of the volume.
        covered: bytes of the volume that are flushed, and in this or an earlier block.
        table: the uploads since the last block.
    """
    head = _HEAD.pack(_MAGIC, len(table[0]), covered, incarnation)
    payload = b"".join(part.tobytes() for part in table)
    checksum = crc32(payload, crc32(head))
    good = sum(length for *_, length in read_blocks(path, incarnation, table[2].shape[1]))
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        os.ftruncate(descriptor, good)  # what follows a bad block is never read
        os.pwrite(descriptor, head + struct.pack("<II", checksum, 0) + payload, good)
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)


def read_blocks(path: Path, incarnation: bytes, n_slots: int) -> Iterator[tuple[Table, int, int]]:
    """Yield the uploads of each good block, the volume's length it covers, and its own length."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    at = 0
    while at + _HEAD_BYTES <= len(data):
        head = data[at : at + _HEAD.size]
        magic, n, covered, of = _HEAD.unpack(head)
        end = at + _HEAD_BYTES + n * (12 + 2 * n_slots)
        if magic != _MAGIC or of != incarnation or end > len(data):
            return
        payload = memoryview(data)[at + _HEAD_BYTES : end]
        if crc32(payload, crc32(head)) != int.from_bytes(data[at + 32 : at + 36], "little"):
            return
        yield _parse(payload, n, n_slots), covered, end - at
        at = end


def _parse(payload: memoryview, n: int, n_slots: int) -> Table:
    keys = np.frombuffer(payload, "<u8", n)
    offsets = np.frombuffer(payload, "<u4", n, 8 * n)
    lengths = np.frombuffer(payload, "<u2", n * n_slots, 12 * n)
    return (
        keys.astype(np.uint64),
        offsets.astype(np.uint32),
        lengths.astype(np.uint16).reshape(n, n_slots),
    )
