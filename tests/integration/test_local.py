"""The embedded cluster, on real servers."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import errors
from sqlalchemy import URL

from shardkit.config import load
from shardkit.errors import ConfigurationError, LocalServerError, RefusedError
from shardkit.local import (
    LocalCluster,
    ServerKind,
    ServerStatus,
    processes,
    read_status,
    stop_cluster,
    watched,
)
from shardkit.local.processes import ProcessMark
from shardkit.testing import wait_until
from shardkit.topology import Pooler, Role
from tests.fixtures.servers import NewCluster, options

pytestmark = [
    pytest.mark.integration,
    pytest.mark.uncontained("is about the embedded cluster itself"),
]

SMALL = {"physical": 1, "replicas": 1, "logical_shards": 4, "memcached": False}
PROJECT = Path(__file__).parents[2]
OWNER = """
import sys
from shardkit.local import LocalCluster, LocalOptions
with LocalCluster(sys.argv[1], LocalOptions(
    physical=1, replicas=1, logical_shards=4, memcached=False, fsync=False, shared_buffers_mb=16
)) as cluster:
    print("up", flush=True)
    sys.stdin.read()
"""


def connect(url: URL, **changes: Any) -> psycopg.Connection[tuple[Any, ...]]:
    plain = url.set(drivername="postgresql").render_as_string(hide_password=False)
    return psycopg.connect(plain, autocommit=True, connect_timeout=5, **changes)


def ask(dsn: str, query: LiteralString) -> Any:
    """Return the first value a query answers, None when it answers nothing."""
    with psycopg.connect(dsn, autocommit=True, connect_timeout=5) as connection:
        cursor = connection.execute(query)
        row = cursor.fetchone() if cursor.description else None
        return row[0] if row else None


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "shardkit", "local", *map(str, arguments)],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


def marks(directory: Path) -> list[ProcessMark]:
    """Return every process of a cluster, children included."""
    state = json.loads((directory / "state.json").read_text(encoding="utf-8"))
    folders = [Path(state["data"]) / server["name"] for server in state["servers"]]
    return [mark for folder in folders for mark in processes.processes_in(folder)]


def gone(found: list[ProcessMark]) -> bool:
    return not any(processes.is_alive(mark) for mark in found)


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Run a cluster in a process of its own; `new_cluster`, if asked for, has its directory."""
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path / "cluster")],
        cwd=PROJECT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "up\n"
        yield child
        child.kill()


def warden_of(pid: int) -> ProcessMark:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    for child in map(int, children):
        if b"warden.py" in Path(f"/proc/{child}/cmdline").read_bytes():
            mark = processes.find(child)
            assert mark is not None
            return mark
    raise AssertionError("no warden")


def test_the_default_shape_is_two_primaries_with_two_replicas_each(
    local_cluster: LocalCluster,
) -> None:
    config, topology = load(local_cluster.config_path)
    assert list(topology.physical) == ["alpha", "beta"]
    assert topology.n_logical_shards == 64
    assert [e.role for e in topology.endpoints] == [Role.PRIMARY, Role.REPLICA, Role.REPLICA] * 2
    assert {s.status for s in local_cluster.servers} == {ServerStatus.RUNNING}
    for name, address in config.services.items():
        assert str(local_cluster.server(name).port) in address


def test_every_endpoint_lets_the_application_in_with_its_role(local_cluster: LocalCluster) -> None:
    _, topology = load(local_cluster.config_path)
    for endpoint in topology.endpoints:
        with connect(endpoint.url) as connection:
            row = connection.execute(
                "SELECT current_user, pg_is_in_recovery(), current_setting('is_superuser')"
            ).fetchone()
        assert row == ("shardkit_app", endpoint.role is Role.REPLICA, "off")


def test_the_admin_owns_the_database_and_is_no_superuser(local_cluster: LocalCluster) -> None:
    _, topology = load(local_cluster.config_path)
    for shard in topology.physical.values():
        with connect(shard.admin_url) as admin, connect(shard.primary.url) as application:
            admin.execute("CREATE SCHEMA grants_test")
            assert admin.execute("SELECT current_setting('is_superuser')").fetchone() == ("off",)
            for refused in ("CREATE SCHEMA mine", "CREATE TABLE public.mine (a int)"):
                with pytest.raises(errors.InsufficientPrivilege):
                    application.execute(refused)
            admin.execute("DROP SCHEMA grants_test")


