"""Crashes at every byte: no acknowledged picture is lost, and no wrong byte is read.

`make photo-torn` goes through every position (`SHARDKIT_TORN=all`); `make test` through a sample.
A crash leaves of what was being written any part: its beginning, its beginning with zeros or
garbage behind it, or its end, since the disk may order writes as it likes.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from app.photos.store import DamagedBlobError, VolumeBlobStore
from app.photos.store.compaction import compact, scrub
from app.photos.store.needle import DATA_AT, Address, alternate_of, encode_upload
from app.photos.store.needlemap import Entry
from app.photos.store.volume import Volume
from app.photos.store.volumefile import Claim

VARIANTS = ("1080.jpg", "640.jpg", "320.jpg", "150.jpg")
ALL = os.environ.get("SHARDKIT_TORN") == "all"
SAMPLE = None if ALL else 150
KILLS = 60 if ALL else 1
ALTERNATES = tuple(map(alternate_of, VARIANTS))


def data_for(key: int, variant: str, n: int = 0) -> bytes:
    """Return bytes that only this variant of this picture has, some hundred of them."""
    seed = hashlib.sha256(f"{key} {variant}".encode()).digest()
    return (seed * 10)[: n or 40 + seed[0]]


def encoded(volume: Volume, key: int, offset: int = 0) -> tuple[bytes, Entry]:
    variants = [(alternate_of(each), data_for(key, each)) for each in VARIANTS]
    data, units = encode_upload(key, key ^ 7, variants, volume.state.super.seed)
    return data, Entry(key, offset, tuple(units))


def append(volume: Volume, *keys: int) -> None:
    uploads, offset = [], 0
    for key in keys:
        uploads.append(encoded(volume, key, offset))
        offset += uploads[-1][1].units
    volume.append(uploads)


def address(key: int) -> Address:
    return Address(1, key, key ^ 7)


def opened(root: Path) -> Volume:
    claim = Claim.take(root, 1)
    assert claim is not None
    return Volume(root, 1, claim)


def close(volume: Volume) -> None:
    assert volume.claim is not None
    volume.claim.release()  # without a checkpoint, as when the process is killed


def read(volume: Volume, key: int) -> list[bytes | None]:
    return [volume.read(address(key), alternate) for alternate in ALTERNATES]


def whole(key: int) -> list[bytes]:
    return [data_for(key, variant) for variant in VARIANTS]


@dataclass
class World:
    """A volume as bytes: two pictures in the index, two behind it, one deleted, five on their way.

    Attributes:
        root: where crashed volumes are put.
        files: the files of the volume by ending, with what was on its way.
        acknowledged: length of the volume that was flushed.
    """

    root: Path
    files: dict[str, bytes]
    acknowledged: int

    LIVE = (11, 12, 13)
    DELETED = 14
    UNDERWAY = (21, 22, 23, 24, 25)
    ENDINGS = ("volume", "index", "deletes")

    def put(self, **changed: bytes) -> None:
        """Write the files as a crash has left them."""
        for ending, data in (self.files | changed).items():
            (self.root / f"00000001.{ending}").write_bytes(data)

    def check(self, *, is_thorough: bool) -> None:
        """Open the volume and read everything; then work on with it."""
        volume = opened(self.root)
        self.check_reads(volume)
        if is_thorough:
            append(volume, 31)
            close(volume)
            volume = opened(self.root)
            self.check_reads(volume)
            assert read(volume, 31) == whole(31)
        close(volume)

    def check_reads(self, volume: Volume) -> None:
        for key in self.LIVE:
            assert read(volume, key) == whole(key)
        assert read(volume, self.DELETED) == [None] * 4
        for key in self.UNDERWAY:
            for variant, alternate in zip(VARIANTS, ALTERNATES, strict=True):
                assert volume.read(address(key), alternate) in {None, data_for(key, variant)}


@pytest.fixture
def world(tmp_path: Path) -> World:
    claim = Claim.take(tmp_path, 1)
    assert claim is not None
    volume = Volume.create(tmp_path, 1, ALTERNATES, claim)
    append(volume, 11, 14)
    volume.checkpoint()
    append(volume, 12)
    append(volume, 13)
    assert volume.delete(address(14))
    acknowledged = volume.state.end
    append(volume, *World.UNDERWAY)
    close(volume)
    files = {each: (tmp_path / f"00000001.{each}").read_bytes() for each in World.ENDINGS}
    return World(tmp_path, files, acknowledged)


def sample(positions: range) -> Iterator[tuple[int, bool]]:
    """Yield positions, all or some, and whether to look closely."""
    chosen = list(positions)
    if SAMPLE is not None and SAMPLE < len(chosen):
        chosen = sorted(random.Random(len(chosen)).sample(chosen, SAMPLE))
    if ALL:
        print(f"{len(chosen)} positions")
    for n, position in enumerate(chosen):
        yield position, n % 10 == 0


GARBAGE = random.Random(1).randbytes(64 * 1024)
TORN: dict[str, Callable[[bytes, int, int], bytes]] = {
    "beginning": lambda data, _, at: data[:at],
    "zeros behind": lambda data, _, at: data[:at].ljust(len(data), b"\0"),
    "garbage behind": lambda data, _, at: data[:at] + GARBAGE[: len(data) - at],
    "end only": lambda data, start, at: data[:start] + bytes(at - start) + data[at:],
}


@pytest.mark.parametrize("how", TORN)
def test_a_torn_write_loses_nothing_acknowledged(world: World, how: str) -> None:
    data = world.files["volume"]
    for position, is_thorough in sample(range(world.acknowledged, len(data) + 1)):
        world.put(volume=TORN[how](data, world.acknowledged, position))
        world.check(is_thorough=is_thorough)


@pytest.mark.parametrize("how", ["cut", "flipped", "gone"])
def test_an_index_in_any_state_loses_nothing(world: World, how: str) -> None:
    index, data = world.files["index"], world.files["volume"][: world.acknowledged]
    assert len(index) > 40
    for position, is_thorough in sample(range(len(index))):
        flipped = index[:position] + bytes((index[position] ^ 0x40,)) + index[position + 1 :]
        broken = {"cut": index[:position], "flipped": flipped, "gone": b""}[how]
        world.put(volume=data, index=broken)
        world.check(is_thorough=is_thorough)


def test_a_torn_journal_brings_nothing_back(world: World) -> None:
    """The needles are marked, whatever became of the journal."""
    journal = world.files["deletes"]
    for position, is_thorough in sample(range(len(journal) + 1)):
        world.put(deletes=journal[:position], index=b"")
        world.check(is_thorough=is_thorough)


def test_a_journal_without_marks_is_enough(world: World) -> None:
    volume = opened(world.root)
    seed = volume.state.super.seed
    close(volume)
    variants = [(alternate_of(each), data_for(14, each)) for each in VARIANTS]
    unmarked, _ = encode_upload(14, 14 ^ 7, variants, seed)
    data = bytearray(world.files["volume"])
    at = DATA_AT + len(
        encode_upload(
            11, 0, [(a, data_for(11, v)) for a, v in zip(ALTERNATES, VARIANTS, strict=True)], seed
        )[0]
    )
    assert data[at : at + len(unmarked)] != unmarked
    data[at : at + len(unmarked)] = unmarked
    world.put(volume=bytes(data))
    world.check(is_thorough=True)
    assert (world.root / "00000001.volume").read_bytes()[at : at + len(unmarked)] != unmarked


def test_a_flipped_byte_is_never_served(world: World) -> None:
    """Of what is flushed: the rest is there, and what is damaged is an error or absent."""
    data = world.files["volume"][: world.acknowledged]
    n_damaged = 0
    for position, is_thorough in sample(range(len(data))):
        flipped = data[:position] + bytes((data[position] ^ 0x11,)) + data[position + 1 :]
        world.put(volume=flipped, index=world.files["index"] if is_thorough else b"")
        volume = opened(world.root)
        n_wrong = 0
        for key in world.LIVE:
            for variant, alternate in zip(VARIANTS, ALTERNATES, strict=True):
                try:
                    found = volume.read(address(key), alternate)
                except DamagedBlobError:
                    found = None
                assert found in {None, data_for(key, variant)}
                n_wrong += found is None
        # The last header of all might as well be torn off, and then its upload has never been.
        most = 4 if len(data) - position < 400 else 1
        assert n_wrong <= most, f"byte {position} cost {n_wrong} variants"
        n_damaged += n_wrong
        close(volume)
    assert n_damaged > 0


def test_a_scrub_names_what_is_damaged(world: World) -> None:
    data = bytearray(world.files["volume"])
    at = data.index(data_for(12, "640.jpg"))
    data[at + 3] ^= 1
    world.put(volume=bytes(data))
    found = scrub(world.root, 1)
    assert found.damaged == [f"{1:08x}{12:016x} 640.jpg"]
    assert found.lost_bytes > 0
    done = compact(world.root, 1)
    assert done is not None
    assert done.after < done.before
    assert scrub(world.root, 1).damaged == []
    volume = opened(world.root)
    assert read(volume, 12) == [None if v == "640.jpg" else data_for(12, v) for v in VARIANTS]
    assert read(volume, 11) == whole(11)
    close(volume)


def upload_until_killed(root: Path, first: int, pipe: Any) -> None:
    """Upload and delete without end, and say what was acknowledged."""
    import asyncio

    async def main() -> None:
        store = VolumeBlobStore(root, VARIANTS, volume_bytes=200_000)

        async def writer(number: int) -> None:
            for turn in range(10**6):
                key = first + turn * 100 + number
                variants = {each: data_for(key, each, 900) for each in VARIANTS}
                stored = await store.put(f"{key:016x}{key & 0xFFFFFFFF:08x}", variants)
                pipe.send(("put", stored))
                if turn % 5 == 4:
                    pipe.send(("deleting", stored))
                    await store.delete(stored)
                    pipe.send(("deleted", stored))

        await asyncio.gather(*(writer(number) for number in range(8)))

    asyncio.run(main())


@pytest.mark.fault
def test_kill_9_loses_nothing_acknowledged(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    rng = random.Random(5)
    stored: dict[str, str] = {}
    for turn in range(KILLS):
        receiver, sender = context.Pipe(duplex=False)
        first = 1_000_000_000 * (turn + 1)
        process = context.Process(target=upload_until_killed, args=(tmp_path, first, sender))
        process.start()
        sender.close()
        for _ in range(rng.randrange(20, 400)):
            what, key = receiver.recv()
            stored[key] = what
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        try:
            while True:
                what, key = receiver.recv()
                stored[key] = what
        except (EOFError, OSError):
            receiver.close()
        if turn % 3 == 1:
            compact(tmp_path, rng.choice([int(key[:8], 16) for key in stored]))
    check_stored(tmp_path, stored)


def check_stored(root: Path, stored: dict[str, str]) -> None:
    volumes: dict[int, Volume] = {}
    for text, what in stored.items():
        place = Address.parse(text)
        volume = volumes.setdefault(place.volume, Volume(root, place.volume))
        found = [volume.read(place, alternate) for alternate in ALTERNATES]
        right = [data_for(place.key, each, 900) for each in VARIANTS]
        if what == "put":
            assert found == right, text
        elif what == "deleted":
            assert found == [None] * 4, text
        else:
            assert found in ([None] * 4, right), text
    assert len(volumes) > 1
    for number in volumes:
        assert scrub(root, number).damaged == []
