"""A day of a social service as reads and writes of rows, and how much of it caches answer.

No published trace says which row follows which, so this one says how it is made. Rows are as
popular as zipf(0.99) has it (YCSB's default; Cooper et al., SoCC 2010). People come in sessions, 40
of them at a time: a session looks at a feed of 20 rows twenty times, and each time one of them is
new. 0.2 % of the requests write (TAO, ATC 2013). Draws that are independent of each other are
measured too: there even a cache that held the most popular rows for ever would have `best`.
"""

from __future__ import annotations

import itertools
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from dogpile.cache import make_region
from pymemcache.client.base import Client
from pymemcache.exceptions import MemcacheServerError

from shardkit.cache import Kind, Outcome, Reader, Writer
from shardkit.caches.memcached import Memcached
from shardkit.caching.operations import Op, Request
from shardkit.caching.rows import encode_row
from shardkit.local.ports import choose
from shardkit.testing import wait_until

__all__ = ["hit_rates", "memcached"]

ALPHA = 0.99
WRITES = 0.002
ROOM = 0.2
MEGABYTES = 32
SESSIONS, FEED, VIEWS = 40, 20, 20
TTL = 3600
TEXT = "x" * 2500


class Trace(NamedTuple):
    """What is asked for.

    Attributes:
        views: rows read together, each once.
        written: rows written after each view.
    """

    views: list[list[int]]
    written: list[list[int]]


class Popularity:
    """Draws rows by zipf's law; which are popular has nothing to do with their numbers."""

    def __init__(self, n_rows: int, seed: int) -> None:
        self.sums = list(itertools.accumulate(1.0 / rank**ALPHA for rank in range(1, n_rows + 1)))
        self._rows = list(range(n_rows))
        self._random = random.Random(seed)
        self._random.shuffle(self._rows)

    def draw(self, n: int) -> list[int]:
        """Return so many rows, the popular ones more than once."""
        return self._random.choices(self._rows, cum_weights=self.sums, k=n)

    def trace(self, n_views: int, *, is_social: bool) -> Trace:
        """Return a trace: of sessions, or of independent draws."""
        feeds = [self.draw(FEED) for _ in range(SESSIONS)]
        left = [self._random.randrange(1, VIEWS) for _ in range(SESSIONS)]
        views, written = [], []
        for _ in range(n_views):
            who = self._random.randrange(SESSIONS)
            left[who] -= 1
            if left[who] == 0 or not is_social:
                feeds[who], left[who] = self.draw(FEED), VIEWS
            else:
                feeds[who] = [*self.draw(1), *feeds[who][:-1]]
            view = list(dict.fromkeys(feeds[who]))
            writes = sum(self._random.random() < WRITES for _ in view)
            views.append(view)
            written.append(self.draw(writes))
        return Trace(views, written)


def hit_rates(*, n_views: int) -> dict[str, float]:
    """Return the hit rates of all arms, each on a server of its own with the same memory."""
    found: dict[str, float] = {}
    with memcached(MEGABYTES) as one, memcached(MEGABYTES) as two, memcached(MEGABYTES) as three:
        n_rows = round(_capacity(one) / ROOM)
        popularity = Popularity(n_rows, seed=1)
        arms: dict[str, Callable[[], Arm]] = {
            "": lambda: Ours(one),
            "look_aside_": lambda: LookAside(two),
            "dogpile_": lambda: Dogpile(three),
        }
        for kind, is_social in (("hit_rate", True), ("hit_rate_independent", False)):
            warm_up = popularity.trace(n_views, is_social=is_social)
            measured = popularity.trace(n_views, is_social=is_social)
            for name, make in arms.items():
                arm = make()
                arm.run(warm_up)
                arm.hits = arm.reads = 0
                arm.run(measured)
                found[f"{name}{kind}"] = arm.hits / arm.reads
                arm.close()
        found["best_hit_rate_independent"] = (
            popularity.sums[round(n_rows * ROOM) - 1] / popularity.sums[-1]
        )
    return found


class Arm:
    """A cache before rows that are made up when they are missed."""

    hits = 0
    reads = 0

    def run(self, trace: Trace) -> None:
        """Do what a trace says, and count."""
        for view, written in zip(trace.views, trace.written, strict=True):
            self.reads += len(view)
            self.hits += self.read(view)
            for row in written:
                self.write(row)

    def read(self, rows: Sequence[int]) -> int:
        """Read rows, fill the missing; return how many were there."""
        raise NotImplementedError

    def write(self, row: int) -> None:
        """Change a row."""
        raise NotImplementedError

    def close(self) -> None:
        """Close connections."""


