"""`shardkit cache`: servers that answer or do not, emptying one, and an audit that finds old rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import inspect

from shardkit import ids
from shardkit.cached import CachePlan, plan_of
from shardkit.caches.opening import backend
from shardkit.caching.entries import carried
from shardkit.caching.operations import Answer, Kind, Op, Outcome, Request
from shardkit.errors import ConfigurationError
from shardkit.ops.cache import node_status
from shardkit.ops.cacheaudit import AuditReport, audit, shown
from shardkit.ops.cachesamples import plans_in
from shardkit.rowcache import RowCache
from shardkit.sections import CacheConfig
from shardkit.testing import FakeClock
from shardkit.topology import Topology, schema_name
from tests.fixtures.caches import CacheServer, NewServer
from tests.fixtures.commands import shardkit
from tests.fixtures.redis_clusters import NewCluster
from tests.fixtures.sharded import admin
from tests.models import Profile

pytestmark = pytest.mark.integration

SHARD = 3


class Known:
    def __init__(self, topology: Topology) -> None:
        self.topology = topology


def plan() -> CachePlan:
    found = plan_of(inspect(Profile))
    assert found is not None
    return found


def new_row(topology: Topology, sequence: int, version: int) -> int:
    """Insert a profile past every session."""
    key = ids.compose(1, SHARD, sequence)
    with admin(topology.physical[topology.shard_map.owner(SHARD)]) as connection:
        table = f"{schema_name(SHARD)}.profiles"
        connection.execute(
            f"BEGIN; ALTER TABLE {table} DISABLE TRIGGER USER;"  # a version of its own
            f"INSERT INTO {table} (id, version, name, data, essay)"
            f" VALUES ({key}, {version}, 'ana', '{{}}', '');"
            f"ALTER TABLE {table} ENABLE TRIGGER USER; COMMIT"
        )
    return key


class Shown:
    """What servers show, written past every protocol."""

    def __init__(self, topology: Topology, config: CacheConfig) -> None:
        self.names = RowCache(config, Known(topology))
        self.cache = backend(config, deadline=5.0)

    def put(self, row: int, version: int, kind: Kind = Kind.VALUE, payload: bytes = b"x") -> None:
        key = self.names.key(plan(), SHARD, (row,))
        answer = self.cache.run([Request(Op.PUT, key, None, kind, version, payload, 60.0)])[0]
        assert answer.outcome is Outcome.DONE

    def audit(self, topology: Topology, config: CacheConfig) -> AuditReport:
        return audit(topology, config, [plan()], rows=1000, watch=0.0, clock=FakeClock())


Open = Callable[..., Shown]


@pytest.fixture
def shown_by(topology: Topology) -> Iterator[Open]:
    """Write to servers past every protocol; closed after the test."""
    opened: list[Shown] = []

    def start(config: CacheConfig) -> Shown:
        opened.append(Shown(topology, config))
        return opened[-1]

    yield start
    for each in opened:
        each.cache.close()


@pytest.fixture(params=["memcached", "redis"])
def server(request: pytest.FixtureRequest, cache_server: NewServer) -> CacheServer:
    return cache_server(request.param)


@pytest.fixture
def config(server: CacheServer) -> CacheConfig:
    kind: Any = server.kind
    return CacheConfig(backend=kind, nodes=(server.server,))


def test_an_audit_finds_what_is_older_than_was_committed(
    topology: Topology, config: CacheConfig, shown_by: Open
) -> None:
    rows = [new_row(topology, n, version=7) for n in range(1, 8)]
    shows = shown_by(config)
    shows.put(rows[0], 7)
    shows.put(rows[1], 8)  # committed since
    shows.put(rows[2], 9, Kind.MARKER, b"")
    good = shows.audit(topology, config)
    assert (good.rows, good.checked, good.consistent, good.violations) == (7, 21, 21, ())
    assert (good.cached, good.unanswered) == (6, 0)
    assert good.bound == pytest.approx(3 / 21, rel=0.1)
    shows.put(rows[3], 6)
    shows.put(rows[4], 0, Kind.ABSENCE, b"")
    before = carried(Answer(Outcome.FOUND, None, Kind.VALUE, 5, b"row"))
    shows.put(rows[5], 9, Kind.MARKER, before)
    bad = shows.audit(topology, config)
    assert (bad.checked, bad.consistent, bad.bound) == (21, 12, None)
    found = {(each.identity, each.found, each.after) for each in bad.violations}
    assert found == {
        ((str(row),), version, after)
        for row, version in ((rows[3], 6), (rows[4], 0), (rows[5], 5))
        for after in (0.25, 1.0, 5.0)
    }


def test_a_gutter_is_read_too(topology: Topology, cache_server: NewServer, shown_by: Open) -> None:
    home, gutter = cache_server("memcached"), cache_server("memcached")
    config = CacheConfig(backend="memcached", nodes=(home.server,), gutter=(gutter.server,))
    row = new_row(topology, 1, version=7)
    at_gutter = CacheConfig(backend="memcached", nodes=(gutter.server,))
    shown_by(at_gutter).put(row, 6)
    report = shown_by(config).audit(topology, config)
    assert [each.node for each in report.violations] == [gutter.address] * 3
    home.kill()
    report = shown_by(config).audit(topology, config)
    assert (report.unanswered, report.checked) == (3, 3)


def test_lived_kinds_show_what_readers_are_shown() -> None:
    found = Answer(Outcome.FOUND, 1, Kind.LEASE)
    assert [shown(found), shown(found._replace(kind=Kind.GARBAGE))] == [None, None]
    assert shown(Answer(Outcome.NOTHING)) is None


def test_plans_are_those_of_the_models() -> None:
    assert "Profile" in [each.name for each in plans_in("tests.models:Base")]
    for location in ("tests.models:Nothing", "no.such:Base", "tests.models"):
        with pytest.raises(ConfigurationError):
            plans_in(location)


def test_every_server_of_a_cluster_is_asked(redis_cluster: NewCluster) -> None:
    cluster = redis_cluster(3)
    config = CacheConfig(backend="redis-cluster", nodes=(cluster.urls[0],))
    found = node_status(config)
    assert {each.name for each in found} == {each.address for each in cluster.servers}
    assert all(each.answers and not each.must_flush for each in found)


def run(file: Path, *arguments: str) -> tuple[int | str, str, str]:
    return shardkit("cache", *arguments, "--config", str(file))


def test_the_command(
    topology: Topology,
    cluster_file: Path,
    cache_server: NewServer,
    shown_by: Open,
    tmp_path: Path,
) -> None:
    first, second = cache_server("memcached"), cache_server("memcached")
    file = tmp_path / "shardkit.toml"
    servers = f'["{first.server}", "{second.server}"]'
    file.write_text(
        f'{cluster_file.read_text()}\n[cache]\nbackend = "memcached"\nnodes = {servers}\n'
    )
    file.chmod(0o600)
    config = CacheConfig(backend="memcached", nodes=(first.server, second.server))
    row = new_row(topology, 1, version=7)
    shows = shown_by(config)
    shows.put(row, 7)
    metrics = tmp_path / "audit.prom"
    where = ("--models", "tests.models:Base", "--metrics-file", str(metrics))
    options = ("audit", *where, "--after", "0", "--watch", "0")
    code, out, error = run(file, *options, "--json")
    assert code == 0, error
    report = json.loads(out)
    assert report["checked"] == report["consistent"] >= 1
    (counted,) = report["servers"]
    name = f'{{server="{counted["node"]}"}} {report["checked"]}\n'
    assert f"shardkit_cache_audit_checked{name}" in metrics.read_text()
    assert f"shardkit_cache_audit_consistent{name}" in metrics.read_text()
    shows.put(row, 6)
    code, out, error = run(file, *options)
    assert code == 1
    assert str(row) in out
    assert "something old" in error
    home = shows.cache.home(shows.names.key(plan(), SHARD, (row,)))
    code, out, _ = run(file, "flush", home, "--dry-run")
    assert (code, out) == (0, f"{home} would be emptied\n")
    assert run(file, *options)[0] == 1
    assert run(file, "flush", home)[0] == 0
    assert run(file, *options)[0] == 0
    assert run(file, "flush", "127.0.0.1:1")[0] == 2
    code, out, _ = run(file, "status", "--json")
    assert code == 0
    assert [node["answers"] for node in json.loads(out)] == [True, True]
    second.kill()
    code, out, error = run(file, "status")
    assert code == 1
    assert second.server in error
