"""What an entry of an id map takes in Redis, and what a read costs the server.

The published layout beside it, in the same server: hashes of 1,000 whole ids each, in one listpack
(`hash-max-listpack-entries 1000`). And a hash of 100 with short fields, which is the best that
hashes do. Memory is `used_memory`; CPU is that of Redis' main thread, over reads sent 1,000 at a
time, so that system calls do not hide the commands; every answer is compared. Entries are
consecutive ids, user ids below 14 million.

Source: the layout, "Storing hundreds of millions of simple key-value pairs in Redis", Instagram
engineering, 2011.
"""

from __future__ import annotations

import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, Final

import redis

from benchmarks.measure import report
from shardkit.idmap import IdMap
from shardkit.local.ports import choose
from shardkit.testing import wait_until

PEERS = ("hash of 1,000, as published", "hash of 100, field = id mod 100", "one key an entry")
TARGETS = {
    "bytes_per_entry": "≤ 3.4",
    "bytes_per_entry_30": "≤ 4.6",
    "vs_hash1000_memory": "≥ 3.5",
    "get_vs_hash1000_cpu": "≤ 0.2",
    "wrong_answers": "≤ 0",
}
USERS: Final = 14_000_000
AT_ONCE: Final = 1_000
Entry = tuple[int, int]


