"""Cached lists and counts on a real Memcached: never older than what was acknowledged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from shardkit import AsyncCluster, Cluster, ids
from shardkit.config import CacheConfig, PoolConfig
from shardkit.topology import Topology
from tests.fixtures.caches import CacheServer, NewServer
from tests.models import Play, Track, n_plays, n_tracks, newest

pytestmark = pytest.mark.integration


@pytest.fixture
def server(cache_server: NewServer) -> CacheServer:
    return cache_server("memcached")


@pytest.fixture
def cached(topology: Topology, server: CacheServer) -> Iterator[Cluster]:
    pool = PoolConfig(size=8, overflow=8, timeout=20.0)
    config = CacheConfig(backend="memcached", nodes=(server.server,))
    with Cluster(topology, pool=pool, cache=config) as cluster:
        cluster.cache.backend.seconds = 2.0
        yield cluster


def test_it(cached):
    owner = ids.compose(1, 3, 1)
    with cached.reader() as s:
        assert s.cached(newest, owner) == []
        assert s.cached(n_tracks, owner) == 0
        assert s.cached(newest, owner) == []
    print(cached.cache.counts)
    assert cached.cache.counts.hits == 1
    with cached.writer() as s:
        t = Track(owner_id=owner)
        s.add(t)
        s.commit()
    with cached.reader() as s:
        assert s.cached(newest, owner) == [t.id]
        assert s.cached(n_tracks, owner) == 1
        assert s.cached_many(n_tracks, [owner, owner + 1, ids.compose(1, 44, 1)]) == {
            owner: 1,
            owner + 1: 0,
            ids.compose(1, 44, 1): 0,
        }
        assert s.cached(n_plays, t.id) == 0
    with cached.reader() as s:
        assert s.cached(newest, owner) == [t.id]
        assert s.cached_many(n_tracks, [owner, owner + 1, ids.compose(1, 44, 1)]) == {
            owner: 1,
            owner + 1: 0,
            ids.compose(1, 44, 1): 0,
        }
    print(cached.cache.counts)
    assert 0
