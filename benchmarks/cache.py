"""What a hit costs beside pymemcache's own `Client.get`, and how many round trips many keys take.

On a real Memcached of its own, in one thread, wall time, interleaved: pymemcache's `get` of the
same bytes, the backend's `run` of one key, and a hit as a session has it: the reader's machine,
`run`, version and checksum checked, the row decoded to its values.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from pymemcache.client.base import Client

from benchmarks.measure import interleaved, report
from shardkit.cache import Reader
from shardkit.caches.memcached import Memcached
from shardkit.caching.operations import Kind, Op, Outcome, Request
from shardkit.caching.rows import decode_row, encode_row
from shardkit.testing import FaultProxy, wait_until

PEERS = ("pymemcache.Client.get",)
TARGETS = {"hit_vs_pymemcache_get": "≤ 1.5", "multiget100_round_trips_per_node": "= 1"}
ROW = (
    123456789012345678,
    9876543210987654,
    "a caption of some sixty characters, as people write them: dawn",
    None,
    True,
    1280,
    datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
)


def main(*, as_json: bool, quick: bool = False) -> None:
    with memcached() as one, memcached() as two:
        times = hits(one, rounds=20 if quick else 100)
        trips = round_trips([one, two])
    get = times["pymemcache get"]
    figures = {
        "hit_vs_pymemcache_get": times["hit with decode"] / get,
        "run_vs_pymemcache_get": times["run"] / get,
        "multiget100_vs_100_gets": times["100 keys"] / (100 * get),
        "multiget100_round_trips_per_node": trips,
    }
    report("cache", figures, peers=PEERS, medians=times, targets=TARGETS, as_json=as_json)


def hits(port: int, *, rounds: int, calls: int = 300) -> dict[str, float]:
    """Return median seconds of one call."""
    cache = Memcached([f"127.0.0.1:{port}"], deadline=1.0)
    client = Client(("127.0.0.1", port), no_delay=True)
    payload = encode_row(ROW)
    assert payload is not None
    keys = [f"1:1:42:photos:{n}:0123456789ab" for n in range(100)]
    _fill(cache, keys, payload)
    key = keys[0]
    raw = client.get(key)
    ask = [Request(Op.LEASE, key, ttl=4.0)]
    many = [Request(Op.LEASE, each, ttl=4.0) for each in keys]

    def get() -> None:
        for _ in range(calls):
            assert client.get(key) == raw

    def run() -> None:
        for _ in range(calls):
            cache.run(ask)

    def hit() -> None:
        for _ in range(calls):
            reader = Reader(key)
            request = reader.request
            assert request is not None
            reader = reader.advance(cache.run((request,))[0])
            assert decode_row(reader.payload, len(ROW)) is not None

    def multi() -> None:
        for _ in range(calls // 100):
            cache.run(many)

    arms = {"pymemcache get": get, "run": run, "hit with decode": hit, "100 keys": multi}
    times = interleaved(arms, rounds=rounds, warm_up=2)
    times = {name: seconds / calls for name, seconds in times.items()}
    times["100 keys"] *= 100
    client.close()
    cache.close()
    return times


def round_trips(ports: list[int]) -> float:
    """Return the most round trips that 100 keys took on any server."""
    proxies = [FaultProxy("127.0.0.1", port, protocol="tcp") for port in ports]
    try:
        for proxy in proxies:
            proxy.start()
        cache = Memcached([f"127.0.0.1:{proxy.port}" for proxy in proxies], deadline=1.0)
        keys = [f"1:1:43:photos:{n}:0123456789ab" for n in range(100)]
        _fill(cache, keys, b"row")
        for proxy in proxies:
            proxy.forget()
        answers = cache.run([Request(Op.LEASE, key, ttl=4.0) for key in keys])
        assert all(answer.kind is Kind.VALUE for answer in answers)
        trips = max(proxy.counts.round_trips for proxy in proxies)
        cache.close()
        return float(trips)
    finally:
        for proxy in proxies:
            proxy.stop()


def _fill(cache: Memcached, keys: list[str], payload: bytes) -> None:
    for key in keys:
        won = cache.run([Request(Op.LEASE, key, ttl=4.0)])[0]
        value = Request(Op.STORE, key, won.cas, Kind.VALUE, 7, payload, 3600.0)
        assert cache.run([value])[0].outcome is Outcome.DONE


@contextmanager
def memcached() -> Iterator[int]:
    """Run a Memcached; its port."""
    program = shutil.which("memcached")
    if program is None:
        sys.exit("Memcached is not installed")
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    command: list[Any] = [program, "-l", "127.0.0.1", "-p", str(port), "-U", "0", "-u", "nobody"]
    process = subprocess.Popen(command)

    def answers() -> bool:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            return False
        return True

    try:
        wait_until(answers, timeout=10, what="Memcached answers")
        yield port
    finally:
        process.kill()
        process.wait()