def test_the_superuser_cannot_come_by_network(local_cluster: LocalCluster) -> None:
    _, topology = load(local_cluster.config_path)
    url = topology.physical["alpha"].primary.url
    with pytest.raises(psycopg.OperationalError, match=r"pg_hba\.conf rejects"):
        connect(url.set(username="postgres", password="x"))


def test_a_replica_streams(local_cluster: LocalCluster) -> None:
    _, topology = load(local_cluster.config_path)
    for shard in topology.physical.values():
        with connect(shard.admin_url) as admin:
            admin.execute(
                "CREATE TABLE public.streams (a int); INSERT INTO public.streams VALUES (7)"
            )
            admin.execute("GRANT SELECT ON public.streams TO shardkit_app")
            for replica in shard.replicas:
                with connect(replica.url) as reader:

                    def sees(reader: psycopg.Connection[tuple[Any, ...]] = reader) -> bool:
                        try:
                            return reader.execute("SELECT a FROM public.streams").fetchone() == (7,)
                        except (errors.UndefinedTable, errors.InsufficientPrivilege):
                            return False

                    wait_until(sees, 10, f"{replica} shows the row")
            admin.execute("DROP TABLE public.streams")


def test_physical_shards_are_different_systems(local_cluster: LocalCluster) -> None:
    query = "SELECT system_identifier FROM pg_control_system()"
    found = {
        server.name: ask(local_cluster.superuser_dsn(server.name), query)
        for server in local_cluster.servers
        if server.kind is ServerKind.POSTGRESQL
    }
    assert len(found) == 6
    assert len(set(found.values())) == 2


def test_passwords_are_in_private_files_only(local_cluster: LocalCluster) -> None:
    directory = local_cluster.config_path.parent
    state = json.loads((directory / "state.json").read_text(encoding="utf-8"))
    passwords = json.loads((directory / "passwords.json").read_text(encoding="utf-8")).values()
    holders = 0
    for folder in (directory, directory / "logs", Path(state["data"]) / "conf"):
        for file in folder.iterdir():
            if file.is_file() and any(p in file.read_text(encoding="utf-8") for p in passwords):
                holders += 1
                assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    assert holders >= 3


def test_pgbouncer_stands_before_every_server_and_commands_go_straight(
    new_cluster: NewCluster,
) -> None:
    with new_cluster(**SMALL | {"replicas": 2, "pgbouncer": True}) as local:
        if "pgbouncer" in local.missing:
            pytest.skip("PgBouncer is not installed")
        config, topology = load(local.config_path)
        (shard,) = topology.physical.values()
        pooler = local.server("pgbouncer_alpha")
        assert shard.pooler == Pooler(tuple(int(n) for n in pooler.version.split(".")))
        assert "pgbouncer_alpha" not in config.services, "it is an address of PostgreSQL"
        assert shard.primary.read_url is not None
        query = "SELECT pg_is_in_recovery(), current_setting('transaction_read_only')"
        for url, expected in (
            (shard.primary.url, (False, "off")),
            (shard.primary.read_url, (False, "on")),
            *((replica.url, (True, "on")) for replica in shard.replicas),
        ):
            assert url.port == pooler.port
            with connect(url) as connection:
                assert connection.execute(query).fetchone() == expected
        assert shard.admin_url.port == local.primary("alpha").port
        with connect(shard.admin_url) as connection:
            assert connection.execute(query).fetchone() == (False, "off")
    with new_cluster(**SMALL | {"replicas": 2, "pgbouncer": False}) as local:
        _, topology = load(local.config_path)
        (shard,) = topology.physical.values()
        assert shard.pooler is None
        assert shard.primary.read_url is None
        assert shard.primary.url.port == shard.admin_url.port == local.primary("alpha").port


def test_a_paused_server_answers_nobody_until_it_is_resumed(local_cluster: LocalCluster) -> None:
    dsn = local_cluster.superuser_dsn("beta_2")
    local_cluster.pause("beta_2")
    try:
        wait_until(
            lambda: local_cluster.server("beta_2").status is ServerStatus.PAUSED,
            10.0,
            "the signal has arrived",
        )
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(dsn, connect_timeout=2)
    finally:
        local_cluster.resume("beta_2")
    assert ask(dsn, "SELECT 1") == 1


