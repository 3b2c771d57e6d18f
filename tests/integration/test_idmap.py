"""The id map on real servers: round trips, writers at once, garbage, clusters, memory."""

from __future__ import annotations

import asyncio
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from random import Random
from typing import Any

import pytest
from redis import Redis, RedisCluster
from redis import asyncio as aio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

import shardkit
from shardkit.errors import (
    ConfigurationError,
    DamagedMapError,
    DeadlineExceededError,
    EndpointUnavailableError,
    IdMapFullError,
    IdMapMismatchError,
    InvalidMappingError,
    OutcomeUnknownError,
)
from shardkit.idmap import AsyncIdMap, IdMap, Layout, Loaded
from shardkit.idmap.layout import allocated
from shardkit.testing import FaultProxy
from tests.fixtures import caches
from tests.fixtures.caches import NewServer
from tests.fixtures.redis_clusters import NewCluster

pytestmark = pytest.mark.integration

NO_RETRY = AsyncRetry(NoBackoff(), 0)
SLOTS = Layout().n_slots


@pytest.fixture
def server(cache_server: NewServer) -> caches.CacheServer:
    """A Redis that keeps nothing."""
    return cache_server("redis", "--appendonly", "no")


@pytest.fixture
def client(server: caches.CacheServer) -> Iterator[Any]:
    """A client of it."""
    with Redis(port=server.port) as opened:
        yield opened


def dense(n: int = SLOTS, first: int = 0) -> list[tuple[int, int]]:
    return [(id, id * 7919 % 10_000_000) for id in range(first, first + n)]  # noqa: A001


def thin(n: int = SLOTS, step: int = 3) -> list[tuple[int, int]]:
    return dense(n)[::step]


KINDS = {"dense": dense(), "sparse": thin(), "list": thin(step=40)}


# Round trips


@pytest.fixture
def proxy(server: caches.CacheServer) -> Iterator[FaultProxy]:
    """A link to the server that counts."""
    link = FaultProxy("127.0.0.1", server.port, protocol="tcp")
    link.start()
    yield link
    link.stop()


@pytest.mark.parametrize("kind", KINDS)
def test_a_read_is_one_round_trip(client: Any, proxy: FaultProxy, kind: str) -> None:
    IdMap(client, "m").load(KINDS[kind])
    truth = dict(KINDS[kind])
    with Redis(port=proxy.port) as counted:
        owners = IdMap(counted, "m")
        owners.get(0)  # connects
        for ids in ([0], [1], [SLOTS - 1], [10**12], range(0, SLOTS, 11)):
            for _ in range(2):  # with and without a hint
                proxy.forget()
                if len(ids) == 1:
                    assert owners.get(ids[0]) == truth.get(ids[0])
                else:
                    assert owners.get_many(ids) == {i: truth[i] for i in ids if i in truth}
                assert proxy.counts.round_trips == 1
        assert owners.check().blocks[kind] == 1


def test_an_asynchronous_read_is_one_round_trip(client: Any, proxy: FaultProxy) -> None:
    IdMap(client, "m").load(KINDS["dense"])

    async def read() -> None:
        async with aio.Redis(port=proxy.port) as counted:
            owners = AsyncIdMap(counted, "m")
            await owners.get(0)
            for _ in range(2):
                proxy.forget()
                assert await owners.get(5) == 5 * 7919
                assert len(await owners.get_many(range(2000))) == 2000
                assert proxy.counts.round_trips == 2

    asyncio.run(read())


def test_a_script_that_the_server_forgot_is_sent_again(client: Any) -> None:
    owners = IdMap(client, "m")
    for n in range(3):
        client.script_flush()
        owners.set(n, n)
        client.script_flush()
        assert owners.get_many(range(5)) == {i: i for i in range(n + 1)}


# Several at once


