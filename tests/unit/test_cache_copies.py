"""Copies of hot rows: quick, short-lived, and never older than what was acknowledged."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from shardkit.cache import Reader, Source, Writer
from shardkit.caches.backend import AsyncBackend, Backend, Place
from shardkit.caches.copies import AsyncCopiedCache, CopiedCache, Copies
from shardkit.caches.memory import AsyncMemoryCache, MemoryCache
from shardkit.caching.keys import cache_key
from shardkit.caching.operations import Answer, Kind, Op, Outcome, Request
from shardkit.testing import FakeClock

LIFE = 0.05
KEY = cache_key(1, 1, 42, "users", (7,))
LIVES = {"users": LIFE}


def drive(cache: Any, machine: Any) -> Any:
    while machine.request is not None:
        machine = machine.advance(cache.run([machine.request])[0])
    return machine


def write(cache: CopiedCache, version: int) -> None:
    """Write through, up to where the caller has to wait."""
    ready = drive(cache, Writer.begin(KEY, version, b"%d" % version))
    assert drive(cache, ready.committed()).is_clean


def read(cache: CopiedCache) -> int:
    reader = drive(cache, Reader(KEY))
    assert reader.source is Source.CACHE
    return int(reader.payload)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def server(clock: FakeClock) -> MemoryCache:
    return MemoryCache(clock=clock)


def test_they_are_backends(server: MemoryCache) -> None:
    assert isinstance(CopiedCache(server, LIVES), Backend)
    assert isinstance(AsyncCopiedCache(AsyncMemoryCache(server), LIVES), AsyncBackend)


def test_after_the_wait_no_process_has_an_older_copy(clock: FakeClock, server: MemoryCache) -> None:
    mine, other = (CopiedCache(server, LIVES, clock=clock) for _ in range(2))
    write(mine, 1)
    assert read(other) == 1
    clock.advance(LIFE / 2)
    write(mine, 2)
    assert read(other) == 1, "copied, and nothing has been acknowledged"
    assert read(mine) == 2, "one's own write is seen at once"
    clock.advance(mine.copies.wait([KEY]))
    assert read(other) == 2


def test_any_number_of_processes_in_any_order(clock: FakeClock, server: MemoryCache) -> None:
    """Random schedules: what was acknowledged before a read began is the least it is shown."""
    rng = random.Random(5)
    caches = [CopiedCache(server, LIVES, clock=clock) for _ in range(4)]
    write(caches[0], 1)
    acknowledged, version, until, copied = 1, 1, 0.0, 0
    for _ in range(3000):
        clock.advance(rng.uniform(0, LIFE / 3))
        if version > acknowledged and clock.monotonic() >= until:
            acknowledged = version
        if version == acknowledged and rng.random() < 0.1:
            version += 1
            writer = rng.choice(caches)
            write(writer, version)
            until = clock.monotonic() + writer.copies.wait([KEY])
        shown = read(rng.choice(caches))
        assert shown >= acknowledged
        copied += shown < version
    assert copied > 100, "without the wait these would have been old"


def test_a_copy_is_as_old_as_its_question(clock: FakeClock, server: MemoryCache) -> None:
    class Slow(MemoryCache):
        def run(self, requests: Any, *, place: Place = Place.USUAL) -> list[Answer]:
            answers = server.run(requests, place=place)
            clock.advance(0.04)
            return answers

    write(CopiedCache(server, {}, clock=clock), 1)
    cache = CopiedCache(Slow(clock=clock), LIVES, clock=clock)
    assert read(cache) == 1
    write(CopiedCache(server, {}, clock=clock), 2)
    assert read(cache) == 1
    clock.advance(0.011)
    assert read(cache) == 2


def test_only_tables_that_ask_and_only_what_readers_are_shown(clock: FakeClock) -> None:
    copies = Copies(LIVES, clock=clock, most=2)
    found = Answer(Outcome.FOUND, 1, Kind.VALUE, 1, b"1")
    other = cache_key(1, 1, 42, "photos", (7,))
    hashed = cache_key(1, 1, 42, "users", ("x" * 300,))
    for key in (other, hashed, "short"):
        copies.keep(Request(Op.LEASE, key), found, clock.monotonic())
        assert copies.wait([key]) == 0.0
    for kind in (Kind.MARKER, Kind.LEASE, Kind.GARBAGE):
        copies.keep(Request(Op.LEASE, KEY), found._replace(kind=kind), clock.monotonic())
    copies.keep(Request(Op.READ, KEY), found, clock.monotonic())
    copies.keep(Request(Op.LEASE, KEY), Answer(Outcome.WON, 1), clock.monotonic())
    assert len(copies) == 0
    for n in range(4):
        key = cache_key(1, 1, 42, "users", (n,))
        copies.keep(Request(Op.LEASE, key), found, clock.monotonic())
    assert len(copies) == 2
    assert copies.wait([KEY, other]) > LIFE


def test_the_relay_is_told_what_the_server_has(clock: FakeClock, server: MemoryCache) -> None:
    cache = CopiedCache(server, LIVES, clock=clock)
    write(cache, 1)
    assert read(cache) == 1
    server.run([Request(Op.DELETE, KEY)])
    (answer,) = cache.run([Request(Op.READ, KEY)], place=Place.HOME)
    assert answer.outcome is Outcome.NOTHING


def test_asyncio(clock: FakeClock, server: MemoryCache) -> None:
    write(CopiedCache(server, LIVES, clock=clock), 1)
    cache = AsyncCopiedCache(AsyncMemoryCache(server), LIVES, clock=clock)

    async def main() -> None:
        lease = Request(Op.LEASE, KEY, ttl=4.0)
        assert (await cache.run([lease]))[0].payload == b"1"
        server.run([Request(Op.DELETE, KEY)])
        assert (await cache.run([lease]))[0].payload == b"1"
        clock.advance(LIFE)
        assert (await cache.run([lease]))[0].outcome is Outcome.WON
        await cache.close()

    asyncio.run(main())