def test_a_killed_server_comes_back_on_its_port(local_cluster: LocalCluster) -> None:
    before = local_cluster.server("alpha_2")
    local_cluster.kill_server("alpha_2")
    assert local_cluster.server("alpha_2").pid is None
    with pytest.raises(psycopg.OperationalError):
        ask(local_cluster.superuser_dsn("alpha_2"), "SELECT 1")
    local_cluster.start_server("alpha_2")
    after = local_cluster.server("alpha_2")
    assert after.port == before.port
    assert after.pid != before.pid
    assert ask(local_cluster.superuser_dsn("alpha_2"), "SELECT pg_is_in_recovery()") is True


def test_a_pooler_that_ended_by_itself_is_started_again_and_a_stopped_one_is_not(
    new_cluster: NewCluster,
) -> None:
    """PgBouncer 1.18 ends now and then when a query is cancelled."""
    said: list[str] = []
    with new_cluster(**SMALL | {"replicas": 0}) as cluster:
        before = cluster.server("pgbouncer_alpha")
        cluster.kill_server("pgbouncer_alpha")
        assert cluster.revive() == []
        cluster.start_server("pgbouncer_alpha")
        with watched(cluster, said.append):
            pid = cluster.server("pgbouncer_alpha").pid
            assert pid is not None
            assert pid != before.pid
            os.kill(pid, signal.SIGABRT)
            wait_until(lambda: bool(said), 60, "it is started again")
            _, topology = load(cluster.config_path)
            with connect(topology.physical["alpha"].primary.url) as application:
                assert application.execute("SELECT 1").fetchone() == (1,)
    assert said == ["pgbouncer_alpha had ended, and runs again"]


def test_data_and_ports_survive_a_restart(new_cluster: NewCluster) -> None:
    cluster = new_cluster(**SMALL)
    cluster.start()
    ports = {s.name: s.port for s in cluster.servers}
    ask(cluster.superuser_dsn("alpha_0"), "CREATE TABLE kept AS SELECT 5 AS a")
    text = cluster.config_path.read_text(encoding="utf-8")
    cluster.stop()
    cluster.start()
    assert {s.name: s.port for s in cluster.servers} == ports
    assert ask(cluster.superuser_dsn("alpha_0"), "SELECT a FROM kept") == 5
    assert cluster.config_path.read_text(encoding="utf-8") == text


def test_stop_leaves_no_process(new_cluster: NewCluster, tmp_path: Path) -> None:
    cluster = new_cluster(**SMALL)
    cluster.start()
    found = marks(tmp_path / "cluster")
    assert len(found) > len(cluster.servers)
    cluster.stop()
    cluster.stop()
    assert gone(found)
    assert marks(tmp_path / "cluster") == []


@pytest.mark.usefixtures("new_cluster")
def test_the_warden_ends_the_servers_of_a_killed_owner(
    owner: subprocess.Popen[str], tmp_path: Path
) -> None:
    found = marks(tmp_path / "cluster")
    assert found
    owner.kill()
    wait_until(lambda: gone(found), 20, "the servers of the killed owner are gone")


def test_the_next_start_ends_what_a_killed_owner_left(
    new_cluster: NewCluster, owner: subprocess.Popen[str], tmp_path: Path
) -> None:
    cluster = new_cluster(**SMALL)
    with pytest.raises(RefusedError, match=str(owner.pid)):
        cluster.start()
    status = read_status(tmp_path / "cluster")
    primary = next(s for s in status.servers if s.role is Role.PRIMARY)
    _, topology = load(status.config)
    with connect(topology.physical["alpha"].admin_url) as admin:
        admin.execute("CREATE TABLE public.kept AS SELECT 9 AS a")
    found = marks(tmp_path / "cluster")
    processes.send(warden_of(owner.pid), signal.SIGKILL)
    # A backend whose postmaster was killed first is what a crash leaves behind, too.
    owner.kill()
    owner.wait()
    assert primary.pid in {mark.pid for mark in found if processes.is_alive(mark)}
    cluster.start()
    assert gone(found)
    assert ask(cluster.superuser_dsn("alpha_0"), "SELECT a FROM public.kept") == 9


