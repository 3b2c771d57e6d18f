"""Needle volumes between processes, and what operators do to them."""

from __future__ import annotations

import asyncio
import errno
import multiprocessing
import os
import random
import secrets
from pathlib import Path
from typing import Any

import pytest

from app.photos.store import DamagedBlobError, VolumeBlobStore
from app.photos.store.compaction import compact, scrub, stats
from app.photos.store.needle import DATA_AT, Address, encode_upload
from app.photos.store.needlemap import RECENT, Entry, NeedleMap, table_of
from app.photos.store.volume import Volume
from app.photos.store.volumefile import Claim, numbers_in, volume_path

VARIANTS = ("1080.jpg", "640.jpg", "320.jpg", "150.jpg")

pytestmark = pytest.mark.anyio


def name() -> str:
    return secrets.token_hex(12)


def picture(n: int = 300) -> dict[str, bytes]:
    return {variant: secrets.token_bytes(n) for variant in VARIANTS}


async def filled(root: Path, n: int, **options: Any) -> tuple[VolumeBlobStore, dict[str, Any]]:
    store = VolumeBlobStore(root, VARIANTS, **options)
    pictures = [picture() for _ in range(n)]
    keys = await asyncio.gather(*(store.put(name(), each) for each in pictures))
    return store, dict(zip(keys, pictures, strict=True))


async def check(store: VolumeBlobStore, stored: dict[str, Any]) -> None:
    for key, variants in stored.items():
        for variant, data in variants.items():
            assert await store.get(key, variant) == data, (key, variant)


async def test_uploads_at_once_share_a_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushes = []
    flush = os.fdatasync

    def counted(descriptor: int) -> None:
        flushes.append(descriptor)
        flush(descriptor)

    monkeypatch.setattr(os, "fdatasync", counted)
    store, stored = await filled(tmp_path, 64)
    assert len(flushes) <= 3
    await check(store, stored)
    await store.close()


async def test_full_volumes_are_sealed_and_read_on(tmp_path: Path) -> None:
    store, stored = await filled(tmp_path, 40, volume_bytes=8_000, group_uploads=2)
    assert len(numbers_in(tmp_path)) > 3
    found = stats(tmp_path)
    assert [each.is_sealed for each in found[:-1]] == [True] * (len(found) - 1)
    assert sum(each.uploads for each in found) == 40
    await check(store, stored)
    await store.close()
    again = VolumeBlobStore(tmp_path, VARIANTS, volume_bytes=8_000)
    await check(again, stored)
    key = await again.put(name(), picture())
    assert int(key[:8], 16) == found[-1].volume, "the volume that is not full is taken up again"
    await again.close()


async def test_two_processes_have_volumes_of_their_own_and_read_each_others(tmp_path: Path) -> None:
    first, stored = await filled(tmp_path, 3)
    second, more = await filled(tmp_path, 3)
    assert {int(key[:8], 16) for key in stored} == {1}
    assert {int(key[:8], 16) for key in more} == {2}
    await check(first, more)
    await check(second, stored)
    later = await second.put(name(), given := picture())
    await check(first, {later: given})  # the map of the reader did not have it
    await first.delete(later)
    assert await second.get(later, "150.jpg") is None
    await first.close()
    await second.close()


async def test_compaction_beside_readers_and_deletes(tmp_path: Path) -> None:
    """What is deleted is gone for all, before, during and after; the rest is there throughout."""
    store, stored = await filled(tmp_path, 200)
    reader = VolumeBlobStore(tmp_path, VARIANTS)
    await check(reader, stored)
    doomed = list(stored)[::2]
    for key in doomed[:80]:
        await store.delete(key)
        del stored[key]
    await store.close()
    before = volume_path(tmp_path, 1).stat().st_size
    compacting = asyncio.create_task(asyncio.to_thread(compact, tmp_path, 1))
    for key in doomed[80:]:
        await reader.delete(key)
        del stored[key]
        assert await reader.get(key, "150.jpg") is None
    done = await compacting
    assert done is not None
    assert (done.before, volume_path(tmp_path, 1).stat().st_size) == (before, done.after)
    for each in (reader, VolumeBlobStore(tmp_path, VARIANTS)):
        await check(each, stored)
        for key in doomed:
            assert await each.get(key, "150.jpg") is None
        assert {key async for key in each.iterate_keys()} == set(stored)
    kept = next(iter(stored))
    await reader.delete(kept)
    assert await store.get(kept, "150.jpg") is None, "a reader of the old file sees it"
    again = compact(tmp_path, 1)
    assert again is not None
    (found,) = stats(tmp_path)
    assert (found.uploads, found.dead_bytes, found.bytes) == (len(stored) - 1, 0, again.after)
    assert scrub(tmp_path, 1).lost_bytes == 0


