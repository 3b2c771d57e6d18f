"""Under Patroni: it promotes, the watcher registers what it promoted, and clients follow.

Runs with `make test-patroni`, which installs Patroni from the system's packages; its own consensus
(`raft`) is the store it needs, so nothing else runs.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psycopg
import pytest

from shardkit import Cluster, ids
from shardkit.config import load
from shardkit.local import ports
from shardkit.local.account import child_environment, server_account
from shardkit.local.binaries import find_postgres
from shardkit.ops.failover import watch
from shardkit.ops.failover.machine import Action, Promote, Register
from shardkit.testing import create_tables, wait_until
from shardkit.writer import WriteSession
from tests.models import Base, User

pytestmark = [pytest.mark.integration, pytest.mark.fault]

PATIENCE = 120.0
NODES = 3
PASSWORD = "only-for-this-test"


@dataclass
class Fleet:
    """Three Patronis, each with its PostgreSQL."""

    folder: Path
    sql: list[int]
    rest: list[int]
    raft: list[int]
    processes: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)

    def dsn(self, n: int, user: str = "postgres", database: str = "shardkit") -> str:
        return f"postgresql://{user}:{PASSWORD}@127.0.0.1:{self.sql[n]}/{database}"

    def start(self, n: int) -> None:
        account = server_account()
        program = find_postgres(account)
        here = self.folder / f"node{n}"
        here.mkdir(mode=0o700, exist_ok=True)
        rules = ["local all all trust", "host replication all 127.0.0.1/32 scram-sha-256",
                 "host all all 127.0.0.1/32 scram-sha-256"]  # fmt: skip
        config = {
            "scope": "alpha",
            "name": f"node{n}",
            "restapi": {"listen": f"127.0.0.1:{self.rest[n]}",
                        "connect_address": f"127.0.0.1:{self.rest[n]}"},
            "raft": {"data_dir": str(here / "raft"), "self_addr": f"127.0.0.1:{self.raft[n]}",
                     "partner_addrs": [f"127.0.0.1:{p}" for p in self.raft if p != self.raft[n]]},
            "bootstrap": {
                "dcs": {"ttl": 20, "loop_wait": 2, "retry_timeout": 3,
                        "maximum_lag_on_failover": 1048576,
                        "postgresql": {"use_pg_rewind": True, "parameters": {
                            "wal_level": "logical", "max_prepared_transactions": 16,
                            "fsync": "off", "shared_buffers": "16MB"}}},
                "initdb": [{"encoding": "UTF8"}, {"locale": "C.UTF-8"}],
            },
            "postgresql": {
                "listen": f"127.0.0.1:{self.sql[n]}",
                "connect_address": f"127.0.0.1:{self.sql[n]}",
                "data_dir": str(here / "data"),
                "bin_dir": str(Path(program.path).parent),
                "pgpass": str(here / "pgpass"),
                "pg_hba": rules,
                "parameters": {"unix_socket_directories": str(self.folder)},
                "authentication": {
                    "superuser": {"username": "postgres", "password": PASSWORD},
                    "replication": {"username": "replicator", "password": PASSWORD},
                },
            },
        }  # fmt: skip
        file = here / "patroni.yml"
        file.write_text(json.dumps(config), encoding="utf-8")  # which is YAML, too
        if account.is_switched:
            shutil.chown(here, account.uid, account.gid)
            shutil.chown(file, account.uid, account.gid)
        with (self.folder / f"node{n}.log").open("ab") as log:
            self.processes[n] = subprocess.Popen(
                ["patroni", str(file)],
                stdout=log, stderr=log, cwd=here, env=dict(child_environment()),
                start_new_session=True, **account.spawn_arguments,
            )  # fmt: skip

    def kill(self, n: int) -> None:
        """End Patroni and its PostgreSQL as a crash of the machine would."""
        pid_file = self.folder / f"node{n}" / "data" / "postmaster.pid"
        process = self.processes.pop(n)
        process.kill()
        process.wait()
        with suppress(FileNotFoundError, ProcessLookupError):
            postmaster = int(pid_file.read_text(encoding="utf-8").splitlines()[0])
            os.kill(postmaster, signal.SIGQUIT)

    def leader(self) -> int | None:
        for n in range(NODES):
            with (
                suppress(psycopg.Error),
                psycopg.connect(self.dsn(n, database="postgres"), connect_timeout=2) as connection,
            ):
                row = connection.execute("SELECT pg_is_in_recovery()").fetchone()
                if row == (False,):
                    return n
        return None


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    if shutil.which("patroni") is None:
        pytest.skip("Patroni is not installed")
    account = server_account()
    folder = Path(tempfile.mkdtemp(prefix="shardkit-patroni-", dir="/var/tmp"))
    if account.is_switched:
        shutil.chown(folder, account.uid, account.gid)
    taken: set[int] = set()
    for _ in range(3 * NODES):
        taken.add(ports.choose(taken))
    numbers = sorted(taken)
    found = Fleet(folder, numbers[:NODES], numbers[NODES : 2 * NODES], numbers[2 * NODES :])
    try:
        for n in range(NODES):
            found.start(n)
        yield found
    finally:
        for n in list(found.processes):
            found.kill(n)
        shutil.rmtree(folder, ignore_errors=True)


def prepared(fleet: Fleet, leader: int, folder: Path) -> Path:
    """Make the roles and the database, and write the configuration."""
    with psycopg.connect(fleet.dsn(leader, database="postgres"), autocommit=True) as superuser:
        for statement in (
            f"CREATE ROLE shardkit_admin LOGIN SUPERUSER PASSWORD '{PASSWORD}'",
            f"CREATE ROLE shardkit_app LOGIN PASSWORD '{PASSWORD}'",
            "CREATE DATABASE shardkit OWNER shardkit_admin",
        ):
            superuser.execute(statement.encode())
    urls = [fleet.dsn(n, "shardkit_app") for n in range(NODES)]
    others = [url for n, url in enumerate(urls) if n != leader]
    file = folder / "shardkit.toml"
    file.write_text(
        f"""
