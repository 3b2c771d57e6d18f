"""Rings in a real Redis against a model of them."""

from __future__ import annotations

import random
from contextlib import suppress

import pytest
from redis import Redis

from app.feed.rings import MOST, STEPS, Timeline, decoded, encoded
from app.feed.timelines import BUILDING, AsyncTimelines, SilentError, Timelines
from tests.fixtures.caches import CacheServer, NewServer

pytestmark = pytest.mark.integration


@pytest.fixture
def server(cache_server: NewServer) -> CacheServer:
    return cache_server("redis")


def said(timeline: Timeline | None) -> tuple[list[int], int, int]:
    assert timeline is not None
    return timeline.ids, timeline.floor, timeline.covered


@pytest.mark.anyio
async def test_a_ring_has_what_was_pushed_above_its_floor(server: CacheServer) -> None:
    rng = random.Random(3)
    push = Timelines(server.url)
    read = AsyncTimelines(server.url)
    assert push.push([1, 2], [7]) == 0, "nothing is kept of who has no timeline"
    assert await read.read(1) is None
    begun = await read.begin(1)
    assert begun is not None
    assert await read.begin(1) is None, "one builds at a time"
    assert push.push([1, 2], [7]) == 1
    seen = await read.read(1)
    assert seen is not None
    assert (seen.ids, seen.is_building) == ([7], True), "nothing is certain yet"
    assert await read.finish(1, [5, 3], begun=begun, floor=2, covered=99)
    assert not await read.finish(1, [], begun=begun, floor=0, covered=0)
    assert said(await read.read(1)) == ([7, 5, 3], 2, 99)
    pushed = {7, 5, 3}
    found = None
    for n in range(2500):
        many = [1000 + 10 * n + rng.randrange(40) for _ in range(rng.randrange(1, 4))]
        assert push.push([1, 2], many) == len(many)
        pushed |= set(many)
        if n % 97 == 0 or n in {20, 21, 22, 2499}:
            found = await read.read(1)
            assert found is not None
            assert {each for each in pushed if each > found.floor} <= set(found.ids) <= pushed
            assert found.ids == sorted(found.ids, reverse=True)
            assert found.covered == 99
    assert found is not None
    assert len(found.ids) > MOST // 2
    assert found.floor > 2
    assert await read.cover(1, [4, 6], seen=found, covered=123)
    assert not await read.cover(1, [8], seen=found, covered=124), "it is another by now"
    later = await read.read(1)
    assert later is not None
    assert (later.covered, later.floor >= found.floor) == (123, True)
    await read.forget(1)
    assert await read.read(1) is None
    await read.close()
    push.close()


@pytest.mark.anyio
async def test_what_was_read_for_one_ring_is_not_put_in_the_next(server: CacheServer) -> None:
    read = AsyncTimelines(server.url)
    first = await read.begin(1)
    assert first is not None
    building = await read.read(1)
    assert building is not None
    assert await read.finish(1, [9, 5], begun=first, floor=0, covered=99)
    # Whoever saw it while it was built knew of no photo below MAX_ID that it would lack.
    assert not await read.cover(1, [], seen=building, covered=123)
    assert said(await read.read(1)) == ([9, 5], 0, 99)
    await read.forget(1)
    second = await read.begin(1)
    assert second is not None
    assert not await read.finish(1, [5], begun=first, floor=0, covered=99), "of one who was late"
    assert await read.finish(1, [9, 7, 5], begun=second, floor=0, covered=99)
    await read.close()


@pytest.mark.anyio
async def test_a_ring_whose_builder_died_ends_although_it_is_looked_at(
    server: CacheServer,
) -> None:
    read = AsyncTimelines(server.url)
    assert await read.begin(1) is not None
    assert await read.read(1) is not None
    with Redis.from_url(server.url) as client:
        (key,) = client.keys("tl:*:1")
        assert 0 < client.ttl(key) <= BUILDING
    await read.close()


def test_bytes_of_a_ring() -> None:
    for n in (0, 1, STEPS[0], STEPS[0] + 1, MOST, MOST + 5):
        newest = list(range(10 + n, 10, -1))
        found = decoded(encoded(newest, floor=4, covered=5))
        floor = 4 if n <= MOST else newest[MOST]
        assert said(found) == (newest[:MOST], floor, 5)
    for broken in (b"", b"\0" * 24, encoded([], floor=0, covered=0)[:-1], b"\2" + b"\0" * 311):
        assert decoded(broken) is None


@pytest.mark.anyio
async def test_a_redis_that_is_gone_says_so_and_one_that_comes_back_old_has_nothing(
    server: CacheServer,
) -> None:
    push, read = Timelines(server.url), AsyncTimelines(server.url)
    begun = await read.begin(1)
    assert begun is not None
    assert await read.finish(1, [5, 3], begun=begun, floor=2, covered=99)
    with Redis.from_url(server.url) as client:
        old = {key: client.get(key) for key in client.keys("tl:*:1")}
    assert len(old) == 1
    server.kill()
    with pytest.raises(SilentError):
        await read.read(1)
    with pytest.raises(SilentError):
        push.push([1], [9])
    server.start()
    with Redis.from_url(server.url) as client:
        for key, value in old.items():
            client.set(key, value)  # as a file of an earlier moment would
    for _ in range(2):
        with suppress(SilentError):  # its connection was of the life before
            assert push.push([1], [9]) == 0
    read.silent_until = 0.0
    for _ in range(2):
        with suppress(SilentError):
            assert await read.read(1) is None
    assert await read.read(1) is None
    await read.close()
    push.close()