def test_a_taken_port_is_replaced_by_another(new_cluster: NewCluster) -> None:
    cluster = new_cluster(**SMALL)
    cluster.start()
    old = {s.name: s.port for s in cluster.servers}
    cluster.stop()
    edited = cluster.config_path.read_text(encoding="utf-8")
    edited = edited.replace("[services]", '[services]\ns3 = "http://127.0.0.1:9"')
    cluster.config_path.write_text(f"{edited}\n[pool]\nsize = 9\n", encoding="utf-8")
    with socket.create_server(("127.0.0.1", old["alpha_0"])):
        cluster.start()
        new = {s.name: s.port for s in cluster.servers}
        assert new["alpha_0"] != old["alpha_0"]
        assert new["alpha_1"] == old["alpha_1"]
        config, topology = load(cluster.config_path)
        assert topology.physical["alpha"].admin_url.port == new["alpha_0"]
        assert config.pool.size == 9
        assert config.services["s3"] == "http://127.0.0.1:9"
        assert config.services["redis"].endswith(f":{new['redis']}/0")
        wait_until(
            lambda: (
                ask(cluster.superuser_dsn("alpha_0"), "SELECT count(*) FROM pg_stat_replication")
                == 1
            ),
            10,
            "the replica follows the primary to its new port",
        )


def test_a_configuration_that_a_person_broke_is_not_overwritten(new_cluster: NewCluster) -> None:
    cluster = new_cluster(**SMALL | {"replicas": 0})
    cluster.start()
    cluster.stop()
    edited = cluster.config_path.read_text(encoding="utf-8") + "\n[pol]\n"
    cluster.config_path.write_text(edited, encoding="utf-8")
    with pytest.raises(ConfigurationError, match="did you mean 'pool'"):
        cluster.start()
    assert cluster.config_path.read_text(encoding="utf-8") == edited


def test_a_server_that_does_not_start_shows_its_log(
    new_cluster: NewCluster, tmp_path: Path
) -> None:
    cluster = new_cluster(**SMALL, settings={"max_connections": "many"})
    with pytest.raises(
        LocalServerError, match='invalid value for parameter "max_connections"'
    ) as e:
        cluster.start()
    assert str(tmp_path / "cluster" / "logs" / "alpha_0.log") in (e.value.hint or "")
    assert marks(tmp_path / "cluster") == []
    assert read_status(tmp_path / "cluster").owner_pid is None


@pytest.mark.slow
def test_a_promoted_replica_is_the_primary_after_a_restart(new_cluster: NewCluster) -> None:
    cluster = new_cluster(**SMALL | {"replicas": 2})
    cluster.start()
    cluster.kill_server("alpha_0")
    ask(cluster.superuser_dsn("alpha_1"), "SELECT pg_promote()")
    assert cluster.primary("alpha").name in {"alpha_0", "alpha_1"}
    ask(cluster.superuser_dsn("alpha_1"), "CREATE TABLE after AS SELECT 3 AS a")
    cluster.stop()
    cluster.start()
    assert cluster.primary("alpha").name == "alpha_1"
    assert [s.name for s in cluster.replicas("alpha")] == ["alpha_0", "alpha_2"]
    _, topology = load(cluster.config_path)
    assert topology.physical["alpha"].admin_url.port == cluster.server("alpha_1").port
    for name in ("alpha_0", "alpha_2"):
        dsn = cluster.superuser_dsn(name)

        def follows(dsn: str = dsn) -> bool:
            return ask(dsn, "SELECT to_regclass('after') IS NOT NULL") is True

        wait_until(follows, 10, f"{name} follows the new primary")


@pytest.mark.slow
def test_a_former_primary_is_rebuilt_while_the_cluster_runs(new_cluster: NewCluster) -> None:
    cluster = new_cluster(**SMALL)
    cluster.start()
    cluster.kill_server("alpha_0")
    ask(cluster.superuser_dsn("alpha_1"), "SELECT pg_promote()")
    cluster.rebuild_server("alpha_0")
    assert cluster.primary("alpha").name == "alpha_1"
    assert ask(cluster.superuser_dsn("alpha_0"), "SELECT pg_is_in_recovery()") is True


