"""Pictures for tests, good and bad; really encoded, never checked in."""

from __future__ import annotations

import struct
import zlib
from functools import cache
from typing import Any

import pyvips

__all__ = ["bomb_png", "jpeg", "png", "webp"]


def _scene(width: int, height: int) -> Any:
    ramp = pyvips.Image.xyz(width, height)
    red = ramp[0] * (255 / width)
    green = ramp[1] * (255 / height)
    return red.bandjoin([green, 255 - red]).cast("uchar").copy(interpretation="srgb")


@cache
def jpeg(
    width: int = 1600, height: int = 1200, *, orientation: int = 1, gps: bool = False
) -> bytes:
    """Return a JPEG of a colour ramp, with camera metadata when asked for."""
    picture = _scene(width, height).copy()
    if orientation != 1:
        picture.set_type(pyvips.GValue.gint_type, "orientation", orientation)
    if gps:
        picture.set_type(
            pyvips.GValue.gstr_type,
            "exif-ifd3-GPSLatitude",
            "52/1 31/1 12/1 (52, 31, 12, Rational, 3 components, 24 bytes)",
        )
        picture.set_type(
            pyvips.GValue.gstr_type,
            "exif-ifd0-Artist",
            "Secret Person (Secret Person, ASCII, 14 components, 14 bytes)",
        )
    return bytes(picture.jpegsave_buffer(Q=85))


@cache
def png(width: int = 800, height: int = 600) -> bytes:
    """Return a PNG with transparency."""
    scene = _scene(width, height)
    return bytes(scene.bandjoin(128).pngsave_buffer(compression=3))


@cache
def webp(width: int = 640, height: int = 800) -> bytes:
    """Return a WebP."""
    return bytes(_scene(width, height).webpsave_buffer(Q=70))


@cache
def bomb_png(side: int = 30_000) -> bytes:
    """Return a small PNG that decodes to `side` times `side` pixels."""
    row = zlib.compressobj(9)
    line = b"\0" * (1 + side)
    body = b"".join(row.compress(line) for _ in range(side)) + row.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        _chunk(kind, data) for kind, data in ((b"IHDR", header), (b"IDAT", body), (b"IEND", b""))
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
