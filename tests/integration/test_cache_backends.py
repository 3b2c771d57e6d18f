"""One suite for every cache backend, on real servers: each does what `apply` says, and survives."""

from __future__ import annotations

import asyncio
import http.server
import os
import random
import socketserver
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import pytest

from shardkit.cache import Lives, Patience, Reader, Repair, Source, Writer
from shardkit.caches.async_memcached import AsyncMemcached
from shardkit.caches.backend import AsyncBackend, Backend, Place
from shardkit.caches.memcached import Memcached
from shardkit.caches.memory import AsyncMemoryCache, MemoryCache
from shardkit.caches.null import AsyncNullCache, NullCache
from shardkit.caches.redis import AsyncRedis, Redis
from shardkit.caches.redis_cluster import AsyncRedisCluster, RedisCluster
from shardkit.caching.entries import LARGEST_ENTRY, encode
from shardkit.caching.keys import cache_key
from shardkit.caching.operations import UNKNOWN, Answer, Entry, Kind, Op, Outcome, Request, apply
from shardkit.testing import FaultProxy, Way, wait_until
from tests.fixtures.caches import NewServer
from tests.fixtures.pauses import within
from tests.fixtures.redis_clusters import RedisCluster as RunningCluster

pytestmark = pytest.mark.integration

KINDS: dict[tuple[str, str], Any] = {
    ("memcached", "sync"): Memcached,
    ("memcached", "async"): AsyncMemcached,
    ("redis", "sync"): Redis,
    ("redis", "async"): AsyncRedis,
    ("cluster", "sync"): RedisCluster,
    ("cluster", "async"): AsyncRedisCluster,
}
LONG = 30.0
PATIENT = 1.0
"""Deadline of tests that are not about the deadline: the machine may be busy."""


class InLoop:
    """An asynchronous backend as a synchronous one, so that one suite is enough."""

    def __init__(self, backend: AsyncBackend, runner: asyncio.Runner) -> None:
        self.backend = backend
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def run(self, requests: Sequence[Request], *, place: Place = Place.USUAL) -> list[Answer]:
        return self._runner.run(self.backend.run(requests, place=place))

    def flush(self, name: str) -> bool:
        return self._runner.run(self.backend.flush(name))

    def close(self) -> None:
        self._runner.run(self.backend.close())


Open = Callable[..., Any]


@pytest.fixture
def open_cache() -> Iterator[Open]:
    """Open a backend by kind and mode; closed after the test."""
    with ExitStack() as stack:

        def start(kind: str, mode: str, servers: Sequence[str], **settings: Any) -> Any:
            backend: Any = KINDS[kind, mode](servers, **{"deadline": PATIENT, **settings})
            if mode == "async":
                backend = InLoop(backend, stack.enter_context(asyncio.Runner()))
            stack.callback(backend.close)
            return backend

        yield start