async def test_a_volume_in_use_is_sealed_and_compacted_later(tmp_path: Path) -> None:
    store, stored = await filled(tmp_path, 2)
    assert compact(tmp_path, 1) is None
    key = await store.put(name(), given := picture())
    assert int(key[:8], 16) == 2
    assert compact(tmp_path, 1) is not None
    await check(store, stored | {key: given})
    await store.close()


@pytest.mark.parametrize("failing", ["pwritev", "fdatasync"])
async def test_a_full_or_broken_disk_fails_uploads_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    store, stored = await filled(tmp_path, 3)
    number = errno.ENOSPC if failing == "pwritev" else errno.EIO

    def fail(*_: Any) -> int:
        raise OSError(number, "as if")

    with monkeypatch.context() as broken:
        broken.setattr(os, failing, fail)
        with pytest.raises(OSError, match="as if") as caught:
            await store.put(name(), picture())
        assert caught.value.errno == number
    await check(store, stored)
    key = await store.put(name(), given := picture())
    await check(store, stored | {key: given})
    await store.close()
    await check(VolumeBlobStore(tmp_path, VARIANTS), stored | {key: given})
    assert [scrub(tmp_path, each).lost_bytes for each in numbers_in(tmp_path)] == [0, 0]


async def test_a_full_disk_does_not_keep_from_deleting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, stored = await filled(tmp_path, 2)
    key = next(iter(stored))
    truncate = os.ftruncate

    def full(descriptor: int, length: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink().suffix == ".deletes":
            raise OSError(errno.ENOSPC, "as if")
        truncate(descriptor, length)

    with monkeypatch.context() as broken:
        broken.setattr(os, "ftruncate", full)
        await store.delete(key)
    assert await store.get(key, "150.jpg") is None
    await store.close()
    assert await VolumeBlobStore(tmp_path, VARIANTS).get(key, "150.jpg") is None


async def test_a_lost_superblock_is_read_from_its_copy(tmp_path: Path) -> None:
    store, stored = await filled(tmp_path, 2)
    await store.close()
    with volume_path(tmp_path, 1).open("r+b") as file:
        file.write(bytes(64))
    await check(VolumeBlobStore(tmp_path, VARIANTS), stored)
    with volume_path(tmp_path, 1).open("r+b") as file:
        file.write(bytes(DATA_AT))
    broken = VolumeBlobStore(tmp_path, VARIANTS)
    with pytest.raises(DamagedBlobError, match="superblocks"):
        await broken.get(next(iter(stored)), "150.jpg")
    assert int((await broken.put(name(), picture()))[:8], 16) == 2, "another one is written to"
    await broken.close()


async def test_what_looks_like_a_needle_inside_a_picture_is_none(tmp_path: Path) -> None:
    """Nobody outside knows the seed, so damage around a picture brings no forged one to light."""
    store, stored = await filled(tmp_path, 1)
    forged, _ = encode_upload(77, 7, [(150, b"forged")], seed=0)
    key = await store.put(name(), {"1080.jpg": bytes(24) + bytes(forged) * 20})
    await store.close()
    data = bytearray(volume_path(tmp_path, 1).read_bytes())
    at = data.index(forged)
    data[at - at % 32 - 32] ^= 0xFF  # the header of the needle that carries them
    volume_path(tmp_path, 1).write_bytes(data)
    volume_path(tmp_path, 1).with_suffix(".index").unlink()
    volume = Volume(tmp_path, 1)
    assert volume.read(Address(1, 77, 7), 150) is None
    assert [entry.key for entry in volume.state.map.entries()] == [
        int(each[8:24], 16) for each in stored
    ]
    assert key not in stored


def test_the_map_is_a_dictionary_in_small() -> None:
    rng = random.Random(4)
    kept: dict[int, Entry] = {}
    found = NeedleMap(3)
    for turn in range(3 * RECENT):
        key = rng.randrange(RECENT) << 52 | rng.randrange(3)
        if turn % 7 == 0:
            found.remove(key)
            kept.pop(key, None)
            continue
        kept[key] = Entry(key, 6 + turn, (turn % 9, 1, 0xFFFF))
        found.add(kept[key])
    more = [Entry(2**64 - 1 - n, 2**32 - 1 - n, (1, 2, 3)) for n in range(9)]
    found.extend([table_of(more, 3)])
    kept |= {each.key: each for each in more}
    assert {entry.key: entry for entry in found.entries()} == kept
    assert all(found.find(key) == entry for key, entry in kept.items())
    assert found.find(5) is None
    assert found.n_bytes <= 18 * (len(kept) + RECENT * 3 // 7)


def hold(root: Path, pipe: Any) -> None:
    claim = Claim.take(root, 1)
    pipe.send(claim is not None)
    pipe.recv()


def test_a_claim_is_one_processs_and_ends_with_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=hold, args=(tmp_path, theirs))
    process.start()
    assert ours.recv() is True
    assert Claim.take(tmp_path, 1) is None
    process.kill()
    process.join()
    claim = Claim.take(tmp_path, 1)
    assert claim is not None
    claim.release()
