"""The relay's repairs while one server of the cache hangs: the keys of others are not kept waiting.

Real servers. Calls may take minutes here, so that whoever waits for the one that hangs is seen.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator

import pytest

from shardkit import Cluster, ids
from shardkit.cache import Kind, Op, Outcome, Request
from shardkit.cacheable import CHANGED
from shardkit.cacherepairs import CacheRepairs
from shardkit.caches.memcached import Memcached
from shardkit.config import CacheConfig
from shardkit.outbox import Event
from shardkit.testing import wait_until
from shardkit.topology import Topology
from tests.fixtures.caches import CacheServer, NewServer

pytestmark = [pytest.mark.integration, pytest.mark.fault]

N_ROWS = 40
OLD, NEW = 1, 2
LONG = 120.0


@pytest.fixture
def servers(cache_server: NewServer) -> tuple[CacheServer, CacheServer]:
    return cache_server("memcached"), cache_server("memcached")


@pytest.fixture
def config(servers: tuple[CacheServer, CacheServer]) -> CacheConfig:
    return CacheConfig(backend="memcached", nodes=tuple(each.server for each in servers))


@pytest.fixture
def repairs(topology: Topology, config: CacheConfig) -> Iterator[CacheRepairs]:
    with Cluster(topology, cache=config) as cluster:
        repairs = CacheRepairs(config, cluster.connections)
        _, backend = repairs._open()
        backend.seconds = LONG  # type: ignore[attr-defined]
        repairs.patience = 1.0
        yield repairs
        repairs.close()


def changes() -> list[Event]:
    """Return one event for each row, of several logical shards."""
    now = dt.datetime.now(dt.UTC)
    return [
        Event(
            -n,
            CHANGED,
            None,
            {"table": "things", "tags": [""], "rows": [[[ids.compose(1, n % 4, n)], NEW]]},
            now,
            n % 2,  # some were tried before
            n % 4,
        )
        for n in range(1, N_ROWS + 1)
    ]


def test_a_server_that_hangs_delays_its_own_keys_only(
    repairs: CacheRepairs, servers: tuple[CacheServer, CacheServer], config: CacheConfig
) -> None:
    _, frozen = servers
    names, _ = repairs._open()
    events = changes()
    keys = {e.id: names.key_of("things", e.logical_shard, e.payload["rows"][0][0]) for e in events}
    clients = Memcached(config.nodes, deadline=LONG)
    old = [Request(Op.PUT, key, None, Kind.VALUE, OLD, b"old", 60.0) for key in keys.values()]
    assert {answer.outcome for answer in clients.run(old)} == {Outcome.DONE}
    theirs = {n for n, key in keys.items() if clients.home(key) == frozen.server}
    assert 0 < len(theirs) < N_ROWS

    frozen.freeze()
    left: list[Event] = events

    def only_theirs_are_left() -> bool:
        nonlocal left
        left = repairs(left)
        return {event.id for event in left} == theirs

    wait_until(only_theirs_are_left, LONG / 2, "what the other server has is repaired")
    others = [Request(Op.READ, key) for n, key in keys.items() if n not in theirs]
    assert {answer.outcome for answer in clients.run(others)} == {Outcome.NOTHING}

    frozen.thaw()
    wait_until(lambda: not repairs(left), LONG, "the rest is repaired")
    everything = [Request(Op.READ, key) for key in keys.values()]
    assert {answer.outcome for answer in clients.run(everything)} == {Outcome.NOTHING}
    clients.close()
