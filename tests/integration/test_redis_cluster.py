"""What only a Redis Cluster does: slots that move, servers that die, copies that take over."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from redis.crc import key_slot

from shardkit.caches.redis_cluster import AsyncRedisCluster, RedisCluster
from shardkit.caching.operations import UNKNOWN, Kind, Op, Outcome, Request
from shardkit.testing import wait_until
from tests.fixtures import redis_clusters
from tests.fixtures.redis_clusters import NewCluster
from tests.integration.test_cache_backends import PATIENT, InLoop, keep, lease, one, put

pytestmark = pytest.mark.integration

Open = Callable[..., Any]
PREFIX = "shardkit:cache:"


@pytest.fixture(params=["sync", "async"])
def open_cache(request: pytest.FixtureRequest) -> Iterator[Open]:
    """Open the cache of a cluster, for threads or for asyncio; closed after the test."""
    opened: list[Any] = []
    with asyncio.Runner() as runner:

        def start(cluster: redis_clusters.RedisCluster, **settings: Any) -> Any:
            settings = {"deadline": PATIENT, **settings}
            if request.param == "sync":
                opened.append(RedisCluster(cluster.urls[:2], **settings))
            else:
                opened.append(InLoop(AsyncRedisCluster(cluster.urls[:2], **settings), runner))
            return opened[-1]

        yield start
        for cache in opened:
            cache.close()


def slot_of(key: str) -> int:
    return key_slot((PREFIX + key).encode())


def keys_of(cluster: redis_clusters.RedisCluster, number: int, n: int = 20) -> list[str]:
    """Return keys that belong to a server."""
    keys = (f"row:{i}" for i in range(10_000))
    return [key for key in keys if cluster.owner(slot_of(key)) == number][:n]


def test_keys_are_where_the_cluster_has_them(redis_cluster: NewCluster, open_cache: Open) -> None:
    cluster = redis_cluster(3)
    cache = open_cache(cluster)
    keys = [f"k{n}" for n in range(60)]
    for answer in cache.run([put(key, 1, key.encode()) for key in keys]):
        assert answer.outcome is Outcome.DONE
    assert [each.payload for each in cache.run([lease(key) for key in keys])] == [
        key.encode() for key in keys
    ]
    for key in keys:
        number = cluster.owner(slot_of(key))
        assert cluster.clients[number].exists(PREFIX + key)
        assert cache.home(key) == cluster.servers[number].address
    assert not cache.dirty


def test_a_slot_that_moves_is_followed(redis_cluster: NewCluster, open_cache: Open) -> None:
    cluster = redis_cluster(3)
    cache = open_cache(cluster)
    key = keys_of(cluster, 0)[0]
    slot = slot_of(key)
    # Of the same slot: a brace says what of a name counts.
    other = f"{{{PREFIX}{key}}}:other"
    other = next(f"x{n}" for n in range(200_000) if slot_of(f"x{n}") == slot)
    keep(cache, key, 1, b"one")
    cluster.begin_moving(slot, 0, 1)
    assert one(cache, lease(key)).payload == b"one"
    won = one(cache, lease(other))  # not in the source: its lease is made in the target
    assert won.outcome is Outcome.WON
    stored = one(cache, Request(Op.STORE, other, won.cas, Kind.VALUE, 3, b"three", 30.0))
    assert stored.outcome is Outcome.DONE
    assert one(cache, lease(other)).payload == b"three"
    cluster.finish_moving(slot, 0, 1)
    assert [a.payload for a in cache.run([lease(key), lease(other)])] == [b"one", b"three"]
    keep(cache, key, 2, b"two")
    assert cluster.clients[1].exists(PREFIX + key)
    wait_until(
        lambda: (
            one(cache, lease(key)).payload == b"two"
            and cache.home(key) == cluster.servers[1].address
        ),
        timeout=10,
        what="the new owner is known",
    )


def test_scripts_are_loaded_where_a_slot_is_on_its_way(
    redis_cluster: NewCluster, open_cache: Open
) -> None:
    cluster = redis_cluster(3)
    key = keys_of(cluster, 2)[0]
    cluster.begin_moving(slot_of(key), 2, 0)
    cluster.clients[0].script_flush()
    cluster.clients[2].script_flush()
    cache = open_cache(cluster)
    won = one(cache, lease(key))
    assert won.outcome is Outcome.WON
    removed = one(cache, Request(Op.REMOVE, key, won.cas))
    assert removed.outcome is Outcome.DONE


def test_a_dead_server_costs_its_own_keys_the_deadline_and_no_more(
    redis_cluster: NewCluster, open_cache: Open
) -> None:
    cluster = redis_cluster(3)
    cache = open_cache(cluster, deadline=0.05)
    mine, others = keys_of(cluster, 0, 5), keys_of(cluster, 1, 5)
    wait_until(
        lambda: all(
            a.outcome is Outcome.DONE for a in cache.run([put(k, 1) for k in mine + others])
        ),
        timeout=20,
        what="every server was reached within the deadline",
    )
    cluster.servers[0].freeze()
    for _ in range(6):
        began = time.monotonic()
        assert cache.run([lease(key) for key in mine]) == [UNKNOWN] * 5
        assert time.monotonic() - began < 0.3
    wait_until(
        lambda: all(a.outcome is Outcome.FOUND for a in cache.run([lease(k) for k in others])),
        timeout=20,
        what="the others answer",
    )
    cluster.servers[0].thaw()


def test_a_copy_that_takes_over_is_not_read_before_it_is_flushed(
    redis_cluster: NewCluster, open_cache: Open
) -> None:
    """It may lack the last deletes of the server it was a copy of."""
    cluster = redis_cluster(3, copies=1)
    cache = open_cache(cluster)
    keys = keys_of(cluster, 0)
    for key in keys:
        keep(cache, key, 1, b"before")
    wait_until(
        lambda: all(cluster.clients[3].execute_command("CLUSTER", "COUNTKEYSINSLOT", slot_of(key))
                    for key in keys),
        timeout=20, what="the copy has it",
    )  # fmt: skip
    cluster.servers[0].kill()
    wait_until(lambda: cluster.is_primary(3), timeout=60, what="the copy has taken over")
    heir = cluster.servers[3].address
    seen: list[bytes] = []

    def is_refused() -> bool:
        seen.extend(answer.payload for answer in cache.run([lease(key) for key in keys]))
        return heir in cache.must_flush

    wait_until(is_refused, timeout=30, what="the heir is known, and refused")
    for _ in range(20):
        is_refused()
    assert set(seen) == {b""}
    assert cache.flush(heir)
    wait_until(
        lambda: all(a.outcome is Outcome.WON for a in cache.run([lease(key) for key in keys[:1]])),
        timeout=30,
        what="it is read again, empty",
    )
    assert not cache.must_flush


def test_nobody_of_the_cluster_is_there(open_cache: Open) -> None:
    class Nobody:
        urls = ("redis://127.0.0.1:1", "redis://127.0.0.1:2")

    cache = open_cache(Nobody, deadline=0.05)
    for _ in range(8):
        began = time.monotonic()
        assert cache.run([lease("a"), put("b", 1)]) == [UNKNOWN, UNKNOWN]
        assert time.monotonic() - began < 0.3
