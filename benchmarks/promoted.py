"""A replica is promoted that lacks writes: by whom their tokens are then believed.

Both replicas are stopped, the primary acknowledges writes alone, and is killed. One replica becomes
the primary and the other one follows it, until the new timeline is past the positions of the lost
writes: by position alone the replica would satisfy their tokens, by lineage it must not.
A part of `python -m benchmarks stale`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import psycopg
from psycopg import sql

from shardkit import Cluster, tokens
from shardkit.config import ReplicasConfig, load
from shardkit.gates import lsn_of
from shardkit.local import LocalCluster
from shardkit.ops.failover import adopt
from shardkit.testing import wait_until
from shardkit.topology import Endpoint, Role, Topology

TARGETS = {"old_tokens_met_by_replicas": "≤ 0", "new_tokens_met_by_replicas": "≥ 0.9"}
LOST = 1_000
"""Writes that no replica gets."""
PATIENCE = 60.0


def figures(local: LocalCluster, topology: Topology, model: type[Any]) -> dict[str, float]:
    """Promote, and return whose tokens a replica satisfied.

    Args:
        local: with the replicas alpha_1 and alpha_2; its primary is dead afterwards.
        topology: the same cluster.
        model: a sharded class with a `value`.
    """
    with Cluster(topology) as cluster:
        known = _write(cluster, model)
        for name in ("alpha_1", "alpha_2"):
            wait_until(partial(_has, local, name, known), PATIENCE, f"{name} replays")
            local.stop_server(name)
        lost = [_write(cluster, model) for _ in range(LOST)]
    local.kill_server("alpha_0")
    local.start_server("alpha_1")
    _run(local, "alpha_1", sql.SQL("SELECT pg_promote()"))
    config, _ = load(local.config_path)
    adopt(config, topology, "alpha")
    local.start_server("alpha_2")
    _follow(local, "alpha_2", old="alpha_0", new="alpha_1")
    with Cluster(_after(local, topology), replicas=ReplicasConfig(patience=5.0)) as cluster:
        fresh = _write(cluster, model)
        while _lsn(fresh) <= _lsn(lost[-1]):
            fresh = _write(cluster, model)
        wait_until(partial(_has, local, "alpha_2", fresh), PATIENCE, "alpha_2 follows")
        new = [_write(cluster, model) for _ in range(100)]
        return {
            "old_tokens": len(lost),
            "old_tokens_met_by_replicas": sum(_by_replica(cluster, model, t) for t in lost),
            "new_tokens_met_by_replicas": sum(_by_replica(cluster, model, t) for t in new)
            / len(new),
        }


def _write(cluster: Cluster, model: type[Any]) -> str:
    with cluster.writer() as session:
        session.add(model(value=0))
        session.commit()
        return session.token


def _by_replica(cluster: Cluster, model: type[Any], token: str) -> bool:
    """Read with a token; tell whether a replica answered."""
    with cluster.reader(after=token) as session:
        session.get(model, 1 << 10)
        endpoint = session.endpoint_of("alpha")
        return endpoint is not None and endpoint.role is Role.REPLICA


def _lsn(token: str) -> int:
    (mark,) = tokens.parse(token).marks
    return mark.lsn


def _has(local: LocalCluster, name: str, token: str) -> bool:
    row = _run(local, name, sql.SQL("SELECT pg_last_wal_replay_lsn()"))
    return row is not None and row[0] is not None and lsn_of(str(row[0])) >= _lsn(token)


def _run(local: LocalCluster, name: str, query: sql.SQL | sql.Composed) -> tuple[Any, ...] | None:
    with psycopg.connect(local.superuser_dsn(name), autocommit=True) as connection:
        found = connection.execute(query)
        return found.fetchone() if found.description else None


def _follow(local: LocalCluster, replica: str, *, old: str, new: str) -> None:
    """Have a replica follow another primary."""
    told = _run(local, replica, sql.SQL("SHOW primary_conninfo"))
    assert told is not None, "it is a replica"
    conninfo = str(told[0]).replace(str(local.server(old).port), str(local.server(new).port))
    _run(local, replica, sql.SQL("ALTER SYSTEM SET primary_conninfo = {}").format(conninfo))
    _run(local, replica, sql.SQL("SELECT pg_reload_conf()"))


def _after(local: LocalCluster, topology: Topology) -> Topology:
    """Return the topology with alpha_1 as the primary, and alpha_2 as its replica."""
    shard = topology.physical["alpha"]
    urls = {endpoint.url.port: endpoint.url for endpoint in shard.endpoints}
    primary, replica = (
        Endpoint("alpha", role, urls[local.server(name).port])
        for name, role in (("alpha_1", Role.PRIMARY), ("alpha_2", Role.REPLICA))
    )
    changed = replace(shard, primary=primary, replicas=(replica,))
    return Topology(topology.name, {"alpha": changed}, topology.shard_map)
