"""`make bench-idmap-300m`: 300 million real entries in one Redis, and a million random reads.

Minutes, and a gigabyte. Ids are consecutive, values are computed from them, so that every answer
can be compared; one read in a hundred asks for an id that is not there. `--quick` takes 10 million.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Final

from rich.progress import Progress

from benchmarks.idmap import USERS, Entry, redis_server, used
from benchmarks.measure import report
from shardkit.idmap import IdMap

ENTRIES: Final = 300_000_000
READS: Final = 1_000_000
TARGETS = {
    "used_gigabytes": "≤ 1.1",
    "wrong_answers": "≤ 0",
    "load_millions_per_second": "≥ 1",
}


def value_of(id: int) -> int:  # noqa: A002
    """Return the user of a photo: scattered like random ones."""
    return (id * 2_654_435_761 & 0xFFFF_FFFF) % USERS


def entries(n: int) -> Iterator[Entry]:
    """Return all entries, never more than one at once."""
    return ((id, (id * 2_654_435_761 & 0xFFFF_FFFF) % USERS) for id in range(n))  # noqa: A001


def main(*, as_json: bool, quick: bool = False) -> None:
    n = 10_000_000 if quick else ENTRIES
    with redis_server() as client, Progress(disable=as_json) as bar:
        owners = IdMap(client, "owners")
        loading = bar.add_task("load", total=n)
        before = used(client)
        start = time.perf_counter()
        loaded = owners.load(
            entries(n), progress=lambda p: bar.update(loading, completed=p.entries)
        )
        seconds = time.perf_counter() - start
        after = used(client)
        memory = client.info("memory")
        reading = bar.add_task("read", total=READS)
        wrong, reads_seconds = 0, 0.0
        draw = random.Random(11)
        for done in range(0, READS, 1000):
            asked = [draw.randrange(n + n // 100) for _ in range(990)]
            alone = [draw.randrange(n + n // 100) for _ in range(10)]
            start = time.perf_counter()
            found = owners.get_many(asked)
            singles = [(id, owners.get(id)) for id in alone]  # noqa: A001
            reads_seconds += time.perf_counter() - start
            singles += [(id, found.get(id)) for id in asked]  # noqa: A001
            wrong += sum(value != (value_of(id) if id < n else None) for id, value in singles)  # noqa: A001
            bar.update(reading, completed=done + 1000)
        rss = int(memory["used_memory_rss"])
    figures = {
        "entries_millions": loaded.entries / 1e6,
        "used_gigabytes": after / 1e9,
        "bytes_per_entry": (after - before) / n,
        "rss_gigabytes": rss / 1e9,
        "load_seconds": seconds,
        "load_millions_per_second": n / seconds / 1e6,
        "reads": float(READS),
        "wrong_answers": float(wrong),
    }
    medians = {"a read": reads_seconds / READS}
    peers = ("hash of 1,000: 3.77 GB, extrapolated from `benchmarks idmap`",)
    report("idmap300m", figures, peers=peers, medians=medians, targets=TARGETS, as_json=as_json)