[cluster]
name = "patroni"
logical_shards = 4
[admin]
user = "shardkit_admin"
password = "{PASSWORD}"
[failover]
mode = "follow"
wait = 90.0
[[physical]]
name = "alpha"
logical_shards = "0-3"
primary = "{urls[leader]}"
replicas = {json.dumps(others)}
""",
        encoding="utf-8",
    )
    file.chmod(0o600)
    return file


def test_patroni_promotes_and_clients_follow(fleet: Fleet, tmp_path: Path) -> None:
    wait_until(lambda: fleet.leader() is not None, PATIENCE, "Patroni has a leader")
    leader = fleet.leader()
    assert leader is not None
    config, topology = load(prepared(fleet, leader, tmp_path))
    create_tables(topology, Base.metadata)
    wait_until(partial(_streaming, fleet, leader), PATIENCE, "replicas follow")
    actions: list[Action] = []
    stop = threading.Event()
    watcher = threading.Thread(
        target=watch, args=(config, topology),
        kwargs={"stop": stop, "progress": lambda _p, action: actions.append(action)},
    )  # fmt: skip
    watcher.start()
    try:
        with Cluster(topology, failover_wait=config.failover.wait) as cluster:
            _write(cluster, 1)
            wait_until(partial(_replayed, fleet, leader), PATIENCE, "replicas have it")
            fleet.kill(leader)
            _write(cluster, 2)
            after = fleet.leader()
            assert after not in {None, leader}
            assert cluster.topology.physical["alpha"].primary.url.port == fleet.sql[after or 0]
            with cluster.writer() as session:
                for number in (1, 2):
                    assert session.get(User, ids.compose(number, 1, 0)) is not None
    finally:
        stop.set()
        watcher.join()
    assert any(isinstance(action, Register) for action in actions)
    assert not any(isinstance(action, Promote) for action in actions), "that is Patroni's"


def _write(cluster: Cluster, number: int) -> None:
    def unit(session: WriteSession) -> None:
        session.add(User(id=ids.compose(number, 1, 0), name=f"user {number}"))

    cluster.run(unit, operation=f"user {number}", near=ids.compose(number, 1, 0))


def _streaming(fleet: Fleet, leader: int) -> bool:
    with psycopg.connect(fleet.dsn(leader)) as connection:
        row = connection.execute(
            "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'"
        ).fetchone()
    return row == (NODES - 1,)


def _replayed(fleet: Fleet, leader: int) -> bool:
    with psycopg.connect(fleet.dsn(leader)) as connection:
        row = connection.execute(
            "SELECT bool_and(replay_lsn >= pg_current_wal_flush_lsn()) FROM pg_stat_replication"
        ).fetchone()
    return row == (True,)
