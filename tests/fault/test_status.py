"""`shardkit status` on real servers, some of which do not answer."""

from __future__ import annotations

import json
import time
from pathlib import Path

import psycopg
import pytest

from shardkit.cli import main
from shardkit.local import LocalCluster
from shardkit.testing import wait_until
from shardkit.topology import Topology
from tests.fixtures.sharded import Settled, admin

pytestmark = [pytest.mark.integration, pytest.mark.fault]


def status(
    capsys: pytest.CaptureFixture[str], file: Path
) -> tuple[object, dict[str, dict[str, object]]]:
    """Run the command; return its exit code and the endpoints by name of their address."""
    with pytest.raises(SystemExit) as caught:
        main(["status", "--json", "--config", str(file)])
    document = json.loads(capsys.readouterr().out)
    assert document["healthy"] is (caught.value.code == 0)
    return caught.value.code, {each["endpoint"]: each for each in document["endpoints"]}


def test_healthy_servers_are_all_shown(
    cluster_file: Path, topology: Topology, settled: Settled, capsys: pytest.CaptureFixture[str]
) -> None:
    settled()
    code, found = status(capsys, cluster_file)
    assert code == 0
    assert list(found) == [str(endpoint) for endpoint in topology.endpoints]
    for endpoint in topology.endpoints:
        each = found[str(endpoint)]
        assert each["is_reachable"] is True
        assert each["actual_role"] == each["role"] == endpoint.role
        # The primary's flushed position may lie a page beyond its last record.
        assert 0 <= int(str(each["lag_bytes"])) <= 8192
        # A record that the servers write by themselves may be on its way.
        assert 0.0 <= float(str(each["lag"])) < 10.0
        assert (each["epoch"], each["breaker"], each["error"]) == (1, "closed", None)
        assert isinstance(each["connections"], int)


def test_the_table_names_every_server(
    cluster_file: Path,
    topology: Topology,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as caught:
        main(["status", "--config", str(cluster_file)])
    out = capsys.readouterr().out
    assert caught.value.code == 0
    assert all(str(endpoint) in out for endpoint in topology.endpoints)


def test_a_replica_that_stands_still_lags_in_bytes_and_seconds(
    cluster_file: Path,
    topology: Topology,
    local_cluster: LocalCluster,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shard = topology.physical["alpha"]
    replica = local_cluster.replicas("alpha")[0]
    with psycopg.connect(local_cluster.superuser_dsn(replica.name), autocommit=True) as superuser:
        superuser.execute("SELECT pg_wal_replay_pause()")
        try:
            with admin(shard) as owner:
                owner.execute("SELECT pg_logical_emit_message(true, 'status', repeat('x', 100000))")
            name = next(str(e) for e in shard.replicas if e.url.port == replica.port)

            def lags() -> bool:
                each = status(capsys, cluster_file)[1][name]
                return int(str(each["lag_bytes"])) >= 100_000 and float(str(each["lag"])) > 0

            wait_until(lags, 10.0, "the lag is shown")
        finally:
            superuser.execute("SELECT pg_wal_replay_resume()")


def test_a_frozen_server_is_unreachable_and_keeps_nobody_waiting(
    cluster_file: Path,
    topology: Topology,
    local_cluster: LocalCluster,
    capsys: pytest.CaptureFixture[str],
) -> None:
    frozen = topology.physical["alpha"].primary
    local_cluster.pause(local_cluster.primary("alpha").name)
    try:
        started = time.monotonic()
        code, found = status(capsys, cluster_file)
        assert time.monotonic() - started < 4.0
    finally:
        local_cluster.resume(local_cluster.primary("alpha").name)
    assert code == 1
    each = found.pop(str(frozen))
    assert (each["is_reachable"], each["breaker"], each["actual_role"]) == (False, "open", None)
    assert each["error"]
    assert all(other["is_reachable"] for other in found.values())