class Ours(Arm):
    """The machines that sessions drive."""

    def __init__(self, port: int) -> None:
        self._cache = Memcached([f"127.0.0.1:{port}"], deadline=5.0)
        self._versions = itertools.count(1)

    def read(self, rows: Sequence[int]) -> int:
        machines = [Reader(_key(row)) for row in rows]
        machines = self._step(machines)
        loading = [
            machine.loaded(version := next(self._versions), _row(version))
            for machine in machines
            if machine.must_load
        ]
        self._step(loading)
        return len(rows) - len(loading)

    def _step(self, machines: list[Reader]) -> list[Reader]:
        asking = [machine for machine in machines if machine.request is not None]
        answers = self._cache.run([m.request for m in asking if m.request is not None])
        return [machine.advance(answer) for machine, answer in zip(asking, answers, strict=True)]

    def write(self, row: int) -> None:
        version = next(self._versions)
        machine = Writer.begin(_key(row), version, _row(version))
        while not machine.is_done:
            if machine.is_ready:
                machine = machine.committed()
            elif machine.request is not None:
                machine = machine.advance(self._cache.run([machine.request])[0])

    def close(self) -> None:
        self._cache.close()


class LookAside(Arm):
    """Read, fill on a miss; delete on a write."""

    def __init__(self, port: int) -> None:
        self._client = Client(("127.0.0.1", port), no_delay=True, default_noreply=False)

    def read(self, rows: Sequence[int]) -> int:
        keys = [_key(row) for row in rows]
        found = self._client.get_many(keys)
        missing = {key: _row(1) for key in keys if key not in found}
        if missing:
            with suppress(MemcacheServerError):  # no room found in time: it is not stored
                self._client.set_many(missing, expire=TTL)
        return len(found)

    def write(self, row: int) -> None:
        self._client.delete(_key(row))

    def close(self) -> None:
        self._client.close()


class Dogpile(Arm):
    """dogpile.cache as its documentation has it; a delete on a write."""

    def __init__(self, port: int) -> None:
        self._region = make_region().configure(
            "dogpile.cache.pymemcache",
            expiration_time=TTL,
            arguments={"url": f"127.0.0.1:{port}", "memcached_expire_time": TTL},
        )

    def read(self, rows: Sequence[int]) -> int:
        missed: list[Any] = []

        def create(*keys: str) -> list[bytes]:
            missed.extend(keys)
            return [_row(1) for _ in keys]

        with suppress(MemcacheServerError):
            self._region.get_or_create_multi([_key(row) for row in rows], create)
        return len(rows) - len(missed)

    def write(self, row: int) -> None:
        self._region.delete(_key(row))


def _key(row: int) -> str:
    return f"bench.1:1:42:photos:{row}:0123456789ab"


def _row(version: int) -> bytes:
    payload = encode_row((1, 2, TEXT, version))
    assert payload is not None
    return payload


def _capacity(port: int) -> int:
    """Return how many rows a server has room for."""
    cache = Memcached([f"127.0.0.1:{port}"], deadline=5.0)
    client = Client(("127.0.0.1", port), no_delay=True)
    payload, first = _row(1), 0
    while client.stats()[b"evictions"] == 0:
        keys = [f"bench.0:1:42:photos:{n:06}:0123456789ab" for n in range(first, first + 500)]
        leases = cache.run([Request(Op.LEASE, key, ttl=4.0) for key in keys])
        for answer in cache.run(
            [
                Request(Op.STORE, key, won.cas, Kind.VALUE, 1, payload, TTL)
                for key, won in zip(keys, leases, strict=True)
            ]
        ):
            assert answer.outcome in {Outcome.DONE, Outcome.UNKNOWN}  # no room found in time
        first += 500
    kept = int(client.stats()[b"curr_items"])
    client.flush_all(noreply=False)
    client.close()
    cache.close()
    return kept


@contextmanager
def memcached(megabytes: int = 64) -> Iterator[int]:
    """Run a Memcached; its port."""
    program = shutil.which("memcached")
    if program is None:
        sys.exit("Memcached is not installed")
    port = choose(())
    command: list[Any] = [program, "-l", "127.0.0.1", "-p", str(port), "-U", "0", "-u", "nobody"]
    process = subprocess.Popen([*command, "-m", str(megabytes)])
    try:
        wait_until(lambda: _answers(port), timeout=10, what="Memcached answers")
        yield port
    finally:
        process.kill()
        process.wait()


def _answers(port: int) -> bool:
    client = Client(("127.0.0.1", port), connect_timeout=1, timeout=1)
    try:
        client.version()
    except OSError:
        return False
    finally:
        client.close()
    return True
