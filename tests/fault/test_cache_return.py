"""A cache server that comes back with what it held: the network was cut, nothing was restarted."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path
from typing import Any, Self

import pytest

from shardkit import Cluster, ids
from shardkit.cache import Op, Request
from shardkit.caches.memcached import Memcached
from shardkit.config import CacheConfig, PoolConfig, load
from shardkit.relay import Relay
from shardkit.testing import FaultProxy, wait_until
from shardkit.topology import Topology
from tests.fixtures.caches import CacheServer, NewServer
from tests.models import Profile

pytestmark = [pytest.mark.integration, pytest.mark.fault]

ENOUGH = 60.0
"""Seconds to wait on a machine that has other things to do; what it took is printed."""
READS = 100


def opened(topology: Topology, node: str) -> Cluster:
    config = CacheConfig(backend="memcached", nodes=(node,))
    return Cluster(topology, pool=PoolConfig(timeout=20.0), cache=config)


def name_of(cluster: Cluster, key: int) -> str:
    with cluster.reader() as session:
        return session.get_one(Profile, key).name


def rename(cluster: Cluster, key: int) -> None:
    with cluster.writer() as session:
        session.get_one(Profile, key).name = "eva"
        session.commit()


def write_while_it_is_cut(config: Path, node: str, key: int, talk: Any) -> None:
    """Write; when told so, read again and again, and say what was shown."""
    _, topology = load(config)
    with opened(topology, node) as cluster:
        rename(cluster, key)
        talk.send("written")
        shown = set()
        while not talk.poll():
            shown.add(name_of(cluster, key))
        talk.recv()
        shown |= {name_of(cluster, key) for _ in range(READS)}
        talk.send(shown)


class Held:
    """What the server holds, asked past the proxy."""

    def __init__(self, server: CacheServer, cluster: Cluster, key: int) -> None:
        assert cluster.cache is not None
        self._key = cluster.cache.key_of("profiles", ids.shard_of(key), (key,))
        self._cache = Memcached([server.server], deadline=10.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._cache.close()

    def version(self) -> int:
        """Return the version of its entry; -1 when there is none."""
        (answer,) = self._cache.run([Request(Op.READ, self._key)])
        return answer.version if answer.cas is not None else -1


def new_profile(cluster: Cluster) -> int:
    """Insert one, and have it cached."""
    with cluster.writer() as session:
        profile = Profile(name="ana")
        session.add(profile)
        session.commit()
    Relay(cluster).drain()
    assert name_of(cluster, profile.id) == "ana"
    return profile.id


def patient(cluster: Cluster) -> Cluster:
    backend: Any = cluster.cache and cluster.cache.backend
    backend.seconds = 5.0  # what is not answered is read from the database, and shows nothing
    return cluster


def test_nobody_is_shown_for_long_what_was_missed(
    topology: Topology, cluster_file: Path, cache_server: NewServer
) -> None:
    """One process wrote meanwhile, and one did not notice; relays run all the time."""
    server = cache_server("memcached")
    processes = multiprocessing.get_context("spawn")
    with FaultProxy("127.0.0.1", server.port, protocol="tcp") as proxy:
        node = f"{proxy.host}:{proxy.port}"
        with opened(topology, node) as there, opened(topology, node) as third:
            patient(there)
            key = new_profile(there)
            with Held(server, there, key) as held:
                old = held.version()
                assert old > 0
                here, talk = processes.Pipe()
                with Relay(third), here, talk:
                    proxy.black_hole()
                    writer = processes.Process(
                        target=write_while_it_is_cut, args=(cluster_file, node, key, talk)
                    )
                    writer.start()
                    assert here.poll(ENOUGH), "it is written without the cache"
                    assert here.recv() == "written"
                    assert held.version() == old, "the server has heard nothing of it"
                    proxy.heal()
                    began = time.monotonic()
                    wait_until(lambda: name_of(there, key) == "eva", ENOUGH, "it is repaired")
                    print(f"shown until {time.monotonic() - began:.3f} s after it was healed")
                    assert {name_of(there, key) for _ in range(READS)} == {"eva"}
                    assert held.version() != old
                    here.send("enough")
                    assert here.poll(ENOUGH)
                    assert here.recv() == {"eva"}, "who wrote is never shown what was before"
                    writer.join()


def test_who_wrote_repairs_what_it_could_not_say_even_without_a_relay(
    topology: Topology, cache_server: NewServer
) -> None:
    server = cache_server("memcached")
    with FaultProxy("127.0.0.1", server.port, protocol="tcp") as proxy:
        node = f"{proxy.host}:{proxy.port}"
        with opened(topology, node) as here, opened(topology, node) as there:
            patient(there)
            key = new_profile(there)
            with Held(server, there, key) as held:
                old = held.version()
                proxy.black_hole()
                rename(here, key)
                proxy.heal()
                assert held.version() == old
                assert name_of(there, key) == "ana", "nobody has told the server, or this process"

                def is_repaired() -> bool:
                    assert name_of(here, key) == "eva"
                    return held.version() != old

                wait_until(is_repaired, ENOUGH, "who wrote removes it when the server answers")
                assert name_of(there, key) == "eva"
