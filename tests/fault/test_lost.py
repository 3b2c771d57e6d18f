"""Replicas that did not confirm: what a failover loses is listed, and nothing else is."""

from __future__ import annotations

import psycopg
import pytest

from shardkit import Cluster, ids
from shardkit.config import FailoverConfig, load
from shardkit.local import LocalCluster, LocalHost
from shardkit.ops.failover import fail_over
from shardkit.testing import create_tables, wait_until
from tests.fixtures.servers import NewCluster
from tests.fixtures.sharded import settle
from tests.models import Base, User

pytestmark = [pytest.mark.integration, pytest.mark.fault]

PATIENCE = 60.0


def user(number: int, shard: int = 1) -> int:
    return ids.compose(number, shard, 0)


def test_what_only_the_old_primary_had_is_listed_row_by_row(new_cluster: NewCluster) -> None:
    with new_cluster(
        physical=1, replicas=1, logical_shards=4, redis=False, memcached=False, pgbouncer=False
    ) as local:
        config, topology = load(local.config_path)
        config = config.model_copy(update={"failover": FailoverConfig(every=0.0)})
        create_tables(topology, Base.metadata)
        with Cluster(topology) as cluster, cluster.writer() as session:
            session.add_all([User(id=user(n), name=f"user {n}") for n in range(1, 5)])
            session.commit()
        settle(local, topology)
        pause_replay(local)
        with psycopg.connect(local.superuser_dsn("alpha_0"), autocommit=True) as old:
            old.execute("INSERT INTO shard_0002.users (id, name) VALUES (%s, 'new')", [user(9, 2)])
            old.execute("UPDATE shard_0001.users SET name = 'other' WHERE id = %s", [user(1)])
            old.execute("DELETE FROM shard_0001.users WHERE id = %s", [user(2)])
            old.execute("BEGIN")
            old.execute("INSERT INTO shard_0003.users (id, name) VALUES (%s, 'no')", [user(8, 3)])
            old.execute("ROLLBACK")
        local.kill_server("alpha_0")
        local.start_server("alpha_1")
        host = LocalHost(local, lists=True)
        fail_over(config, topology, "alpha", host=host)
        wait_until(lambda: "alpha_0" in host.lost, PATIENCE, "the old primary is a standby")
        found = {(r.logical_shard, r.table, r.kind, r.row["name"]) for r in host.lost["alpha_0"]}
        assert found == {
            (2, "users", "written", "new"),
            (1, "users", "written", "other"),
            (1, "users", "deleted", "user 2"),
        }
        written = [r for r in host.lost["alpha_0"] if r.kind == "written"]
        assert all(r.transaction and r.committed for r in written)
        assert {r.key["id"] for r in host.lost["alpha_0"]} == {user(9, 2), user(1), user(2)}


def pause_replay(local: LocalCluster) -> None:
    """Have the replica receive nothing more."""
    local.stop_server("alpha_1")
