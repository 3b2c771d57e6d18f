"""A writer is killed between COMMIT and its last step in the cache; the relay sees to the rest."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from shardkit import Cluster, ids
from shardkit.cache import Kind, Op, Outcome, Request
from shardkit.cachewrites import CacheWrites
from shardkit.config import CacheConfig, PoolConfig, load
from shardkit.derivedplan import derived_plan
from shardkit.relay import Relay
from shardkit.testing import wait_until
from shardkit.topology import Topology
from tests.fixtures.caches import NewServer
from tests.models import Profile, Track, newest

pytestmark = [pytest.mark.integration, pytest.mark.fault]

ENOUGH = 30.0
"""Seconds to wait on a machine that has other things to do; what it took is printed."""


def opened(topology: Topology, node: str) -> Cluster:
    config = CacheConfig(backend="memcached", nodes=(node,))
    cluster = Cluster(topology, pool=PoolConfig(timeout=20.0), cache=config)
    assert cluster.cache is not None
    cluster.cache.backend.seconds = 2.0  # type: ignore[attr-defined]  # the machine may be busy
    return cluster


def rename(config: Path, node: str, key: int, committed: Any) -> None:
    """Change a row and die when that holds and the cache has only a marker."""

    def die(_self: CacheWrites) -> None:
        committed.value = time.time()
        os.kill(os.getpid(), signal.SIGKILL)

    CacheWrites.finish = die  # type: ignore[method-assign,assignment]  # nobody else runs in this process
    _, topology = load(config)
    with opened(topology, node).writer() as session:
        session.get_one(Profile, key).name = "eva"
        session.commit()


def name_of(cluster: Cluster, key: int) -> str:
    with cluster.reader() as session:
        return session.get_one(Profile, key).name


@pytest.mark.parametrize("is_evicted", [False, True], ids=["marked", "filled with the old row"])
def test_a_writer_that_dies_after_commit(
    topology: Topology, cluster_file: Path, cache_server: NewServer, *, is_evicted: bool
) -> None:
    server = cache_server("memcached")
    processes = multiprocessing.get_context("spawn")
    with opened(topology, server.server) as cluster:
        with cluster.writer() as session:
            profile = Profile(name="ana")
            session.add(profile)
            session.commit()
        Relay(cluster).drain()
        assert cluster.cache is not None
        key = cluster.cache.key_of("profiles", ids.shard_of(profile.id), (profile.id,))
        old = _entry(cluster, key)
        committed = processes.Value("d", 0.0)
        child = processes.Process(
            target=rename, args=(cluster_file, server.server, profile.id, committed)
        )
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        assert committed.value > 0
        if is_evicted:  # the marker went, and another reader filled what it had read before COMMIT
            _put_back(cluster, key, old)
            assert name_of(cluster, profile.id) == "ana"
        started = time.monotonic()
        with Relay(cluster):
            wait_until(lambda: name_of(cluster, profile.id) == "eva", ENOUGH, "it is repaired")
            took = time.monotonic() - started
            wait_until(lambda: _entry(cluster, key).version != old.version, ENOUGH, "nothing old")
        print(f"repaired {took:.3f} s after the relay began")
        assert name_of(cluster, profile.id) == "eva"


def add_track(config: Path, node: str, owner: int, committed: Any) -> None:
    """Add a row to a list and die when that holds and the cache has only a marker."""

    def die(_self: CacheWrites) -> None:
        committed.value = time.time()
        os.kill(os.getpid(), signal.SIGKILL)

    CacheWrites.finish = die  # type: ignore[method-assign,assignment]  # nobody else runs in this process
    _, topology = load(config)
    with opened(topology, node).writer() as session:
        session.add(Track(owner_id=owner))
        session.commit()


def test_a_writer_of_a_list_that_dies_after_commit(
    topology: Topology, cluster_file: Path, cache_server: NewServer
) -> None:
    """Another writer's marker had replaced its own, so that others could fill the old list."""
    server = cache_server("memcached")
    processes = multiprocessing.get_context("spawn")
    owner = ids.compose(3, 7, 1)
    with opened(topology, server.server) as cluster:

        def listed() -> list[int]:
            with cluster.reader() as session:
                return session.cached(newest, owner)

        assert listed() == []
        assert cluster.cache is not None
        key = cluster.cache.key(derived_plan(newest), 7, (owner,))
        old = _entry(cluster, key)
        Relay(cluster).drain()
        committed = processes.Value("d", 0.0)
        child = processes.Process(
            target=add_track, args=(cluster_file, server.server, owner, committed)
        )
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        assert committed.value > 0
        assert _entry(cluster, key).kind is Kind.MARKER
        assert len(listed()) == 1  # its marker shows nothing old
        _put_back(cluster, key, old)
        assert listed() == []
        with Relay(cluster):
            wait_until(lambda: len(listed()) == 1, ENOUGH, "it is repaired")


def _entry(cluster: Cluster, key: str) -> Any:
    assert cluster.cache is not None
    return cluster.cache.run([Request(Op.READ, key)])[0]


def _put_back(cluster: Cluster, key: str, old: Any) -> None:
    assert cluster.cache is not None
    put = Request(Op.PUT, key, None, old.kind, old.version, old.payload, 3600.0)
    assert cluster.cache.run([put])[0].outcome is Outcome.DONE


def test_a_relay_that_runs_repairs_at_once(
    topology: Topology, cluster_file: Path, cache_server: NewServer
) -> None:
    """From COMMIT of the killed writer to the last reader that could be shown the old row."""
    server = cache_server("memcached")
    processes = multiprocessing.get_context("spawn")
    with opened(topology, server.server) as cluster, Relay(cluster):
        with cluster.writer() as session:
            profile = Profile(name="ana")
            session.add(profile)
            session.commit()
        assert cluster.cache is not None
        key = cluster.cache.key_of("profiles", ids.shard_of(profile.id), (profile.id,))
        marked = _entry(cluster, key)
        committed = processes.Value("d", 0.0)
        child = processes.Process(
            target=rename, args=(cluster_file, server.server, profile.id, committed)
        )
        child.start()

        def is_repaired() -> bool:
            return committed.value > 0 and _entry(cluster, key).outcome is Outcome.NOTHING

        wait_until(is_repaired, ENOUGH, "the marker of the dead writer is removed")
        print(f"{time.time() - committed.value:.3f} s after COMMIT")
        child.join()
        assert marked.version > 0
        assert name_of(cluster, profile.id) == "eva"