@pytest.mark.parametrize("kind", KINDS)
def test_no_write_is_lost(server: caches.CacheServer, client: Any, kind: str) -> None:
    """Four writers in the same rows: some widen the block, one takes entries away."""
    IdMap(client, "m").load(KINDS[kind])
    truth, mine = dict(KINDS[kind]), [range(n, 160, 4) for n in range(4)]
    together = threading.Barrier(4)
    failed: list[BaseException] = []

    def write(number: int) -> None:
        try:
            with Redis(port=server.port) as own:
                owners = IdMap(own, "m")
                together.wait(timeout=30)
                for id in mine[number]:  # noqa: A001
                    owners.set(id, id << (number * 12))
                    if number == 0:
                        assert owners.delete(id)
                    assert owners.get(id) == (None if number == 0 else id << (number * 12))
        except BaseException as error:  # noqa: BLE001  told below
            failed.append(error)

    run_threads([partial(write, number) for number in range(4)])
    assert not failed
    for number, ids in enumerate(mine):
        truth |= {id: id << (number * 12) for id in ids}  # noqa: A001
    for gone in mine[0]:
        truth.pop(gone)
    found = IdMap(client, "m")
    assert found.get_many(range(SLOTS)) == truth
    assert found.check().entries == len(truth)


def test_tasks_lose_no_write(server: caches.CacheServer, client: Any) -> None:
    async def write() -> None:
        async with aio.Redis(port=server.port) as own:
            owners = [AsyncIdMap(own, "m") for _ in range(4)]
            await asyncio.gather(*(owners[n % 4].set(n, 2**n) for n in range(24)))

    asyncio.run(write())
    assert IdMap(client, "m").get_many(range(30)) == {n: 2**n for n in range(24)}


def test_a_reader_is_right_while_a_block_changes(server: caches.CacheServer, client: Any) -> None:
    """Dense, sparse, wide and gone by turns; what is never changed is always read."""
    kept = dict(thin(step=50))
    owners = IdMap(client, "m")
    owners.load(kept.items())
    done = threading.Event()
    wrong: list[object] = []

    def read() -> None:
        with Redis(port=server.port) as own:
            reader, draw = IdMap(own, "m"), Random(1)
            ids = list(kept)
            while not done.is_set():
                some = draw.sample(ids, 20)
                if reader.get_many(some) != {id: kept[id] for id in some}:  # noqa: A001
                    wrong.append(some)
                if reader.get(some[0]) != kept[some[0]]:
                    wrong.append(some[0])

    def change() -> None:
        try:
            other = [entry for entry in dense() if entry[0] not in kept]
            for n in range(6):
                owners.load(other)
                owners.set(1, 2 ** (8 * (n % 3) + 30))
                owners.delete_many(id for id, _ in other)  # noqa: A001
        finally:
            done.set()

    run_threads([read, read, change])
    assert not wrong
    assert owners.check().entries == len(kept)


def run_threads(work: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=each) for each in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# What is not a block


