"""The decoding process: reads untrusted pictures from stdin, writes the made variants to stdout.

Started by `app.photos.images` by its path, so that it imports nothing of the service: a picture
that takes over this process finds no database, no session and no open file. Memory, processor
time and file writing are limited before the image library is loaded. One request is a JSON line
with the length of the bytes that follow; one answer is a JSON line, on success followed by the
sizes. Never writes to a file, never opens a connection.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

SIZES: dict[int, bool] = {1080: False, 640: False, 320: True, 150: True}
"""Longest side in pixels, and whether it is cut to a square from the centre (for grids)."""

QUALITY = 82
"""JPEG quality; 82 keeps a 1080 pixel photo near 150 KB."""

WEBP_QUALITY, WEBP_EFFORT = 78, 2
"""Near the JPEG to the eye at two thirds of its bytes; more effort gains less than it costs."""

FORMATS = ("jpg", "webp")
"""What a picture may be made in: JPEG for everybody, WebP for whoever asks for it."""

LOADERS = (
    (b"\xff\xd8\xff", 0, "jpegload_buffer"),
    (b"\x89PNG\r\n\x1a\n", 0, "pngload_buffer"),
    (b"WEBP", 8, "webpload_buffer"),
)
"""Magic bytes, their offset, and the only loader then allowed to look at the rest."""

MAX_ICC_BYTES = 64 * 1024
"""A larger colour profile is dropped; the profiles cameras write are under 4 KB."""


class RefusedImageError(Exception):
    """The picture is refused; its one argument is the reason as a word."""


def main() -> None:
    """Answer requests until stdin ends."""
    memory_bytes, cpu_seconds = (int(text) for text in sys.argv[1:3])
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import pyvips  # noqa: PLC0415 - only after the limits are in force

    pyvips.cache_set_max(0)
    pyvips.block_untrusted_set(True)  # noqa: FBT003 - the library's own call
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while line := source.readline():
        request = json.loads(line)
        data = source.read(request["length"])
        _limit_cpu(cpu_seconds)
        try:
            variants, shape = make_variants(
                pyvips, data, request["max_pixels"], formats=request["formats"]
            )
        except RefusedImageError as refused:
            answer(sink, {"refused": refused.args[0]})
        except (pyvips.Error, MemoryError):
            answer(sink, {"refused": "damaged"})
        else:
            lengths = {name: len(blob) for name, blob in variants.items()}
            answer(sink, {"lengths": lengths, **shape}, variants.values())


def make_variants(
    pyvips: Any, data: bytes, max_pixels: int, *, formats: Sequence[str] = FORMATS
) -> tuple[dict[str, bytes], dict[str, int]]:
    """Decode a picture and return its variants, upright and without metadata.

    Args:
        pyvips: the image library; the demo passes its own, this process a limited one.
        data: the picture as uploaded.
        max_pixels: width times height allowed; checked on the header, before decoding.
        formats: some of `FORMATS`.

    Returns:
        Bytes by variant, such as `1080.jpg`, and `width` and `height` of the largest.

    Raises:
        RefusedImageError: not an allowed format, or too many pixels.
    """
    loader = next((load for magic, at, load in LOADERS if data.startswith(magic, at)), None)
    if loader is None:
        raise RefusedImageError("unsupported")
    header = getattr(pyvips.Image, loader)(data, access="sequential")
    if header.width * header.height > max_pixels:
        raise RefusedImageError("pixels")
    largest = max(SIZES)
    if loader == "jpegload_buffer":
        picture = _largest_of_jpeg(pyvips, data, max(header.width, header.height), largest)
    else:
        picture = pyvips.Image.thumbnail_buffer(
            data, largest, height=largest, size="down", option_string="[fail_on=truncated]"
        )
    return encode_variants(_plain(picture).copy_memory(), formats)


def _largest_of_jpeg(pyvips: Any, data: bytes, side: int, largest: int) -> Any:
    """Return the largest size of a JPEG, upright, decoded at the least scale that is enough.

    libvips' own thumbnails leave a factor of two for the filter and decode four times the pixels
    for it; the picture is turned when it is small, so the decoder may read in order.
    """
    shrink = next(factor for factor in (8, 4, 2, 1) if factor == 1 or side >= factor * largest)
    picture = pyvips.Image.jpegload_buffer(
        data, shrink=shrink, access="sequential", fail_on="truncated"
    )
    picture = picture.thumbnail_image(largest, height=largest, size="down", no_rotate=True)
    return picture.copy_memory().autorot()


def encode_variants(
    picture: Any, formats: Sequence[str] = FORMATS
) -> tuple[dict[str, bytes], dict[str, int]]:
    """Return the variants of a decoded picture, and `width` and `height` of the largest."""
    variants: dict[str, bytes] = {}
    scaled = picture
    for size, square in SIZES.items():
        if size < max(picture.width, picture.height):  # of the next larger one: the middle stays
            scaled = scaled.thumbnail_image(
                size, height=size, size="down", crop="centre" if square else "none"
            ).copy_memory()
        for ending in formats:
            variants[f"{size}.{ending}"] = _encoded(scaled, ending)
    return variants, {"width": picture.width, "height": picture.height}


def _encoded(picture: Any, ending: str) -> bytes:
    if ending == "webp":
        return bytes(picture.webpsave_buffer(Q=WEBP_QUALITY, effort=WEBP_EFFORT, keep="icc"))
    return bytes(picture.jpegsave_buffer(Q=QUALITY, keep="icc", optimize_coding=True))


def _plain(picture: Any) -> Any:
    """Return the picture as 8 bit sRGB or grey on white, with a colour profile of sane size."""
    if picture.hasalpha():
        picture = picture.flatten(background=255)
    oversized = _profile_bytes(picture) > MAX_ICC_BYTES
    if oversized or picture.interpretation == "cmyk":
        picture = picture.colourspace("srgb").copy()
        if _profile_bytes(picture):
            picture.remove("icc-profile-data")
    if picture.interpretation not in {"srgb", "b-w"}:
        picture = picture.colourspace("srgb")
    if picture.format != "uchar":
        picture = picture.cast("uchar")
    return picture


def _profile_bytes(picture: Any) -> int:
    """Return the size of the embedded colour profile, 0 without one."""
    if "icc-profile-data" not in picture.get_fields():
        return 0
    return len(picture.get("icc-profile-data"))


def _limit_cpu(seconds: int) -> None:
    """Allow so many more seconds of processor time; the kernel ends the process after that."""
    allowed = int(time.process_time()) + seconds + 1
    resource.setrlimit(resource.RLIMIT_CPU, (allowed, resource.RLIM_INFINITY))


def answer(sink: BinaryIO, head: Mapping[str, Any], blobs: Iterable[bytes] = ()) -> None:
    """Write one answer."""
    sink.write(json.dumps(head).encode() + b"\n")
    sink.writelines(blobs)
    sink.flush()


if __name__ == "__main__":
    main()