def test_replicas_can_grow_but_the_shape_is_fixed(new_cluster: NewCluster) -> None:
    first = new_cluster(**SMALL | {"replicas": 0})
    first.start()
    first.stop()
    with pytest.raises(RefusedError, match="fixed at 4"):
        new_cluster(**SMALL | {"logical_shards": 8}).start()
    second = new_cluster(**SMALL)
    second.start()
    assert [s.name for s in second.replicas("alpha")] == ["alpha_1"]


@pytest.mark.slow
def test_detached_from_the_command_line(new_cluster: NewCluster, tmp_path: Path) -> None:
    new_cluster()
    directory = tmp_path / "cluster"
    shape = ("--physical=1", "--replicas=0", "--logical-shards=4", "--no-fsync", "--no-memcached")
    up = run("up", "--detach", "--json", "--dir", directory, *shape)
    assert up.returncode == 0, up.stderr
    status = json.loads(up.stdout)
    assert status["ready"]
    assert {s["status"] for s in status["servers"]} == {"running"}
    again = run("up", "--dir", directory)
    assert again.returncode == 3
    assert again.stderr.startswith("error: ")
    assert "Traceback" not in again.stderr
    found = marks(directory)
    shown = run("status", "--dir", directory)
    assert shown.returncode == 0
    assert "alpha_0" in shown.stdout
    assert "\x1b" not in shown.stdout
    assert run("down", "--dir", directory).returncode == 0
    assert gone(found)
    # It lets go of the directory before it ends.
    wait_until(lambda: processes.find(status["owner_pid"]) is None, 20.0, "the owner has ended")
    assert run("status", "--dir", directory).returncode == 1
    assert run("down", "--delete-data", "--dir", directory).returncode == 0
    assert not directory.exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_foreground_command_and_its_servers(
    new_cluster: NewCluster, tmp_path: Path, number: signal.Signals
) -> None:
    new_cluster()
    directory = tmp_path / "cluster"
    shape = ["--physical=1", "--replicas=0", "--logical-shards=4", "--no-fsync", "--no-redis"]
    with subprocess.Popen(
        [sys.executable, "-m", "shardkit", "local", "up", "--dir", str(directory), *shape],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as child:
        wait_until(
            lambda: read_status(directory).is_ready or child.poll() is not None, 30, "an answer"
        )
        assert child.poll() is None
        found = marks(directory)
        os.kill(child.pid, number)
        output, _ = child.communicate(timeout=30)
    assert child.returncode == 0
    assert "alpha_0" in output
    assert found
    assert gone(found)


@pytest.mark.slow
def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    directory = tmp_path / "project"
    directory.mkdir(mode=0o755)
    (directory / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(RefusedError, match="left alone"):
        LocalCluster(directory).start()
    assert run("down", "--delete-data", "--dir", directory).returncode == 0
    assert (directory / "mine.txt").read_text(encoding="utf-8") == "mine"
    assert stat.S_IMODE(directory.stat().st_mode) == 0o755


@pytest.mark.slow
def test_a_copied_folder_does_not_end_the_servers_of_the_original(
    new_cluster: NewCluster, tmp_path: Path
) -> None:
    cluster = new_cluster(**SMALL | {"replicas": 0})
    cluster.start()
    copied = tmp_path / "copied"
    copied.mkdir()
    for name in ("state.json", "shardkit.lock", "passwords.json"):
        (copied / name).write_bytes((tmp_path / "cluster" / name).read_bytes())
    assert read_status(copied).n_running == 0
    with pytest.raises(RefusedError, match="moved"):
        LocalCluster(copied).start()
    run("down", "--delete-data", "--dir", copied)
    assert ask(cluster.superuser_dsn("alpha_0"), "SELECT 1") == 1


@pytest.mark.slow
def test_a_long_path_has_its_sockets_elsewhere(new_cluster: NewCluster, tmp_path: Path) -> None:
    new_cluster()
    directory = tmp_path / ("long" * 20) / ("longer's " * 10)
    try:
        with LocalCluster(directory, options(**SMALL)) as cluster:
            assert ask(cluster.superuser_dsn("alpha_1"), "SELECT pg_is_in_recovery()") is True
    finally:
        stop_cluster(directory, delete_data=True)
