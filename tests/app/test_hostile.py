"""Hostile pictures: the decoder's process takes or refuses each, and nothing survives of metadata.

A sample by default; `make hostile-images` sends all.
"""

from __future__ import annotations

import os
import resource

import pytest

from app.errors import UploadError
from app.photos.images import ImageLimits, ImageWorkers
from tests.fixtures.hostile import MARK, corpus

pytestmark = pytest.mark.anyio

N = int(os.environ.get("SHARDKIT_HOSTILE", "24"))
MOST_GROWTH = 64 << 10
"""KiB by which this process may grow: pictures are decoded elsewhere."""

SURVIVORS = (MARK, b"Secret Person", b"GPSLatitude", b"Exif\0\0", b"http://ns.adobe.com")


async def test_hostile_pictures_are_refused_or_made_new() -> None:
    limits = ImageLimits()
    found = list(corpus(N))
    if N < len(found):  # a sample: every n-th of those made by hand
        found = found[:: max(1, len(found) // N)]
    workers = ImageWorkers(1, limits)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    taken = refused = 0
    try:
        for name, data in found:
            try:
                prepared = await workers.prepare(data)
            except UploadError:
                refused += 1
                continue
            taken += 1
            for variant, made in prepared.variants.items():
                for survivor in SURVIVORS:
                    assert survivor not in made, (name, variant, survivor)
        again = await workers.prepare(dict(found)["tagged jpeg"])
        assert again.variants, "the decoder still works"
    finally:
        await workers.close()
    assert taken + refused == len(found)
    assert refused
    assert taken
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < MOST_GROWTH, f"{grown} KiB"
    decoders = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    assert decoders < limits.memory_bytes >> 10, f"{decoders} KiB"
    print(f"{len(found)} pictures: {taken} made new, {refused} refused; +{grown} KiB here")
