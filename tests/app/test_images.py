"""Uploaded pictures: what is taken, what is refused, and what is left of the metadata."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
import pyvips

from app.errors import (
    DamagedImageError,
    EmptyUploadError,
    TooManyPixelsError,
    UnsupportedImageError,
    UploadError,
)
from app.photos.images import VARIANTS, ImageLimits, ImageWorkers
from tests.fixtures import pictures

pytestmark = pytest.mark.anyio


@pytest.fixture
async def workers() -> AsyncIterator[ImageWorkers]:
    workers = ImageWorkers(1)
    yield workers
    await workers.close()


def opened(data: bytes) -> Any:
    return pyvips.Image.new_from_buffer(data, "")


@pytest.mark.parametrize(
    ("data", "shape"),
    [
        (pictures.jpeg(), (1080, 810)),
        (pictures.png(), (800, 600)),
        (pictures.webp(), (640, 800)),
        (pictures.jpeg(1, 1), (1, 1)),
        (pictures.jpeg(8000, 40), (1080, 5)),
        (pictures.cmyk_jpeg(), (300, 200)),
        (pictures.deep_png(), (300, 200)),
        (pictures.grey_webp(), (300, 200)),
        (pictures.wide_gamut_jpeg(), (300, 200)),
        *((pictures.jpeg(orientation=n), (1080, 810)) for n in (2, 3, 4)),
        *((pictures.jpeg(orientation=n), (810, 1080)) for n in (5, 6, 7, 8)),
    ],
)
async def test_four_sizes(workers: ImageWorkers, data: bytes, shape: tuple[int, int]) -> None:
    prepared = await workers.prepare(data)

    assert (prepared.width, prepared.height) == shape
    assert set(prepared.variants) == set(VARIANTS)
    for variant, made in prepared.variants.items():
        size, _, ending = variant.partition(".")
        picture = opened(made)
        assert made.startswith(b"\xff\xd8\xff" if ending == "jpg" else b"RIFF")
        assert max(picture.width, picture.height) <= int(size)
        assert picture.bands in {1, 3}
    small = opened(prepared.variants["150.webp"])
    if min(shape) >= 150:
        assert (small.width, small.height) == (150, 150)


async def test_all_metadata_is_gone(workers: ImageWorkers) -> None:
    source = pictures.jpeg(gps=True, orientation=6)
    assert b"Secret Person" in source

    prepared = await workers.prepare(source)

    for made in prepared.variants.values():
        assert b"Secret" not in made
        assert b"Exif" not in made
        fields = opened(made).get_fields()
        assert not [name for name in fields if name.startswith(("exif", "xmp", "iptc"))]


async def test_colours_stay_what_they_were(workers: ImageWorkers) -> None:
    """The middle of the ramp is grey-blue whatever the file's way to write it."""
    for data in (pictures.jpeg(300, 200), pictures.cmyk_jpeg(), pictures.wide_gamut_jpeg()):
        prepared = await workers.prepare(data)
        picture = opened(prepared.variants["1080.jpg"])
        if "icc-profile-data" in picture.get_fields():
            picture = picture.icc_transform("srgb")
        middle = picture.colourspace("srgb").getpoint(picture.width // 2, picture.height // 2)
        assert middle == pytest.approx([127, 127, 128], abs=14)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", EmptyUploadError),
        (b"\xff", UnsupportedImageError),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", UnsupportedImageError),
        (b"<!doctype html><script>1</script>", UnsupportedImageError),
        (b"GIF89a" + bytes(200), UnsupportedImageError),
        (b"RIFF\0\0\0\0WAVEfmt " + bytes(100), UnsupportedImageError),
        (b"\xff\xd8\xff" + bytes(500), DamagedImageError),
        (pictures.jpeg()[: len(pictures.jpeg()) // 2], DamagedImageError),
        (pictures.png()[:-2000], DamagedImageError),
        (pictures.webp()[:-500], DamagedImageError),
        (pictures.bomb_png(), TooManyPixelsError),
    ],
    ids=[
        "empty",
        "one byte",
        "svg",
        "html",
        "gif",
        "wave in riff",
        "magic only",
        "half a jpeg",
        "cut png",
        "cut webp",
        "30000 x 30000 png",
    ],
)
async def test_refused(workers: ImageWorkers, data: bytes, error: type[UploadError]) -> None:
    with pytest.raises(error):
        await workers.prepare(data)

    assert (await workers.prepare(pictures.jpeg(200, 200))).width == 200


async def test_memory_limit_refuses_and_the_next_picture_works() -> None:
    workers = ImageWorkers(1, replace(ImageLimits(), max_pixels=1 << 40, memory_bytes=256 << 20))
    try:
        with pytest.raises(DamagedImageError):
            await workers.prepare(interlaced_giant())
        assert (await workers.prepare(pictures.jpeg(200, 200))).width == 200
    finally:
        await workers.close()


def interlaced_giant() -> bytes:
    """Return a PNG whose decoder has to hold all of its 300 MB at once."""
    return bytes(
        pyvips.Image.black(10_000, 10_000, bands=3).pngsave_buffer(compression=1, interlace=True)
    )


async def test_killed_worker_costs_no_upload(workers: ImageWorkers) -> None:
    await workers.prepare(pictures.jpeg(200, 200))
    (worker,) = workers._idle
    os.kill(worker.process.pid, signal.SIGKILL)

    assert (await workers.prepare(pictures.jpeg(200, 200))).width == 200


async def test_a_process_is_replaced_after_many_pictures(
    workers: ImageWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageWorkers, "PICTURES_PER_PROCESS", 2)
    seen = set()
    for _ in range(3):
        await workers.prepare(pictures.jpeg(200, 200))
        seen |= {worker.process.pid for worker in workers._idle}
    assert len(seen) == 2
    assert len(workers._idle) == 1


async def test_timeout_kills_the_worker() -> None:
    workers = ImageWorkers(1, replace(ImageLimits(), timeout=0.001))
    with pytest.raises(DamagedImageError):
        await workers.prepare(pictures.jpeg())
    assert not workers._idle
    await workers.close()
