"""Behind a PgBouncer: names lead to the new primary, and one that is out of date is noticed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import psycopg
import pytest
from sqlalchemy.exc import DBAPIError

from shardkit import Cluster, deadline, ids
from shardkit.breaker import Breaker
from shardkit.config import FailoverConfig, load
from shardkit.errors import ShardkitError
from shardkit.local import LocalCluster, LocalHost, watched
from shardkit.local.account import server_account
from shardkit.local.binaries import find_service
from shardkit.ops.failover import fail_over
from shardkit.testing import create_tables, wait_until
from shardkit.writer import WriteSession
from tests.fixtures.servers import NewCluster
from tests.models import Base, User

pytestmark = [pytest.mark.integration, pytest.mark.fault]

PATIENCE = 60.0
SERIALIZABLE = "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE"
INSERT = "INSERT INTO shard_0001.users (id, name) VALUES (1, 'user 0')"


@pytest.fixture
def local(new_cluster: NewCluster) -> Iterator[LocalCluster]:
    if find_service("pgbouncer", server_account()) is None:
        pytest.skip("PgBouncer is not installed")
    with new_cluster(
        physical=1, replicas=2, logical_shards=4, redis=False, memcached=False
    ) as cluster:
        yield cluster


@pytest.mark.slow
def test_a_pooler_that_goes_back_to_the_old_primary_gets_no_writes(local: LocalCluster) -> None:
    config, topology = load(local.config_path)
    config = config.model_copy(update={"failover": FailoverConfig(every=0.0)})
    create_tables(topology, Base.metadata)
    with Cluster(topology) as cluster:
        write = partial(_write, cluster)
        write(1)
        local.kill_server("alpha_0")
        done = fail_over(
            config, topology, "alpha", host=LocalHost(local, fences=False, rejoins=False)
        )
        # By the pooler as by itself: nobody has told this process anything.
        write(2, alone=True)
        write(3)
        new = next(s.name for s in local.servers if done.primary.endswith(str(s.port)))
        assert _names(local, new) == ["user 1", "user 2", "user 3"]
        # The old primary starts, knows nothing, and the pooler is led there by mistake.
        local.start_server("alpha_0")
        local.lead("alpha", "alpha_0")
        wait_until(partial(_leads_to, local, "alpha_0"), PATIENCE, "the pooler is out of date")
        for number, alone in ((4, True), (5, False)):
            with pytest.raises(Exception, match="timeline"), deadline(3.0):
                write(number, alone=alone)
        # What is to go before any query goes before the check, which is made all the same.
        for first in (SERIALIZABLE, f"{SERIALIZABLE}; {INSERT}"):
            with pytest.raises(Exception, match="timeline"), deadline(3.0):
                _write_after(cluster, first)
        assert _names(local, "alpha_0") == ["user 1"]
        local.end_server("alpha_0")
        local.lead("alpha", new)
        wait_until(partial(_succeeds, partial(write, 6)), PATIENCE, "writes go on")
        assert _write_after(cluster, SERIALIZABLE) == "serializable"
    assert _names(local, new)[-1] == "user 6"


def test_a_breaker_that_opened_hears_of_the_new_primary(local: LocalCluster) -> None:
    """The address is the pooler's, before and after: it was to be left alone for a minute."""
    config, topology = load(local.config_path)
    config = config.model_copy(update={"failover": FailoverConfig(every=0.0)})
    create_tables(topology, Base.metadata)
    with Cluster(topology) as cluster:
        write = partial(_write, cluster)
        write(1)
        breaker = cluster.connections.guards[topology.physical["alpha"].primary].breaker
        breaker.reset_timeout = 60.0
        local.kill_server("alpha_0")
        wait_until(partial(_opens, breaker, partial(write, 2)), PATIENCE, "the breaker opens")
        assert breaker.retry_after is not None
        assert breaker.retry_after > 40.0
        fail_over(config, topology, "alpha", host=LocalHost(local, fences=False, rejoins=False))
        with deadline(20.0):
            write(3)
        assert breaker.is_closed


