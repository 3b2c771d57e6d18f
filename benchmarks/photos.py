"""What a picture costs to read, to keep and to make, against what else one would take.

Cold reads, on a disk of the benchmark's own whose caches are dropped before each arm: needle
volumes, one file per image in two levels of folders, RocksDB's BlobDB as it is after a start and
with its whole index in memory, and bare `pread` of the same bytes. All keep the same number of
images; most are a few bytes, since nobody reads them. One thread, the arms in turns, image by
image. Group commit: 32 writers, against a flush for each upload, for pictures of 8 KB with all
their sizes and of 90 KB, where the disk's bandwidth is the limit. Resizing: a JPEG of 12 megapixels
to the four sizes, against Pillow with `draft()`, one thread each. Memory and restart: a volume of
ten million images.
"""

from __future__ import annotations

import asyncio
import gc
import io
import os
import random
import secrets
import shutil
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from app.photos import decoder
from app.photos.store import VolumeBlobStore
from app.photos.store.indexfile import append_block
from app.photos.store.needle import DATA_AT, UNIT, Address, alternate_of
from app.photos.store.needlemap import Entry
from app.photos.store.volume import Volume
from app.photos.store.volumefile import Claim
from benchmarks.loopdisk import Counts, LoopDisk
from benchmarks.measure import report

PEERS = ("one file per image", "RocksDB BlobDB", "Pillow draft()")
TARGETS = {
    "device_reads_per_image": "≤ 1.05",
    "device_reads_per_file": "≥ 2.5",
    "cold_vs_files": "≥ 2",
    "cold_vs_blobdb": "≥ 1.2",
    "ram_bytes_per_image": "≤ 6",
    "group_commit_gain": "≥ 8",
    "resize_vs_pillow_draft": "≥ 1.5",
}
VARIANTS = ("1080.jpg", "640.jpg", "320.jpg", "150.jpg")
ALTERNATES = tuple(map(alternate_of, VARIANTS))
SHARES = (0.62, 0.25, 0.09, 0.04)
"""Of an upload's bytes, by size, as JPEGs of photographs have them."""

TINY: Final = b"."
"""An image that is there to be in the way."""

WRITERS = 32
Read = Callable[[str, str], object]
"""Reads an image by the key and the variant."""


@dataclass(frozen=True)
class ColdSize:
    """How much there is to read, and how much of it is read."""

    uploads: int
    images: int
    rounds: int
    reads: int


def main(*, as_json: bool, quick: bool = False) -> None:
    os.environ["VIPS_CONCURRENCY"] = "1"
    figures: dict[str, float] = {}
    medians: dict[str, float] = {}
    with LoopDisk.made(gigabytes=8 if quick else 24) as disk:
        size = ColdSize(8_000, 240_000, 5, 500) if quick else ColdSize(40_000, 600_000, 9, 1500)
        cold(disk, size, figures, medians)
        group_commit(disk.folder / "group", 9 if quick else 21, figures)
    memory(figures)
    resize(5 if quick else 15, figures, medians)
    report("photos", figures, peers=PEERS, medians=medians, targets=TARGETS, as_json=as_json)


def pictures(n: int, upload_bytes: int, rng: random.Random) -> Iterator[tuple[str, list[bytes]]]:
    """Yield names and variants whose sizes vary as those of photographs do."""
    noise = rng.randbytes(4 << 20)
    for _ in range(n):
        total = upload_bytes * rng.lognormvariate(0, 0.35)
        lengths = [max(300, int(total * share)) for share in SHARES]
        starts = [rng.randrange(len(noise) - length) for length in lengths]
        variants = [noise[a : a + length] for a, length in zip(starts, lengths, strict=True)]
        yield rng.randbytes(12).hex(), variants


