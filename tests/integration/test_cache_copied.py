"""Copies of hot rows in the process, by `[cache] copies`: nobody is shown an acknowledged past."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shardkit import AsyncCluster, Cluster
from shardkit.caches.copies import CopiedCache
from shardkit.config import CacheConfig, PoolConfig, load
from shardkit.errors import ConfigurationError
from shardkit.topology import Topology
from tests.fixtures.caches import NewServer
from tests.integration.test_cache_writes import name_of, new_profile
from tests.models import Profile

pytestmark = pytest.mark.integration

LIFE = 0.6
"""Seconds; long, so that a busy machine cannot be the reason why a copy is gone."""


@pytest.fixture
def config(cache_server: NewServer) -> CacheConfig:
    node = cache_server("memcached").server
    return CacheConfig(backend="memcached", nodes=(node,), copies={"profiles": LIFE})


def opened(topology: Topology, config: CacheConfig) -> Cluster:
    cluster = Cluster(topology, pool=PoolConfig(timeout=20.0), cache=config)
    assert cluster.cache is not None
    assert isinstance(cluster.cache.backend, CopiedCache)
    cluster.cache.backend._backend.seconds = 2.0  # type: ignore[attr-defined]  # busy, maybe
    return cluster


@pytest.fixture
def both(topology: Topology, config: CacheConfig) -> Iterator[tuple[Cluster, Cluster]]:
    """Two programs."""
    with opened(topology, config) as one, opened(topology, config) as two:
        yield one, two


def test_a_copy_is_shown_and_no_server_is_asked(
    both: tuple[Cluster, Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _ = both
    profile = new_profile(one)
    assert one.cache is not None
    asked: list[Any] = []
    inner = one.cache.backend._backend  # type: ignore[attr-defined]
    run = inner.run

    def counted(*arguments: Any, **options: Any) -> Any:
        asked.append(arguments)
        return run(*arguments, **options)

    monkeypatch.setattr(inner, "run", counted)
    began = time.monotonic()
    names = [name_of(one, profile.id) for _ in range(5)]
    if time.monotonic() - began < LIFE:  # as nearly always
        assert len(asked) == 1
    assert names == ["ana"] * 5


def test_after_the_acknowledgement_no_copy_is_older(both: tuple[Cluster, Cluster]) -> None:
    one, two = both
    profile = new_profile(one)
    for name in ("eva", "ida"):
        with one.writer() as session:
            held = session.get_one(Profile, profile.id)
            assert name_of(two, profile.id) == held.name, "and now it is copied there"
            held.name = name
            began = time.monotonic()
            session.commit()
            assert time.monotonic() - began >= LIFE
        assert name_of(two, profile.id) == name
        assert name_of(one, profile.id) == name


def test_what_is_rolled_back_is_not_waited_for(
    both: tuple[Cluster, Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = both
    profile = new_profile(one)
    slept: list[float] = []
    assert one.cache is not None
    monkeypatch.setattr(one.cache, "wait", slept.append)
    with one.writer() as session:
        session.get_one(Profile, profile.id).name = "eva"
        session.flush()
        session.rollback()
    assert not slept
    assert name_of(two, profile.id) == "ana"


@pytest.mark.anyio
async def test_asyncio(topology: Topology, config: CacheConfig) -> None:
    pool = PoolConfig(timeout=20.0)
    with opened(topology, config) as other:
        profile = new_profile(other)
        async with AsyncCluster(topology, pool=pool, cache=config) as cluster:
            async with cluster.writer() as session:
                held = await session.get_one(Profile, profile.id)
                assert name_of(other, profile.id) == "ana"
                held.name = "eva"
                await session.commit()
            assert name_of(other, profile.id) == "eva"


@pytest.mark.parametrize("copies", ["{ profiles = 0 }", "{ profiles = 1.5 }", "{ profiles = -1 }"])
def test_lives_that_writers_could_not_wait_for_are_refused(
    cluster_file: Path, tmp_path: Path, copies: str
) -> None:

    path = tmp_path / "shardkit.toml"
    text = f'[cache]\nbackend = "memcached"\nnodes = ["127.0.0.1:1"]\ncopies = {copies}\n'
    path.write_text(cluster_file.read_text().replace("[cache]", "[was_cache]") + text)
    with pytest.raises(ConfigurationError, match="copies"):
        load(path)