def test_a_breaker_that_opened_hears_of_a_primary_that_is_back(local: LocalCluster) -> None:
    _, topology = load(local.config_path)
    create_tables(topology, Base.metadata)
    with Cluster(topology) as cluster:
        write = partial(_write, cluster)
        write(1)
        breaker = cluster.connections.guards[topology.physical["alpha"].primary].breaker
        breaker.reset_timeout = 60.0
        local.kill_server("pgbouncer_alpha")
        wait_until(partial(_opens, breaker, partial(write, 2)), PATIENCE, "the breaker opens")
        local.start_server("pgbouncer_alpha")
        with deadline(20.0):
            write(3)


def test_an_embedded_cluster_replaces_its_primaries_by_itself(local: LocalCluster) -> None:
    _, topology = load(local.config_path)
    create_tables(topology, Base.metadata)
    said: list[str] = []
    with Cluster(topology) as cluster, watched(local, said.append):
        write = partial(_write, cluster)
        write(1)
        # In mode async nothing else says that a standby has it; what it has not is lost.
        for standby in ("alpha_1", "alpha_2"):
            wait_until(partial(_has, local, standby, "user 1"), PATIENCE, "it has replicated")
        local.kill_server("alpha_0")
        wait_until(lambda: any("promote:" in line for line in said), PATIENCE, "one is promoted")
        wait_until(partial(_succeeds, partial(write, 2)), PATIENCE, "poolers lead to it")
        wait_until(partial(_has, local, "alpha_0", "user 2"), PATIENCE, "it is back, and follows")
        assert _names(local, local.primary("alpha").name) == ["user 1", "user 2"]
    assert [line for line in said if "promote" in line] == [
        f"alpha: promote: 127.0.0.1:{local.primary('alpha').port}"
    ]


def _write(cluster: Cluster, number: int, *, alone: bool = False) -> None:
    """Write one user; alone as a commit that is one INSERT."""
    user = User(id=ids.compose(number, 1, 0), name=f"user {number}")
    if alone:
        cluster.run(lambda session: session.add(user))
        return

    def unit(session: WriteSession) -> None:
        session.flush()
        session.get(User, ids.compose(1, 1, 1))
        session.add(User(id=user.id, name=user.name))

    cluster.run(unit)


def _write_after(cluster: Cluster, first: str) -> str:
    """Write one user in a transaction that begins with some statement; return its isolation."""

    def unit(session: WriteSession) -> str:
        connection = session._connection_to(1)
        connection.exec_driver_sql(first)
        if first != SERIALIZABLE:
            return ""  # COMMIT is next
        session.add(User(id=ids.compose(7, 1, 0), name="user 5"))
        session.flush()
        return str(connection.exec_driver_sql("SHOW transaction_isolation").scalar_one())

    return cluster.run(unit)


def _succeeds(write: partial[None]) -> bool:
    try:
        with deadline(5.0):
            write()
    except ShardkitError:
        return False
    return True


def _opens(breaker: Breaker, write: partial[None]) -> bool:
    try:
        with deadline(1.0):
            write()
    except (ShardkitError, DBAPIError):
        pass
    return not breaker.is_closed


def _names(local: LocalCluster, server: str) -> list[str]:
    with psycopg.connect(local.superuser_dsn(server)) as superuser:
        rows = superuser.execute("SELECT name FROM shard_0001.users ORDER BY name").fetchall()
    return [name for (name,) in rows]


def _has(local: LocalCluster, server: str, name: str) -> bool:
    try:
        return name in _names(local, server)
    except psycopg.Error:
        return False


def _leads_to(local: LocalCluster, server: str) -> bool:
    _, topology = load(local.config_path)
    url = topology.physical["alpha"].primary.url.set(drivername="postgresql")
    try:
        with psycopg.connect(
            url.render_as_string(hide_password=False), autocommit=True, prepare_threshold=None
        ) as connection:
            row = connection.execute("SHOW port").fetchone()
    except psycopg.Error:
        return False
    return row is not None and int(row[0]) == local.server(server).port