def main(*, as_json: bool, quick: bool = False) -> None:
    n, reads, rounds = (2_000_000, 20_000, 9) if quick else (4_000_000, 50_000, 15)
    draw = random.Random(7)
    entries = [(id, draw.randrange(USERS)) for id in range(n)]  # noqa: A001
    thin = [entry for entry in entries if draw.random() < 0.3]
    with redis_server("--hash-max-listpack-entries", "1000") as client:
        packed, sparse = IdMap(client, "packed"), IdMap(client, "sparse")
        published = Hashes(client, 1_000, whole=True)
        short = Hashes(client, 100, whole=False)
        start = time.perf_counter()
        bytes_packed = growth(client, lambda: packed.load(entries)) / n
        seconds = time.perf_counter() - start
        bytes_sparse = growth(client, lambda: sparse.load(thin)) / len(thin)
        bytes_published = growth(client, lambda: published.load(entries)) / n
        bytes_short = growth(client, lambda: short.load(entries)) / n
        single = entries[: n // 10]
        bytes_single = growth(client, lambda: store_singly(client, single)) / len(single)
        asked = [draw.randrange(n) for _ in range(reads)]
        arms: dict[str, Callable[[Sequence[int]], Mapping[int, int]]] = {
            "get": packed.get_many,
            "get of 30 %": sparse.get_many,
            "hash of 1,000": published.get_many,
            "hash of 100": short.get_many,
        }
        truth, thin_truth = dict(entries), dict(thin)
        truths = dict.fromkeys(arms, truth) | {"get of 30 %": thin_truth}
        costs, wrong = cpu_of_reads(client, arms, truths, asked, rounds)
        ones, missed = cpu_of_single_reads(client, packed, published, truth, asked[: reads // 10])
    figures = {
        "bytes_per_entry": bytes_packed,
        "bytes_per_entry_30": bytes_sparse,
        "vs_hash1000_memory": bytes_published / bytes_packed,
        "vs_hash100_memory": bytes_short / bytes_packed,
        "vs_key_an_entry_memory": bytes_single / bytes_packed,
        "get_vs_hash1000_cpu": ratio(costs["get"], costs["hash of 1,000"]),
        "sparse_get_vs_hash1000_cpu": ratio(costs["get of 30 %"], costs["hash of 1,000"]),
        "get_vs_hash100_cpu": ratio(costs["get"], costs["hash of 100"]),
        "one_by_one_vs_hash1000_cpu": ratio(ones["get"], ones["hash of 1,000"]),
        "load_millions_per_second": n / seconds / 1e6,
        "wrong_answers": float(wrong + missed),
    }
    medians = {name: statistics.median(each) for name, each in costs.items()}
    medians |= {f"one by one, {name}": statistics.median(each) for name, each in ones.items()}
    report("idmap", figures, peers=PEERS, medians=medians, targets=TARGETS, as_json=as_json)


class Hashes:
    """Hashes of so many entries each.

    Args:
        client: of the server.
        n: entries of a hash.
        whole: whether fields are whole ids, as published, or what remains of them.
    """

    def __init__(self, client: Any, n: int, *, whole: bool) -> None:
        self._client = client
        self._n = n
        self._modulus = sys.maxsize if whole else n

    def load(self, entries: Sequence[Entry]) -> None:
        """Store entries, as many of consecutive ids."""
        pipeline = self._client.pipeline(transaction=False)
        source = iter(entries)
        while chunk := list(islice(source, self._n)):
            fields = [word for id, value in chunk for word in (id % self._modulus, value)]  # noqa: A001
            pipeline.execute_command("HSET", self._key(chunk[0][0]), *fields)
            if len(pipeline) >= 20_000 // self._n:
                pipeline.execute()
        pipeline.execute()

    def get(self, id: int) -> int:  # noqa: A002
        """Return one value."""
        return int(self._client.hget(self._key(id), id % self._modulus))

    def get_many(self, ids: Sequence[int]) -> Mapping[int, int]:
        """Return values, asked for one by one in one round trip."""
        pipeline = self._client.pipeline(transaction=False)
        for id in ids:  # noqa: A001
            pipeline.hget(self._key(id), id % self._modulus)
        return {id: int(value) for id, value in zip(ids, pipeline.execute(), strict=True)}  # noqa: A001

    def _key(self, id: int) -> str:  # noqa: A002
        return f"mediabucket{self._n}:{id // self._n}"


def store_singly(client: Any, entries: Sequence[Entry]) -> None:
    """Store a key for every entry."""
    source = iter(entries)
    while chunk := list(islice(source, 10_000)):
        client.mset({f"media:{key}": value for key, value in chunk})


def cpu_of_reads(
    client: Any,
    arms: Mapping[str, Callable[[Sequence[int]], Mapping[int, int]]],
    truths: Mapping[str, Mapping[int, int]],
    asked: Sequence[int],
    rounds: int,
) -> tuple[dict[str, list[float]], int]:
    """Return the server's CPU seconds for a read, by arm and round, and the wrong answers."""
    costs: dict[str, list[float]] = {name: [] for name in arms}
    wrong = 0
    for _ in range(rounds + 1):
        for name, read in arms.items():
            truth = truths[name]
            before = cpu(client)
            for at in range(0, len(asked), AT_ONCE):
                wanted = asked[at : at + AT_ONCE]
                found = read(wanted)
                wrong += sum(found.get(id) != truth.get(id) for id in wanted)  # noqa: A001
            costs[name].append((cpu(client) - before) / len(asked))
    return {name: each[1:] for name, each in costs.items()}, wrong


def cpu_of_single_reads(
    client: Any,
    packed: IdMap,
    published: Hashes,
    truth: Mapping[int, int],
    asked: Sequence[int],
) -> tuple[dict[str, list[float]], int]:
    """Return the same for reads one by one, which are mostly system calls."""
    costs: dict[str, list[float]] = {"get": [], "hash of 1,000": []}
    wrong = 0
    for _ in range(5):
        for name, get in (("get", packed.get), ("hash of 1,000", published.get)):
            before = cpu(client)
            wrong += sum(get(id) != truth[id] for id in asked)  # noqa: A001
            costs[name].append((cpu(client) - before) / len(asked))
    return costs, wrong


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the median of the ratios of rounds: what else runs slows both of a round."""
    return statistics.median(one / other for one, other in zip(ours, theirs, strict=True))


def cpu(client: Any) -> float:
    """Return the CPU seconds of the thread that runs commands; of the process before Redis 7."""
    said = client.info("cpu")
    thread = "_main_thread" if "used_cpu_user_main_thread" in said else ""
    return float(said[f"used_cpu_user{thread}"] + said[f"used_cpu_sys{thread}"])


def growth(client: Any, work: Callable[[], object]) -> int:
    """Return by how many bytes `used_memory` grows, without the buffers of a connection."""
    before = used(client)
    work()
    return used(client) - before


def used(client: Any) -> int:
    """Return what the server has in memory, on a new connection: none other is open."""
    client.connection_pool.disconnect()
    return int(client.info("memory")["used_memory"])


@contextmanager
def redis_server(*options: str) -> Iterator[Any]:
    """Run a Redis that keeps everything in memory; a client of it."""
    program = shutil.which("redis-server")
    if program is None:
        sys.exit("redis-server is not installed")
    port = choose(())
    with tempfile.TemporaryDirectory() as folder:
        command = [program, "--bind", "127.0.0.1", "--port", str(port), "--dir", folder]
        command += ["--save", "", "--appendonly", "no", *options]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        client: Any = redis.Redis(port=port, socket_timeout=30)
        try:
            wait_until(lambda: _answers(client), timeout=20, what="Redis answers")
            yield client
        finally:
            client.close()
            process.kill()
            process.wait()


def _answers(client: Any) -> bool:
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False