class Stored:
    """The same pictures in every store, with what reads one of them.

    Args:
        disk: where they are.
        n_uploads: pictures, of four sizes each.
        n_images: images of every store. Those that are of no picture are `TINY`: nobody reads
            them, but they cost an inode and a name, a key of RocksDB, an entry of the map.
    """

    def __init__(self, disk: LoopDisk, n_uploads: int, n_images: int) -> None:
        self.disk = disk
        self.needles, self.files, self.rocks, self.warm_rocks = (
            disk.folder / name for name in ("needles", "files", "rocks", "warm-rocks")
        )
        self.keys: list[str] = []
        asyncio.run(self._fill(n_uploads, n_images // (4 * n_uploads) - 1))
        shutil.copytree(self.rocks, self.warm_rocks)

    async def _fill(self, n_uploads: int, n_tiny: int) -> None:
        rng = random.Random(7)
        store = VolumeBlobStore(self.needles, VARIANTS, volume_bytes=64 << 30)
        rocks = opened_rocks(self.rocks)
        make_folders(self.files)
        batch = []
        for number, (picture, variants) in enumerate(pictures(n_uploads, 60_000, rng), 1):
            tiny = ((rng.randbytes(12).hex(), [TINY] * len(VARIANTS)) for _ in range(n_tiny))
            for name, images in ((picture, variants), *tiny):
                named = dict(zip(VARIANTS, images, strict=True))
                batch.append(store.put(name, named))
                for variant, data in named.items():
                    file_of(self.files, name, variant).write_bytes(data)
                    rocks[f"{name}{variant}".encode()] = data
            if number % 100 == 0 or number == n_uploads:
                self.keys += (await asyncio.gather(*batch))[:: 1 + n_tiny]
                batch = []
        await store.close()
        rocks.flush()
        rocks.compact_range(None, None)
        rocks.close()

    @contextmanager
    def arms(self) -> Iterator[dict[str, Read]]:
        """Open every store after all caches were dropped; each reads by key and variant."""
        gc.collect()
        self.disk.forget()
        numbers = {int(key[:8], 16) for key in self.keys}
        volumes = {number: Volume(self.needles, number) for number in numbers}
        for table in self.warm_rocks.glob("*.sst"):
            table.read_bytes()
        rocks, warm_rocks = opened_rocks(self.rocks), opened_rocks(self.warm_rocks)

        def by_needle(key: str, variant: str) -> object:
            address = Address.parse(key)
            return volumes[address.volume].read(address, alternate_of(variant))

        def by_file(key: str, variant: str) -> object:
            return file_of(self.files, key[8:], variant).read_bytes()

        def by_rocks(key: str, variant: str) -> object:
            return rocks[f"{key[8:]}{variant}".encode()]

        def by_warm_rocks(key: str, variant: str) -> object:
            return warm_rocks[f"{key[8:]}{variant}".encode()]

        def by_pread(key: str, variant: str) -> object:
            state = volumes[int(key[:8], 16)].state
            found = state.map.find(int(key[8:24], 16))
            assert found is not None
            offset, units = found.at(VARIANTS.index(variant))
            return os.pread(state.file.descriptor, units * UNIT, offset * UNIT)

        yield {
            "needle": by_needle,
            "file": by_file,
            "blobdb": by_rocks,
            "blobdb, index in memory": by_warm_rocks,
            "pread": by_pread,
        }
        rocks.close()
        warm_rocks.close()
        volumes.clear()  # closes them: the readers outlive this


def opened_rocks(folder: Path) -> Any:
    """Open a BlobDB; everything else is as RocksDB has it, checksums too."""
    from rocksdict import Options, Rdict  # noqa: PLC0415 - the other figures do without

    options = Options(raw_mode=True)
    options.create_if_missing(True)  # noqa: FBT003 - the library's own call
    options.set_enable_blob_files(True)
    options.set_min_blob_size(0)
    return Rdict(str(folder), options)


def cold(
    disk: LoopDisk, size: ColdSize, figures: dict[str, float], medians: dict[str, float]
) -> None:
    """Read pictures nobody has read for long, one by one, each arm others than the last.

    Times are compared round by round, as means of single reads without the slowest twentieth: the
    disk is shared, and its bad moments hit whoever reads just then.
    """
    stored = Stored(disk, size.uploads, size.images)
    rng = random.Random(11)
    seconds: dict[str, list[float]] = {}
    read_counts: dict[str, list[Counts]] = {}
    for _ in range(size.rounds):
        took: dict[str, list[float]] = {}
        with stored.arms() as arms:
            for _ in range(size.reads):
                for name, read in arms.items():
                    key, variant = rng.choice(stored.keys), rng.choice(VARIANTS)
                    before, start = disk.counts(), time.perf_counter()
                    data = read(key, variant)
                    took.setdefault(name, []).append(time.perf_counter() - start)
                    after = disk.counts()
                    assert data
                    read_counts.setdefault(name, []).append(
                        Counts(after.reads - before.reads, after.n_bytes - before.n_bytes)
                    )
        for name, each in took.items():
            seconds.setdefault(name, []).append(trimmed(each))
    medians |= {f"cold read, {name}": statistics.median(took) for name, took in seconds.items()}
    for name, figure in (
        ("needle", "image"),
        ("file", "file"),
        ("blobdb", "blobdb"),
        ("blobdb, index in memory", "blobdb_in_memory"),
    ):
        found = read_counts[name]
        figures[f"device_reads_per_{figure}"] = statistics.mean(each.reads for each in found)
        figures[f"device_kib_per_{figure}"] = statistics.mean(each.n_bytes for each in found) / 1024
    for name, figure in (
        ("file", "cold_vs_files"),
        ("blobdb", "cold_vs_blobdb"),
        ("blobdb, index in memory", "cold_vs_blobdb_in_memory"),
        ("pread", "cold_vs_pread"),
    ):
        spread(figure, seconds[name], seconds["needle"], figures)


def spread(
    figure: str, slow: Sequence[float], quick: Sequence[float], figures: dict[str, float]
) -> None:
    """Report the median of the rounds' ratios, and the least and the greatest of them."""
    ratios = [a / b for a, b in zip(slow, quick, strict=True)]
    figures[figure] = statistics.median(ratios)
    figures[f"{figure}_least"] = min(ratios)
    figures[f"{figure}_greatest"] = max(ratios)


def trimmed(took: Sequence[float]) -> float:
    """Return the mean without the slowest twentieth."""
    return statistics.mean(sorted(took)[: len(took) * 95 // 100])


def ratio(slow: Sequence[float], quick: Sequence[float]) -> float:
    """Return the median of the rounds' ratios: both sides of one saw the same noise."""
    return statistics.median(a / b for a, b in zip(slow, quick, strict=True))


def make_folders(root: Path) -> None:
    """Make two levels of 64 folders."""
    for number in range(64 * 64):
        file_of(root, f"{number:04x}".ljust(24, "0"), "").parent.mkdir(parents=True, exist_ok=True)


def file_of(root: Path, name: str, variant: str) -> Path:
    """Return the file of an image in two levels of 64 folders."""
    number = int(name[:4], 16)
    return root / f"{number & 63:02d}" / f"{number >> 6 & 63:02d}" / f"{name}-{variant}"


def group_commit(folder: Path, rounds: int, figures: dict[str, float]) -> None:
    """Upload with 32 writers, flushed together and one by one, in many short rounds.

    The arms change places every round, and each round is a ratio of its own.
    """
    for upload_bytes, figure in ((8_000, "group_commit_gain"), (90_000, "group_commit_gain_90kb")):
        ready = [
            dict(zip(VARIANTS, variants, strict=True))
            for _, variants in pictures(200, upload_bytes, random.Random(3))
        ]
        seconds: dict[int, list[float]] = {1: [], 1024: []}
        grouped: list[float] = []
        for turn in range(rounds):
            for most in sorted(seconds, reverse=turn % 2 == 1):
                root = folder / f"{figure}-{turn}-{most}"
                found = asyncio.run(upload(root, ready, most, 0.7))
                seconds[most].append(found.seconds / found.uploads)
                if most > 1:
                    grouped.append(found.uploads / found.flushes)
                shutil.rmtree(root)
        spread(figure, seconds[1], seconds[1024], figures)
        if figure == "group_commit_gain":
            figures["uploads_a_second"] = 1 / statistics.median(seconds[1024])
            figures["uploads_a_flush"] = statistics.median(grouped)


class Uploaded(NamedTuple):
    """What 32 writers have done."""

    uploads: int
    flushes: int
    seconds: float


async def upload(
    root: Path, ready: Sequence[dict[str, bytes]], most: int, seconds: float
) -> Uploaded:
    """Upload with 32 writers; each has one upload under way."""
    store = VolumeBlobStore(root, VARIANTS, group_uploads=most)
    await store.put(secrets.token_hex(12), ready[0])
    done = 0
    n_before, start = store.n_flushes, time.perf_counter()

    async def writer(number: int) -> None:
        nonlocal done
        while time.perf_counter() - start < seconds:
            await store.put(secrets.token_hex(12), ready[(number + done) % len(ready)])
            done += 1

    await asyncio.gather(*(writer(number) for number in range(WRITERS)))
    found = Uploaded(done, store.n_flushes - n_before, time.perf_counter() - start)
    await store.close()
    return found


def memory(figures: dict[str, float]) -> None:
    """Open a volume of 2.5 million uploads by its index, and add some."""
    n, block = 2_500_000, 100_000
    rng = np.random.default_rng(5)
    with tempfile.TemporaryDirectory() as text:
        root = Path(text)
        claim = Claim.take(root, 1)
        assert claim is not None
        volume = Volume.create(root, 1, ALTERNATES, claim)
        first = DATA_AT // UNIT
        data = volume.state.super.incarnation
        for at in range(0, n, block):
            offsets = np.arange(first + at * 40, first + (at + block) * 40, 40)
            keys = rng.integers(0, 2**63, block, np.uint64)
            lengths = np.full((block, 4), 10, np.uint16)
            table = keys, offsets.astype(np.uint32), lengths
            append_block(volume.index_path, data, DATA_AT + (at + block) * 40 * UNIT, table)
        os.truncate(volume.path, DATA_AT + n * 40 * UNIT)
        claim.release()
        del volume
        gc.collect()
        tracemalloc.start()
        volume = Volume(root, 1)
        for number in range(2000):
            volume.state.map.add(Entry(number, 10 + number, (10, 10, 10, 10)))
        gc.collect()
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        figures["ram_bytes_per_image"] = held / (4 * n)
        start = time.perf_counter()
        Volume(root, 1)
        figures["restart_seconds_10m_images"] = time.perf_counter() - start


def resize(rounds: int, figures: dict[str, float], medians: dict[str, float]) -> None:
    """Make the four sizes of a photograph of 12 megapixels."""
    import pyvips  # noqa: PLC0415 - after its number of threads is set
    from PIL import Image as Pillow  # noqa: PLC0415
    from PIL import ImageOps  # noqa: PLC0415

    pyvips.cache_set_max(0)
    source = photograph(pyvips)

    def by_vips() -> None:
        made, _ = decoder.make_variants(pyvips, source, 40_000_000, formats=("jpg",))
        assert len(made) == 4

    def by_pillow() -> None:
        opened = Pillow.open(io.BytesIO(source))
        opened.draft("RGB", (max(decoder.SIZES), max(decoder.SIZES)))
        picture = ImageOps.exif_transpose(opened)
        picture.thumbnail((max(decoder.SIZES), max(decoder.SIZES)), Pillow.Resampling.LANCZOS)
        for size, square in decoder.SIZES.items():
            scaled: Any
            if square:
                scaled = ImageOps.fit(picture, (size, size), Pillow.Resampling.LANCZOS)
            else:
                scaled = picture.copy()
                scaled.thumbnail((size, size), Pillow.Resampling.LANCZOS)
            scaled.save(io.BytesIO(), "JPEG", quality=decoder.QUALITY, optimize=True)

    arms = {"resize, vips": by_vips, "resize, Pillow": by_pillow}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 1):
        for name, run in arms.items():
            start = time.process_time()
            run()
            if turn:
                seconds[name].append(time.process_time() - start)
    medians |= {name: statistics.median(took) for name, took in seconds.items()}
    figures["resize_vs_pillow_draft"] = ratio(seconds["resize, Pillow"], seconds["resize, vips"])


def photograph(pyvips: Any) -> bytes:
    """Return a JPEG of 4096 by 3072 with the detail of a photograph, 4:2:0 as phones make it."""
    soft = [
        pyvips.Image.gaussnoise(4096 // step, 3072 // step, mean=128, sigma=60, seed=step).resize(
            step
        )
        for step in (64, 16, 4)
    ]
    plane = (soft[0] + soft[1] * 0.5 + soft[2] * 0.2) / 1.7
    picture = plane.bandjoin([plane.rot180(), plane.fliphor()]).cast("uchar")
    saved = picture.copy(interpretation="srgb").jpegsave_buffer(Q=90, subsample_mode="on")
    return bytes(saved)
