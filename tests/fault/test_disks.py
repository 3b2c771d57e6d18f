"""Rows 10 and 12: a disk is full, and pages are damaged.

One cluster of a primary and a standby for the file. Its disks are `tests/fixtures/disks.py`; the
pages are overwritten in files of a stopped server.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import func, select

from shardkit import Cluster, all_shards, deadline, ids
from shardkit.config import DurabilityConfig, FailoverConfig, load
from shardkit.errors import DamagedDataError, DiskFullError
from shardkit.local import LocalCluster, LocalHost
from shardkit.ops.failover.driver import Driver
from shardkit.ops.failover.machine import Cut, Fence, Promote, Rest
from shardkit.testing import create_tables
from shardkit.topology import Topology
from shardkit.writer import WriteSession
from tests.fixtures.disks import SmallDisk
from tests.fixtures.servers import lend, options
from tests.models import Base, User

pytestmark = [pytest.mark.integration, pytest.mark.fault]

PATIENCE = 60.0
PRIMARY = "alpha_0"
LONG = 2000
"""Letters of a name, so that a few rows fill a page."""


@pytest.fixture(scope="module")
def local(
    postgres_version: str,  # noqa: ARG001  skips when there is none
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[LocalCluster]:
    shape = options(physical=1, replicas=1, logical_shards=2, confirm=0, redis=False,
                    memcached=False, pgbouncer=False)  # fmt: skip
    with lend(tmp_path_factory.mktemp("disks") / "cluster", shape) as made:
        create_tables(load(made.config_path)[1], Base.metadata)
        yield made


@pytest.fixture
def topology(local: LocalCluster) -> Topology:
    return load(local.config_path)[1]


def ask(local: LocalCluster, query: str, name: str = PRIMARY) -> Any:
    with psycopg.connect(local.superuser_dsn(name), autocommit=True) as superuser:
        cursor = superuser.execute(query.encode())
        row = cursor.fetchone() if cursor.description else None
    return None if row is None else row[0]


def folder_of(local: LocalCluster) -> Path:
    return Path(ask(local, "SHOW data_directory"))


def add(session: WriteSession, number: int, shard: int = 0) -> None:
    session.add(User(id=ids.compose(number, shard, 1), name=os.urandom(LONG // 2).hex()))


def add_all(numbers: range, session: WriteSession, *, shard: int = 0) -> None:
    for number in numbers:
        add(session, number, shard)


def test_row_10_a_full_disk_refuses_writes_and_serves_reads(
    local: LocalCluster, topology: Topology
) -> None:
    with Cluster(topology) as cluster, cluster.writer() as session:
        add(session, 1)
        session.commit()
    data = folder_of(local)
    database = (
        data
        / "base"
        / str(ask(local, "SELECT oid FROM pg_database WHERE datname = current_database()"))
    )
    local.stop_server(PRIMARY)
    with SmallDisk(database, room=1 << 20) as disk:
        local.start_server(PRIMARY)
        started = ask(local, "SELECT pg_postmaster_start_time()")
        disk.fill()
        with Cluster(topology) as cluster:

            def write(numbers: range) -> None:
                with cluster.writer() as session:
                    for number in numbers:
                        add(session, number)
                    session.commit()

            def write_much() -> None:
                for n in range(2, 2000, 20):
                    write(range(n, n + 20))

            with pytest.raises(DiskFullError, match="disk is full") as caught:
                write_much()
            assert caught.value.logical_shard == 0
            assert caught.value.endpoint is not None
            assert caught.value.retryable
            n_before = ask(local, "SELECT count(*) FROM shard_0000.users")
            with cluster.reader() as reader:
                assert reader.scalar(
                    select(func.count()).select_from(User).options(all_shards())
                ) == n_before  # fmt: skip
            with closing(watcher(local, topology)) as driver:
                taken = [driver.step()[1] for _ in range(5)]
                while not isinstance(taken[-1], Rest):  # the standby may be late on a busy machine
                    assert len(taken) < 1000, taken[-5:]
                    taken.append(driver.step()[1])
                acts = [each for each in taken if isinstance(each, Fence | Cut | Promote)]
                assert not acts, "a full disk is no reason for a failover"
            # A unit of work is run again while its time lasts, and is given up with the reason.
            with deadline(1.0), pytest.raises(DiskFullError):
                cluster.run(partial(add_all, range(3000, 3020)))
            disk.empty()
            cluster.run(partial(add_all, range(4000, 4020)))
        assert ask(local, "SELECT pg_postmaster_start_time()") == started, "nobody had to help"
        assert ask(local, "SELECT count(*) FROM shard_0000.users") == n_before + 20
        local.stop_server(PRIMARY)
    local.start_server(PRIMARY)


def watcher(local: LocalCluster, topology: Topology) -> Driver:
    failover = FailoverConfig(every=0.0, patience=0.0, failures=1)
    return Driver(
        topology, "alpha", failover=failover, durability=DurabilityConfig(),
        host=LocalHost(local, rejoins=False),
    )  # fmt: skip


@pytest.mark.parametrize(("relation", "first"), [("users", 5000), ("users_pkey", 6000)])
def test_row_12_damaged_pages_are_named_and_never_empty(
    local: LocalCluster, topology: Topology, relation: str, first: int
) -> None:
    with Cluster(topology) as cluster:
        cluster.run(partial(add_all, range(first, first + 10), shard=1))
    path = folder_of(local) / ask(local, f"SELECT pg_relation_filepath('shard_0001.{relation}')")
    local.stop_server(PRIMARY)
    whole = path.read_bytes()
    with path.open("r+b") as file:
        for start in range(0, len(whole), 8192):
            file.seek(start + 4000)
            file.write(b"\xa5" * 96)
    local.start_server(PRIMARY)
    try:
        with Cluster(topology) as cluster:
            user = ids.compose(first + 1, 1, 1)
            with cluster.writer() as session, pytest.raises(DamagedDataError) as caught:
                session.execute(select(User).where(User.id == user)).all()
            assert caught.value.logical_shard == 1
            assert caught.value.table == "users"
            assert not caught.value.retryable
            assert "logical shard 1, alpha/primary" in str(caught.value)
            # Beside it nothing is lost, and a question to all is not answered without it.
            with cluster.writer() as session:
                add(session, first)
                session.commit()
                if relation == "users":
                    with pytest.raises(DamagedDataError, match="table 'users' is damaged"):
                        session.scalars(select(User.name).options(all_shards())).all()
    finally:
        local.stop_server(PRIMARY)
        path.write_bytes(whole)
        local.start_server(PRIMARY)