@pytest.fixture(params=["sync", "async"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["memcached", "redis"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["memory", "memcached", "3 memcacheds", "redis", "2 redises", "cluster"])
def backend(
    request: pytest.FixtureRequest,
    mode: str,
    cache_server: NewServer,
    cluster_of_three: Callable[[], RunningCluster],
    open_cache: Open,
) -> Iterator[Any]:
    n, _, name = str(request.param).rpartition(" ")
    if name == "memory":
        if mode == "sync":
            yield MemoryCache()
            return
        with asyncio.Runner() as runner:
            yield InLoop(AsyncMemoryCache(), runner)
        return
    if name == "cluster":
        running = cluster_of_three()
        running.empty()
        yield open_cache("cluster", mode, running.urls)
        return
    kind = "memcached" if name.startswith("memcached") else "redis"
    servers = [cache_server(kind).server for _ in range(int(n or 1))]
    yield open_cache(kind, mode, servers)


def one(backend: Any, request: Request, **more: Any) -> Answer:
    answer: Answer = backend.run([request], **more)[0]
    return answer


def lease(key: str) -> Request:
    return Request(Op.LEASE, key, ttl=LONG)


def put(key: str, version: int, payload: bytes = b"") -> Request:
    return Request(Op.PUT, key, None, Kind.MARKER, version, payload, LONG)


def store(key: str, cas: Any, version: int, payload: bytes) -> Request:
    return Request(Op.STORE, key, cas, Kind.VALUE, version, payload, LONG)


def keep(backend: Any, key: str, version: int, payload: bytes) -> None:
    """Have a value in the cache."""
    marked = one(backend, put(key, version))
    assert marked.outcome is Outcome.DONE
    assert one(backend, store(key, marked.cas, version, payload)).outcome is Outcome.DONE


def test_protocols() -> None:
    assert isinstance(MemoryCache(), Backend)
    assert isinstance(NullCache(), Backend)
    assert isinstance(AsyncMemoryCache(), AsyncBackend)
    assert isinstance(AsyncNullCache(), AsyncBackend)
    for (_, mode), made in KINDS.items():
        servers = ["redis://127.0.0.1:1"] if "Redis" in str(made) else ["127.0.0.1:1"]
        assert isinstance(made(servers), Backend if mode == "sync" else AsyncBackend)


def test_it_does_what_the_model_checker_takes_it_to_do(backend: Any) -> None:
    """A random walk beside `apply`: the same outcomes, kinds, versions and payloads."""
    rng = random.Random(7)
    keys = [f"walk:{n}" for n in range(6)]
    entries: dict[str, Entry | None] = dict.fromkeys(keys)
    known: dict[str, list[tuple[Any, Any]]] = {key: [(None, None)] for key in keys}
    fresh = 0
    for step in range(400):
        batch, expected = [], []
        for key in rng.sample(keys, rng.randint(1, len(keys))):
            ours, theirs = rng.choice(known[key][-3:])
            op = rng.choice(
                [op for op in Op if ours is not None or op not in {Op.STORE, Op.REMOVE}]
            )
            kind = Kind.MARKER if op is Op.PUT else rng.choice([Kind.VALUE, Kind.ABSENCE])
            payload = rng.choice([b"", b"x", b"\r\nEN\r\n", b"\0" * 70, os.urandom(3000)])
            request = Request(op, key, theirs, kind, step, payload, LONG)
            fresh += 1
            entries[key], answer = apply(entries[key], request._replace(cas=ours), fresh)
            batch.append(request)
            expected.append(answer)
        for request, wanted, got in zip(batch, expected, backend.run(batch), strict=True):
            assert got._replace(cas=None) == wanted._replace(cas=None), (step, request)
            if wanted.cas is not None:
                known[request.key].append((wanted.cas, got.cas))
                assert got.cas is not None


def test_the_machines_run_on_it(backend: Any) -> None:
    def drive(machine: Any) -> Any:
        while machine.request is not None:
            machine = machine.advance(one(backend, machine.request))
        return machine

    reader = drive(Reader("row"))
    assert reader.must_load
    assert reader.holds_lease
    other = drive(Reader("row", patience=Patience(leases=2)))
    assert other.must_load
    assert not other.holds_lease
    assert drive(reader.loaded(1, b"one")).is_done
    hit = drive(Reader("row"))
    assert (hit.source, hit.version, hit.payload) == (Source.CACHE, 1, b"one")
    assert drive(Reader("row", floor=2)).must_load
    writer = drive(Writer.begin("row", 2, b"two", replaces=1))
    assert writer.is_ready
    assert drive(Reader("row")).payload == b"one"  # the marker carries it
    assert drive(writer.committed()).is_clean
    assert drive(Reader("row")).payload == b"two"
    gone = drive(drive(Writer.begin("row", 3, None)).committed())
    assert gone.is_clean
    assert drive(drive(Reader("row")).loaded(0, None)).is_done
    assert drive(Reader("row")).kind is Kind.ABSENCE
    assert drive(Repair("row", 3)).is_clean
    assert drive(Reader("row")).must_load


def test_hostile_keys(backend: Any) -> None:
    names = [
        "a b",
        "a\r\nflush_all\r\n",
        "\0",
        "x" * 10_000,
        "naïve",
        "日本",
        "\ud800",
        "a:b,c%#",
        "-" * 240,
    ]
    keys = [cache_key(1, 1, 5, "users", (name,)) for name in names]
    for n, key in enumerate(keys):
        keep(backend, key, 1, b"%d" % n)
    assert [one(backend, lease(key)).payload for key in keys] == [b"%d" % n for n in range(9)]
    for name in names:
        other = cache_key(1, 1, 5, "users", (name + "a",))
        assert one(backend, Request(Op.READ, other)).outcome is Outcome.NOTHING, name


def test_what_is_too_large_is_not_cached(backend: Any) -> None:
    for size in (LARGEST_ENTRY + 1, 1 << 20, 5 << 20):
        key = f"big-{size}"
        won = one(backend, lease(key))
        answer = one(backend, store(key, won.cas, 1, bytes(size)))
        assert answer.outcome in {Outcome.UNKNOWN, Outcome.DIFFERS}, size
        assert one(backend, lease(key)).kind is Kind.LEASE, size
        keep(backend, key, 2, b"small")
        assert one(backend, lease(key)).payload == b"small", size


def test_almost_a_megabyte_is_cached(backend: Any) -> None:
    payload = os.urandom(LARGEST_ENTRY - 100)
    keep(backend, "large", 1, payload)
    assert one(backend, lease("large")).payload == payload


@pytest.mark.parametrize(
    "data",
    [
        b"x",
        b"\xc1",
        random.Random(13).randbytes(13),
        random.Random(500).randbytes(500),
        encode(Kind.VALUE, 5, b"payload")[:-1],
        encode(Kind.VALUE, 5, b"payload") + b"!",
        b"\xc2" + encode(Kind.VALUE, 5, b"payload")[1:],
        b"\x80\x04\x95",
    ],
)
def test_garbage_is_a_miss_and_is_removed(
    kind: str, mode: str, cache_server: NewServer, open_cache: Open, data: bytes
) -> None:
    server = cache_server(kind)
    backend = open_cache(kind, mode, [server.server])
    server.put_garbage("g", data if kind == "memcached" else b"n" * 16 + data)
    found = one(backend, lease("g"))
    assert found.kind is Kind.GARBAGE
    reader = Reader("g").advance(found)
    reader = reader.advance(one(backend, reader.request or lease("")))
    assert reader.must_load
    assert one(backend, lease("g")).outcome is Outcome.WON


def test_a_hundred_keys_are_one_round_trip_a_server(
    kind: str, mode: str, cache_server: NewServer, open_cache: Open
) -> None:
    with ExitStack() as stack:
        servers = [cache_server(kind) for _ in range(3)]
        proxies = [
            stack.enter_context(FaultProxy("127.0.0.1", each.port, protocol="tcp"))
            for each in servers
        ]
        addresses = [f"127.0.0.1:{proxy.port}" for proxy in proxies]
        if kind == "redis":
            addresses = [f"redis://{address}/0" for address in addresses]
        backend = open_cache(kind, mode, addresses, deadline=30.0)
        pool = stack.enter_context(ThreadPoolExecutor(1))
        keys = [f"many:{n}" for n in range(100)]
        marked = backend.run([put(key, 1) for key in keys])
        stored = backend.run(
            [store(k, m.cas, 1, k.encode()) for k, m in zip(keys, marked, strict=True)]
        )
        assert {answer.outcome for answer in stored} == {Outcome.DONE}
        backend.run([lease(key) for key in keys])  # scripts are loaded now
        for proxy in proxies:
            proxy.forget()
        backend.run([lease(key) for key in keys])
        whole = [proxy.counts.bytes_to_server for proxy in proxies]
        # What a server reads in two pieces it may answer in two: what counts is that the client
        # has sent everything before it hears anything.
        for proxy, n_bytes in zip(proxies, whole, strict=True):
            proxy.forget()
            proxy.stall(Way.TO_CLIENT)
            asked = pool.submit(backend.run, [lease(key) for key in keys])
            wait_until(partial(has_sent, proxy, n_bytes), 20.0, "all is sent")
            proxy.heal()
            assert [answer.payload for answer in asked.result(60.0)] == [k.encode() for k in keys]
            assert has_sent(proxy, n_bytes)
        backend.close()


def has_sent(proxy: FaultProxy, n_bytes: int) -> bool:
    return proxy.counts.bytes_to_server == n_bytes


class _Greeter(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def web_port() -> Iterator[int]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Greeter) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def test_another_protocol_opens_the_breaker(
    kind: str, mode: str, web_port: int, open_cache: Open
) -> None:
    scheme = "redis://" if kind == "redis" else ""
    backend = open_cache(kind, mode, [f"{scheme}127.0.0.1:{web_port}"], deadline=0.05)
    with within(6 * 0.25):
        for _ in range(6):
            assert one(backend, lease("k")) == UNKNOWN
    assert not backend.nodes.homes[0].breaker.is_closed
    with within(0.05):
        assert backend.run([lease(str(n)) for n in range(100)]) == [UNKNOWN] * 100


def test_a_frozen_server_costs_the_deadline_and_no_more(
    kind: str, mode: str, cache_server: NewServer, open_cache: Open
) -> None:
    server = cache_server(kind)
    keep(open_cache(kind, mode, [server.server]), "k", 1, b"v")
    backend = open_cache(kind, mode, [server.server], deadline=0.05)
    wait_until(
        lambda: one(backend, lease("k")).payload == b"v", timeout=10, what="it is reached in time"
    )
    server.freeze()
    for _ in range(5):
        with within(0.3):
            assert one(backend, lease("k")) == UNKNOWN
    assert not backend.nodes.homes[0].breaker.is_closed
    server.thaw()
    wait_until(
        lambda: one(backend, lease("k")).payload == b"v", timeout=10, what="it is read again"
    )


def test_a_frozen_server_costs_the_others_nothing(
    kind: str, mode: str, cache_server: NewServer, open_cache: Open
) -> None:
    frozen, *others = (cache_server(kind) for _ in range(3))
    backend = open_cache(kind, mode, [each.server for each in (frozen, *others)], deadline=0.5)
    keys = [f"k{n}" for n in range(60)]
    marked = backend.run([put(key, 1) for key in keys])
    backend.run([store(k, m.cas, 1, b"v") for k, m in zip(keys, marked, strict=True)])
    backend.run([lease(key) for key in keys])  # scripts are loaded now
    frozen.freeze()
    for _ in range(6):
        found = backend.run([lease(key) for key in keys])
        for key, answer in zip(keys, found, strict=True):
            is_frozen = backend.home(key) == backend.nodes.homes[0].name
            assert answer.payload == (b"" if is_frozen else b"v")
    assert [node.breaker.is_closed for node in backend.nodes.homes] == [False, True, True]


def test_a_server_that_missed_a_write_is_not_read_before_it_is_clean(
    kind: str, mode: str, cache_server: NewServer, open_cache: Open
) -> None:
    """Partitioned, written to meanwhile by the database only, and back with its old data."""
    server, gutter = cache_server(kind), cache_server(kind)
    told: list[str] = []
    with FaultProxy("127.0.0.1", server.port, protocol="tcp") as proxy:
        address = f"127.0.0.1:{proxy.port}"
        address = f"redis://{address}/0" if kind == "redis" else address
        backend = open_cache(
            kind, mode, [address], gutter=[gutter.server], on_dirty=told.append, hold=0.3
        )
        stranger = open_cache(kind, mode, [server.server])  # was never cut off
        keep(backend, "k", 1, b"old")
        proxy.refuse()
        wait_until(
            lambda: one(backend, Request(Op.READ, "k")).outcome is Outcome.NOTHING,
            timeout=10,
            what="the gutter answers",
        )
        keep(backend, "k", 2, b"new")  # in the gutter
        (name,) = backend.dirty
        assert told == [name] == [backend.home("k")]
        assert one(backend, lease("k")).payload == b"new"
        assert one(stranger, lease("k")).payload == b"old"
        proxy.heal()
        wait_until(
            lambda: one(backend, lease("k")).payload != b"old" and not backend.dirty,
            timeout=20,
            what="it is read again",
        )
        assert one(stranger, lease("k")).payload == b""
        assert one(backend, lease("k")).payload == b""
        keep(backend, "k", 3, b"newer")
        backend.nodes.missed(backend.nodes.homes[0], "other")
        assert backend.flush(name)
        assert not backend.dirty
        assert one(backend, Request(Op.READ, "k")).outcome is Outcome.NOTHING
        backend.close()


@pytest.mark.slow
def test_the_relay_repairs_a_server_while_nobody_reads_it(
    kind: str, mode: str, cache_server: NewServer, open_cache: Open
) -> None:
    server = cache_server(kind)
    readers = open_cache(kind, mode, [server.server], hold=3600.0)
    relay = open_cache(kind, mode, [server.server], deadline=0.05)
    keep(readers, "k", 1, b"old")
    server.freeze()
    while readers.nodes.homes[0].breaker.is_closed:  # trips on five calls in a row
        assert one(readers, lease("k")) == UNKNOWN
    assert one(readers, lease("k")) == UNKNOWN
    home: Any = {"place": Place.HOME}

    def repair() -> bool:
        machine = Repair("k", 2)
        while machine.request is not None:
            machine = machine.advance(one(relay, machine.request, **home))
        return machine.is_clean

    assert not repair()
    server.thaw()
    wait_until(repair, timeout=20, what="the relay reaches it")
    wait_until(
        lambda: one(readers, lease("k")) == UNKNOWN and readers.nodes.homes[0].breaker.is_closed,
        timeout=20,
        what="it answers them, too",
    )
    for _ in range(10):
        assert one(readers, lease("k")) == UNKNOWN, "held"
    assert readers.readmit(readers.home("k"))
    # What was sent while it was frozen it may do at last: then the lease is one of those.
    found = one(readers, lease("k"))
    assert found.outcome is Outcome.WON or found.kind is Kind.LEASE


def test_a_gutter_keeps_nothing_for_long(
    kind: str, mode: str, cache_server: NewServer, open_cache: Open
) -> None:
    gutter = cache_server(kind)
    dead = "127.0.0.1:1" if kind == "memcached" else "redis://127.0.0.1:1/0"
    backend = open_cache(kind, mode, [dead], gutter=[gutter.server])
    wait_until(lambda: one(backend, put("k", 1)) != UNKNOWN, timeout=10, what="the gutter is used")
    if kind == "memcached":
        left = int(gutter.ask(b"mg k t\r\n").split(b" t")[1].split()[0])
    else:
        left = int(gutter.ask(b"TTL shardkit:cache:k\r\n").strip(b":\r\n"))
    assert 0 < left <= 10


def test_a_lease_of_an_earlier_life_stores_nothing(
    mode: str, cache_server: NewServer, open_cache: Open
) -> None:
    """Memcached counts CAS numbers from 1 again after a restart."""
    server = cache_server("memcached")
    backend = open_cache("memcached", mode, [server.server])
    before: Any = one(backend, lease("k"))
    server.restart()
    after: Any = one(backend, lease("k"))
    assert after.outcome is Outcome.WON
    assert before.cas[1] == after.cas[1], "the number was used again"
    assert one(backend, store("k", before.cas, 1, b"stale")).outcome is Outcome.DIFFERS
    assert one(backend, store("k", after.cas, 2, b"good")).outcome is Outcome.DONE


def test_a_redis_that_comes_back_with_an_old_file_is_not_read(
    mode: str, cache_server: NewServer, open_cache: Open
) -> None:
    server = cache_server("redis")
    backend = open_cache("redis", mode, [server.server])
    keep(backend, "k", 1, b"old")
    server.restart()
    assert one(backend, lease("k")) == UNKNOWN
    (name,) = backend.dirty
    assert one(backend, lease("k")) == UNKNOWN
    assert not backend.readmit(name), "no repair finds what a restart lost"
    newcomer = open_cache("redis", mode, [server.server])
    assert one(newcomer, lease("k")) == UNKNOWN
    assert newcomer.dirty == {name}
    assert backend.flush(name)
    wait_until(
        lambda: one(backend, lease("k")).outcome is Outcome.WON, timeout=10, what="it is empty"
    )


def test_constant_evictions_lose_entries_and_mix_up_none(
    mode: str, cache_server: NewServer, open_cache: Open
) -> None:
    server = cache_server("memcached", "-m", "1", "-I", "512k")
    backend = open_cache("memcached", mode, [server.server])
    lost = 0
    for n in range(300):
        key = f"e{n % 60}"
        value = bytes([n % 60]) * 60_000
        found = one(backend, lease(key))
        if found.outcome is Outcome.WON:
            lost += n >= 60
            one(backend, store(key, found.cas, n, value))
        elif found.kind is Kind.VALUE:
            assert found.payload == value
    assert lost > 0, "nothing was evicted: the test shows nothing"


def test_slow_links_are_waited_for_and_lost_ones_are_not(
    kind: str, mode: str, cache_server: NewServer, open_cache: Open
) -> None:
    server = cache_server(kind)
    with FaultProxy("127.0.0.1", server.port, protocol="tcp") as proxy:
        address = f"127.0.0.1:{proxy.port}"
        address = f"redis://{address}/0" if kind == "redis" else address
        backend = open_cache(kind, mode, [address], deadline=0.3)
        keep(backend, "k", 1, b"v")
        proxy.shape(latency=0.03, slice_bytes=7)
        assert one(backend, lease("k")).payload == b"v"
        proxy.shape(latency=0.5)
        with within(0.45):
            assert one(backend, lease("k")) == UNKNOWN
        proxy.heal()
        keep(backend, "k", 2, b"w")
        assert one(backend, lease("k")).payload == b"w"  # not the late reply of before
        proxy.reset()
        assert one(backend, lease("k")).payload == b"w"  # an idle connection was lost
        backend.close()


class _Interrupting:
    """A clock that interrupts the program at its n-th reading."""

    def __init__(self) -> None:
        self.left = -1

    def monotonic(self) -> float:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return time.monotonic()

    def unix_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def sleep(self, seconds: float) -> None:
        raise AssertionError


def test_an_interrupt_leaves_no_half_read_connection(
    kind: str, cache_server: NewServer, open_cache: Open
) -> None:
    clock = _Interrupting()
    servers = [cache_server(kind).server for _ in range(2)]
    backend = open_cache(kind, "sync", servers, connections=1, clock=clock)
    keys = [f"k{n}" for n in range(10)]
    for key in keys:
        keep(backend, key, 1, key.encode())
    interrupted = 0
    for n in range(1, 30):
        clock.left = n
        with suppress(KeyboardInterrupt):
            backend.run([lease(key) for key in reversed(keys)])
            interrupted -= 1
        interrupted += 1
        clock.left = -1
        found = backend.run([lease(key) for key in keys])
        assert [answer.payload for answer in found] == [key.encode() for key in keys]
    assert interrupted >= 4


def test_a_cancelled_task_leaves_no_half_read_connection(
    kind: str, cache_server: NewServer
) -> None:
    server = cache_server(kind)
    with FaultProxy("127.0.0.1", server.port, protocol="tcp") as proxy:
        address = f"127.0.0.1:{proxy.port}"
        address = f"redis://{address}/0" if kind == "redis" else address

        async def main() -> None:
            backend: Any = KINDS[kind, "async"]([address], connections=1, deadline=PATIENT)
            for key in ("a", "b"):
                marked = (await backend.run([put(key, 1)]))[0]
                await backend.run([store(key, marked.cas, 1, key.encode())])
            proxy.stall()
            task = asyncio.create_task(backend.run([lease("a")]))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            proxy.heal()
            assert (await backend.run([lease("b")]))[0].payload == b"b"
            await backend.close()

        asyncio.run(main())


def test_a_forked_child_has_connections_of_its_own(
    kind: str, cache_server: NewServer, open_cache: Open
) -> None:
    backend = open_cache(kind, "sync", [cache_server(kind).server], connections=2)
    keep(backend, "parent", 1, b"parent")
    keep(backend, "child", 1, b"child")
    child = os.fork()
    if child == 0:
        good = all(one(backend, lease("child")).payload == b"child" for _ in range(200))
        os._exit(0 if good else 1)
    assert all(one(backend, lease("parent")).payload == b"parent" for _ in range(200))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_threads_share_few_connections(
    kind: str, cache_server: NewServer, open_cache: Open
) -> None:
    backend = open_cache(kind, "sync", [cache_server(kind).server], connections=2)
    keys = [f"t{n}" for n in range(8)]
    for key in keys:
        keep(backend, key, 1, key.encode())
    wrong: list[Answer] = []

    def read(key: str) -> None:
        for _ in range(100):
            found = one(backend, lease(key))
            if found.payload != key.encode():
                wrong.append(found)

    threads = [threading.Thread(target=read, args=(key,)) for key in keys]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_no_cache_is_clean_and_empty(mode: str) -> None:
    with asyncio.Runner() as runner:
        backend: Any = NullCache() if mode == "sync" else InLoop(AsyncNullCache(), runner)
        reader = Reader("k").advance(one(backend, lease("k")))
        assert reader.must_load
        assert not reader.holds_lease
        writer = Writer.begin("k", 1, b"v", lives=Lives())
        while (request := writer.request) is not None:
            writer = writer.advance(one(backend, request))
        writer = writer.committed()
        while (request := writer.request) is not None:
            writer = writer.advance(one(backend, request))
        assert writer.is_clean