@pytest.mark.parametrize("kind", KINDS)
def test_garbage_is_never_an_answer(client: Any, kind: str) -> None:
    writer, hinted = IdMap(client, "m"), IdMap(client, "m")
    writer.load(KINDS[kind])
    truth, key, draw = dict(KINDS[kind]), writer.key(0), Random(3)
    stored = client.get(key)
    hinted.get(0)
    IdMap(client, "m").load(dense(first=SLOTS))
    garbage = [b"x", b"\0" * len(stored), draw.randbytes(len(stored)), stored[:7], stored[:-1]]
    garbage += [client.get(writer.key(SLOTS)), stored[: len(stored) // 2], stored[8:]]
    for _ in range(60):
        at = draw.randrange(len(stored))
        garbage.append(
            stored[:at] + bytes([stored[at] ^ draw.randrange(1, 256)]) + stored[at + 1 :]
        )
    refused = 0
    for data in garbage:
        client.set(key, data)
        for owners in (hinted, IdMap(client, "m")):
            for ids in (draw.sample(range(SLOTS), 5), range(0, SLOTS, 60)):
                try:
                    found = owners.get_many(ids)
                except DamagedMapError:
                    refused += 1
                    continue
                assert all(truth[id] == value for id, value in found.items())  # noqa: A001
        assert list(IdMap(client, "m").check().damaged) == [key.decode()]
        with pytest.raises(DamagedMapError):
            IdMap(client, "m").set_many(dict.fromkeys(range(0, SLOTS, 7), 1))
        assert client.get(key) == data  # garbage is left for somebody to look at
    assert refused > len(garbage)
    client.delete(key)
    assert hinted.get_many(range(100)) == {}


def test_a_key_of_another_kind_is_refused(client: Any) -> None:
    owners = IdMap(client, "m")
    owners.set(1, 1)
    client.delete(owners.key(1))
    client.rpush(owners.key(1), "a")
    calls: list[Callable[[], object]] = [
        lambda: owners.get(1),
        lambda: owners.get_many([1, 2]),
        lambda: owners.set(1, 2),
    ]
    for call in calls:
        with pytest.raises(DamagedMapError, match="shardkit:idmap:m:0 is no block"):
            call()
    assert list(owners.check().damaged) == [owners.key(1).decode()]


def test_a_map_is_used_as_it_was_made(client: Any) -> None:
    IdMap(client, "m", width=3).set(1, 1)
    calls: list[Callable[[IdMap], object]] = [
        lambda found: found.get(1),
        lambda found: found.get_many([1, 2]),
        lambda found: found.set(1, 2),
        lambda found: found.load([(1, 2)]),
        lambda found: found.check(),
    ]
    for call in calls:
        with pytest.raises(IdMapMismatchError, match=r"made for values of 3 bytes.*width=3"):
            call(IdMap(client, "m", width=4))
    client.set("shardkit:idmap:m:meta", "2 3")
    with pytest.raises(IdMapMismatchError, match="format that this version does not know"):
        IdMap(client, "m").get(1)
    client.delete("shardkit:idmap:m:meta")  # lost, and the blocks still say how wide they are
    with pytest.raises(DamagedMapError):
        IdMap(client, "m", width=4).get(1)
    assert IdMap(client, "m").get(1) == 1


def test_maps_are_apart(client: Any) -> None:
    one, two = IdMap(client, "one"), IdMap(client, "two", width=8)
    one.set(1, 10)
    two.set(1, 2**62)
    assert (one.get(1), two.get(1), IdMap(client, "on").get(1)) == (10, 2**62, None)
    assert two.check().widest == 8


# Wrong input, and servers that fail


@pytest.mark.parametrize("wrong", [-1, 2**63, True, 1.0, "1", None])
def test_wrong_input_changes_nothing(client: Any, wrong: Any) -> None:
    owners = IdMap(client, "m")
    calls: list[Callable[[], object]] = [
        lambda: owners.get(wrong),
        lambda: owners.get_many([1, wrong]),
        lambda: owners.set(wrong, 1),
        lambda: owners.set(1, wrong),
        lambda: owners.set_many({1: 1, 2: wrong}),
        lambda: owners.delete(wrong),
    ]
    for call in calls:
        with pytest.raises(InvalidMappingError):
            call()
    assert owners.check().entries == 0


def test_a_client_that_decodes_is_refused(server: caches.CacheServer) -> None:
    with (
        Redis(port=server.port, decode_responses=True) as decoding,
        pytest.raises(ConfigurationError, match="decode_responses"),
    ):
        IdMap(decoding, "m")
    nothing: Any = object()
    with pytest.raises(ConfigurationError, match="no client of Redis"):
        IdMap(nothing, "m")


def test_a_server_that_is_gone(server: caches.CacheServer) -> None:
    with Redis(port=server.port, retry=Retry(NoBackoff(), 0), socket_timeout=0.3) as impatient:
        owners = IdMap(impatient, "m")
        owners.load(dense())
        server.freeze()
        with pytest.raises(EndpointUnavailableError) as lost:
            owners.get(1)
        assert lost.value.retryable
        server.thaw()
        assert owners.get(1) == 7919
        server.kill()
        with pytest.raises(EndpointUnavailableError):
            owners.get(1)
        with pytest.raises(EndpointUnavailableError):
            owners.set(1, 2)


def test_a_change_without_an_answer_is_unknown(server: caches.CacheServer) -> None:
    async def change() -> None:
        async with aio.Redis(port=server.port, retry=NO_RETRY, socket_timeout=30) as own:
            owners = AsyncIdMap(own, "m")
            await owners.load(dense())
            swapped = asyncio.Event()

            class Freezing(aio.Redis):
                """Stands for a server that stops between the read and the change."""

                async def execute_command(self, *args: Any, **options: Any) -> Any:
                    if args[0] == "EVALSHA" and len(args) > 6:
                        server.freeze()
                        swapped.set()
                    return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]

            async with Freezing(port=server.port, retry=NO_RETRY, socket_timeout=30) as freezing:
                stopped = AsyncIdMap(freezing, "m")
                assert await stopped.get(1) == 7919
                with pytest.raises(OutcomeUnknownError, match="deadline"):
                    async with shardkit.deadline(1.0):
                        await stopped.set(1, 2)
                assert swapped.is_set()
                with pytest.raises(DeadlineExceededError):
                    async with shardkit.deadline(0.3):
                        await stopped.get(5000)
                server.thaw()
                assert await stopped.get(70) == 70 * 7919  # no late answer is taken for this one
                await owners.set(1, 2)  # again does no harm
                assert await stopped.get_many([1, 5000]) == {1: 2, 5000: 5000 * 7919 % 10_000_000}

    asyncio.run(change())


def test_no_time_no_call(client: Any) -> None:
    owners = IdMap(client, "m")
    with shardkit.deadline(1e-9), pytest.raises(DeadlineExceededError):
        owners.get(1)


def test_a_full_server_still_reads(client: Any) -> None:
    owners = IdMap(client, "m")
    owners.load(dense())
    assert not owners.check().may_evict
    client.config_set("maxmemory", 1)
    with pytest.raises(IdMapFullError) as full:
        owners.load(dense(first=SLOTS))
    assert "maxmemory" in str(full.value)
    assert not full.value.retryable
    assert owners.get(1) == 7919
    client.config_set("maxmemory", 0)
    client.config_set("maxmemory-policy", "allkeys-lru")
    assert owners.check().may_evict


# Many


def test_a_load_goes_on_where_it_stopped(client: Any) -> None:
    entries = [*dense(4 * SLOTS), *[(id, id) for id in range(40 * SLOTS, 80 * SLOTS, 700)]]  # noqa: A001
    owners = IdMap(client, "m")
    owners.set_many({3: 1, SLOTS + 1: 2**40, 90 * SLOTS: 5})

    class Stopped(Exception):  # noqa: N818
        pass

    seen: list[Loaded] = []

    def stop(so_far: Loaded) -> None:
        seen.append(so_far)
        raise Stopped

    with pytest.raises(Stopped):
        owners.load(iter(entries), progress=stop)
    assert seen[0].last_id in dict(entries)
    rest = [entry for entry in entries if entry[0] > seen[0].last_id]
    assert 0 < len(rest) < len(entries)
    done = owners.load(rest, progress=seen.append)
    assert (done.entries, done.last_id) == (len(rest), entries[-1][0])
    assert [each.entries for each in seen[1:]] == sorted(each.entries for each in seen[1:])
    truth = dict(entries) | {90 * SLOTS: 5}
    found = owners.check()
    assert (found.entries, found.damaged) == (len(truth), {})
    assert owners.get_many(truth) == truth
    assert owners.load(entries).entries == len(entries)  # and all of it again
    assert owners.get_many(truth) == truth


def test_entries_in_any_order_are_all_stored(client: Any) -> None:
    entries = dense(2 * SLOTS)[::53]
    Random(5).shuffle(entries)
    owners = IdMap(client, "m")
    assert owners.load([*entries, (entries[0][0], 77)]).entries == len(entries) + 1
    assert owners.get_many(dict(entries)) == dict(entries) | {entries[0][0]: 77}


def test_a_load_is_packed_and_bounded(client: Any) -> None:
    """What the published layout has in 12.3 bytes; and a client that holds none of it."""
    n = 60 * SLOTS
    owners, sparse = IdMap(client, "m"), IdMap(client, "s")
    owners.load((id, id * 2654435761 % 14_000_000) for id in range(n))  # noqa: A001
    assert taken(client, owners) / n <= 3.2
    size = client.strlen(owners.key(5))
    # jemalloc's class and a key; a server with another allocator takes what was asked for
    assert size < client.memory_usage(owners.key(5)) < allocated(size) + 150
    draw = Random(9)
    kept = [id for id in range(20 * SLOTS) if draw.random() < 0.3]  # noqa: A001
    sparse.load((id, draw.randrange(14_000_000)) for id in kept)  # noqa: A001
    assert taken(client, sparse) / len(kept) <= 4.2
    tracemalloc.start()
    IdMap(client, "t", width=8).load((id, id) for id in range(90 * 2000))  # noqa: A001
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * 1024 * 1024, "32 blocks of cells, their bytes and their commands"


def taken(client: Any, owners: IdMap) -> int:
    """Return the bytes of a map's keys: unlike `used_memory` without the buffers of connections."""
    keys = client.keys(f"shardkit:idmap:{owners.name}:*")
    return sum(client.memory_usage(key) for key in keys)


# Redis Cluster


def test_a_cluster_has_the_blocks_everywhere(redis_cluster: NewCluster) -> None:
    cluster = redis_cluster(3)
    entries = dense(60 * SLOTS)[::9]
    truth = dict(entries)
    with RedisCluster(host="127.0.0.1", port=cluster.servers[0].port) as client:
        owners = IdMap(client, "m")
        assert owners.load(entries).entries == len(entries)
        owners.set_many({1: 2**40, 59 * SLOTS: 3})
        assert owners.delete(0)
        truth |= {1: 2**40, 59 * SLOTS: 3}
        truth.pop(0)
        assert all(each.dbsize() > 5 for each in cluster.clients)
        some = list(truth)[::97]
        assert owners.get_many(some) == {id: truth[id] for id in some}  # noqa: A001
        assert owners.get(1) == 2**40
        found = owners.check()
        assert (found.entries, found.may_evict) == (len(truth), False)

        slot = client.keyslot(owners.key(1))
        source = cluster.owner(slot)
        cluster.begin_moving(slot, source, (source + 1) % 3)
        assert owners.get(1) == 2**40
        cluster.finish_moving(slot, source, (source + 1) % 3)
        assert owners.get_many([1, 9]) == {1: 2**40, 9: truth[9]}
        owners.set(1, 5)
        assert IdMap(client, "m").get(1) == 5

    async def read() -> None:
        async with aio.RedisCluster(host="127.0.0.1", port=cluster.servers[1].port) as client:
            owners = AsyncIdMap(client, "m")
            assert await owners.get_many([1, *some]) == {1: 5} | {id: truth[id] for id in some}  # noqa: A001
            assert await owners.get(9) == truth[9]
            await owners.set_many({4: 4, 40 * SLOTS: 4})
            assert await owners.get_many([4, 40 * SLOTS, 10**15]) == {4: 4, 40 * SLOTS: 4}

    asyncio.run(read())
    cluster.servers[0].kill()
    with RedisCluster(host="127.0.0.1", port=cluster.servers[1].port, socket_timeout=2) as client:
        owners = IdMap(client, "m")
        with pytest.raises(EndpointUnavailableError):
            owners.get_many(some)
