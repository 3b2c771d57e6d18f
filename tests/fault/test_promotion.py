"""A replica is promoted that never had a write: no token of the old timeline is met by it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import psycopg
import pytest
from sqlalchemy import insert

from shardkit import Cluster, ids, tokens
from shardkit.config import ReplicasConfig, load
from shardkit.gates import lsn_of
from shardkit.local import LocalCluster
from shardkit.ops.failover import adopt
from shardkit.testing import create_tables, wait_until
from shardkit.topology import Endpoint, Role, Topology
from tests.fixtures.servers import NewCluster
from tests.models import Base, User

pytestmark = [pytest.mark.integration, pytest.mark.fault]

KEY = ids.compose(1, 3, 0)


def write(cluster: Cluster, number: int) -> str:
    with cluster.writer() as session:
        session.add(User(id=ids.compose(2, 3, number), name=f"user {number}"))
        session.commit()
        return session.token


def ask(local: LocalCluster, name: str, query: str) -> object:
    with psycopg.connect(local.superuser_dsn(name), autocommit=True) as connection:
        row = connection.execute(query.encode()).fetchone()
    return None if row is None else row[0]


def replayed(local: LocalCluster, name: str) -> int:
    return lsn_of(str(ask(local, name, "SELECT pg_last_wal_replay_lsn()")))


def promoted(local: LocalCluster, topology: Topology) -> Topology:
    """The topology with alpha_1 as the primary, and alpha_2 as its replica."""
    shard = topology.physical["alpha"]
    by_port = {endpoint.url.port: endpoint for endpoint in shard.endpoints}

    def endpoint(name: str, role: Role) -> Endpoint:
        found = by_port[local.server(name).port]
        return Endpoint("alpha", role, found.url)

    changed = replace(
        shard,
        primary=endpoint("alpha_1", Role.PRIMARY),
        replicas=(endpoint("alpha_2", Role.REPLICA),),
    )
    return Topology(topology.name, {"alpha": changed}, topology.shard_map)


def test_a_replica_without_the_write_never_meets_its_token(new_cluster: NewCluster) -> None:
    with new_cluster(
        physical=1, replicas=2, logical_shards=8, redis=False, memcached=False, pgbouncer=False
    ) as local:
        config, topology = load(local.config_path)
        create_tables(topology, Base.metadata)
        with Cluster(topology) as before:
            seen = write(before, 0)
            for name in ("alpha_1", "alpha_2"):
                (mark,) = tokens.parse(seen).marks
                wait_until(partial(_passes, local, name, mark.lsn), 20.0, name)
                local.stop_server(name)
            lost = write(before, 1)  # acknowledged by the primary alone
        (mark,) = tokens.parse(lost).marks
        local.kill_server("alpha_0")
        local.start_server("alpha_1")
        ask(local, "alpha_1", "SELECT pg_promote()")
        adopt(config, topology, "alpha")
        local.start_server("alpha_2")
        port = local.server("alpha_1").port
        with psycopg.connect(local.superuser_dsn("alpha_2"), autocommit=True) as superuser:
            told = superuser.execute("SHOW primary_conninfo").fetchone()
            assert told is not None
            old = str(local.server("alpha_0").port)
            conninfo = told[0].replace(old, str(port))
            superuser.execute(
                f"ALTER SYSTEM SET primary_conninfo = '{conninfo.replace(chr(39), chr(39) * 2)}'".encode()
            )
            superuser.execute("SELECT pg_reload_conf()")
        after = promoted(local, topology)
        patient = ReplicasConfig(patience=5.0)
        with Cluster(after, replicas=patient) as cluster:
            fresh = ""
            for number in range(2, 50):  # the new timeline passes the position of the lost write
                fresh = write(cluster, number)
            (new_mark,) = tokens.parse(fresh).marks
            assert (new_mark.timeline, mark.timeline) == (2, 1)
            assert new_mark.system == mark.system
            wait_until(
                partial(_passes, local, "alpha_2", max(mark.lsn, new_mark.lsn)),
                20.0,
                "alpha_2 follows",
            )
            with cluster.reader(after=fresh) as session:
                assert session.get(User, ids.compose(2, 3, 49)) is not None
                assert _role(session) is Role.REPLICA  # the control: it is read when it may be
            for token in (lost, tokens.merge(seen, lost)):
                for _ in range(5):
                    with cluster.reader(after=token) as session:
                        assert session.get(User, ids.compose(2, 3, 1)) is None  # it is lost
                        assert _role(session) is Role.PRIMARY
                    # The primary's answer replaces the token by one of its own timeline.
                    assert {m.timeline for m in tokens.parse(session.token).marks} == {2}
            merged = tokens.merge(lost, fresh)
            with cluster.reader(after=merged) as session:
                assert session.get(User, ids.compose(2, 3, 49)) is not None


def test_a_connection_from_before_the_promotion_knows_that_its_server_is_no_replica(
    new_cluster: NewCluster,
) -> None:
    with new_cluster(
        physical=1, replicas=1, logical_shards=8, redis=False, memcached=False, pgbouncer=False
    ) as local:
        _, topology = load(local.config_path)
        create_tables(topology, Base.metadata)
        with Cluster(topology, replicas=ReplicasConfig(patience=5.0)) as cluster:
            token = write(cluster, 0)
            with cluster.reader(after=token) as session:
                assert session.get(User, ids.compose(2, 3, 0)) is not None
                assert _role(session) is Role.REPLICA
                ask(local, "alpha_1", "SELECT pg_promote()")
                with cluster.writer() as writer:  # on the old primary, which lives on
                    writer.execute(insert(User), [{"id": ids.compose(2, 3, 1), "name": "late"}])
                    writer.commit()
            with cluster.reader(after=writer.token) as session:
                assert session.get(User, ids.compose(2, 3, 1)) is not None
                assert _role(session) is Role.PRIMARY


def _role(session: object) -> Role:
    endpoint = session.endpoint_of("alpha")  # type: ignore[attr-defined]
    return endpoint.role  # type: ignore[no-any-return]


def _passes(local: LocalCluster, name: str, lsn: int) -> bool:
    return replayed(local, name) >= lsn
