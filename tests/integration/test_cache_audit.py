"""`shardkit cache audit` takes what it looks for from commits: rows, lists and counts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from shardkit import Cluster, ids
from shardkit.ops.cacheaudit import AuditReport, audit
from shardkit.ops.cachesamples import plans_in
from shardkit.relay import Relay
from shardkit.sections import CacheConfig
from shardkit.testing import FakeClock, wait_until
from shardkit.topology import Topology, schema_name
from tests.fixtures.caches import NewServer
from tests.fixtures.sharded import admin
from tests.models import Track, best, n_tracks, newest

pytestmark = pytest.mark.integration

SHARD = 5
DELAYS = (0.25, 1.0, 5.0)
SEQUENCE = itertools.count(1)


@pytest.fixture(params=["memcached", "redis"])
def config(request: pytest.FixtureRequest, cache_server: NewServer) -> CacheConfig:
    kind: Any = request.param
    home, gutter = cache_server(kind), cache_server(kind)
    return CacheConfig(backend=kind, nodes=(home.server,), gutter=(gutter.server,))


@pytest.fixture
def cluster(topology: Topology, config: CacheConfig) -> Iterator[Cluster]:
    with Cluster(topology, cache=config) as cluster:
        backend: Any = cluster.cache and cluster.cache.backend
        backend.seconds = 2.0  # the machine may be busy
        yield cluster


def look(topology: Topology, config: CacheConfig) -> AuditReport:
    """Look for what is in the outboxes; no time passes but for the audit."""
    plans = plans_in("tests.models:Base")
    return audit(topology, config, plans, watch=0.02, delays=DELAYS, clock=FakeClock())


def owner_with_tracks(cluster: Cluster, n: int) -> tuple[int, list[int]]:
    owner = ids.compose(2, SHARD, next(SEQUENCE))
    with cluster.writer() as session:
        tracks = [Track(owner_id=owner, title=f"t{k}", album=1, rank=k) for k in range(n)]
        session.add_all(tracks)
        session.commit()
        return owner, [track.id for track in tracks]


def shown_to_readers(cluster: Cluster, owner: int, track: int) -> tuple[Any, ...]:
    with cluster.reader() as session:
        found = session.get(Track, track)
        assert found is not None
        lists = (session.cached(newest, owner), session.cached(best, (owner, 1)))
        return (found.title, *lists, session.cached(n_tracks, owner))


def test_what_sessions_commit_is_seen_and_consistent(
    topology: Topology, config: CacheConfig, cluster: Cluster
) -> None:
    owner, tracks = owner_with_tracks(cluster, 3)
    shown_to_readers(cluster, owner, tracks[0])
    with cluster.writer() as session:
        track = session.get(Track, tracks[0])
        assert track is not None
        track.title = "new"
        session.delete(session.get(Track, tracks[1]))
        session.commit()
    shown_to_readers(cluster, owner, tracks[0])
    report = look(topology, config)
    # The rows are in an event each time they changed, and so are the keys of the lists and counts.
    assert report.commits >= 3 + 2 + 2 * 2
    assert (report.violations, report.unanswered) == ((), 0)
    assert report.checked == report.consistent == (report.commits + report.rows) * 3 * 2
    assert report.cached > 0
    assert sum(each.checked for each in report.servers) == report.checked
    assert {each.node for each in report.servers} == {
        name.removeprefix("redis://") for name in (*config.nodes, *config.gutter)
    }


def test_a_row_a_list_and_a_count_that_stay_old_are_found(
    topology: Topology, config: CacheConfig, cluster: Cluster
) -> None:
    owner, tracks = owner_with_tracks(cluster, 3)
    before = shown_to_readers(cluster, owner, tracks[0])
    assert look(topology, config).violations == ()
    with admin(topology.physical[topology.shard_map.owner(SHARD)]) as connection:
        table = f"{schema_name(SHARD)}.tracks"
        connection.execute(f"UPDATE {table} SET title = 'x' WHERE id = {tracks[0]}")
        connection.execute(f"DELETE FROM {table} WHERE id = {tracks[2]}")
    assert shown_to_readers(cluster, owner, tracks[0]) == before, "nobody has repaired it"
    report = look(topology, config)
    assert report.consistent == report.checked - len(report.violations)
    old = {(each.table, each.identity) for each in report.violations}
    assert old == {
        ("tracks", (str(tracks[0]),)),
        ("tracks", (str(tracks[2]),)),
        (newest.name, (str(owner),)),
        (best.name, (str(owner), "1")),
        (n_tracks.name, (str(owner),)),
    }
    assert {each.node for each in report.violations} == {
        config.nodes[0].removeprefix("redis://"),
    }
    (row,) = {
        (each.committed, each.found)
        for each in report.violations
        if each.identity == (str(tracks[2]),)
    }
    assert row[0] > row[1] > 0
    with Relay(cluster):
        wait_until(
            lambda: look(topology, config).violations == (), timeout=30, what="a relay repairs it"
        )
    assert shown_to_readers(cluster, owner, tracks[0])[0] == "x"


def test_what_is_newer_than_the_commit_is_not_old(
    topology: Topology, config: CacheConfig, cluster: Cluster
) -> None:
    owner, tracks = owner_with_tracks(cluster, 2)
    with admin(topology.physical[topology.shard_map.owner(SHARD)]) as connection:
        # A transaction that has begun before keeps the versions of fills below the commit's.
        connection.execute("BEGIN")
        connection.execute("SELECT pg_current_xact_id()")
        with cluster.writer() as session:
            session.add(Track(owner_id=owner, title="t", album=1, rank=9))
            session.commit()
        with Cluster(topology, cache=config) as other:
            backend: Any = other.cache and other.cache.backend
            backend.seconds = 2.0
            assert shown_to_readers(other, owner, tracks[0])[-1] == 3
        report = look(topology, config)
        assert report.cached > 0
        assert report.violations == ()
