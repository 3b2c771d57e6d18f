"""`shardkit pgbouncer render`: a real PgBouncer runs with the files, and reloads them in use."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from shardkit.cli import main
from shardkit.config import load
from shardkit.local import LocalCluster, ports
from shardkit.local.account import server_account
from shardkit.local.binaries import find_service
from shardkit.testing import wait_until
from tests.fixtures.servers import NewCluster

pytestmark = [pytest.mark.integration, pytest.mark.fault]

PATIENCE = 60.0

# As docs/pgbouncer.md has it.
ASKER = """
CREATE ROLE shardkit_pooler LOGIN PASSWORD 'asks';
GRANT CONNECT ON DATABASE shardkit TO shardkit_pooler;
CREATE SCHEMA shardkit_pooler;
CREATE FUNCTION shardkit_pooler.secret(login text) RETURNS TABLE (name text, secret text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog AS
'SELECT rolname::text, rolpassword FROM pg_catalog.pg_authid
    WHERE rolname = login AND rolcanlogin AND NOT rolsuper';
REVOKE ALL ON FUNCTION shardkit_pooler.secret(text) FROM PUBLIC;
GRANT USAGE ON SCHEMA shardkit_pooler TO shardkit_pooler;
GRANT EXECUTE ON FUNCTION shardkit_pooler.secret(text) TO shardkit_pooler;
"""


@dataclass
class Pooled:
    """One physical shard, and a PgBouncer that runs with what was rendered."""

    local: LocalCluster
    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def output(self) -> Path:
        return self.folder / "files"

    @property
    def sockets(self) -> Path:
        return self.folder / "sockets"

    def render(self, *arguments: str) -> object:
        """Run the command; return its exit code."""
        account = server_account()
        owner = ["--owner", account.name] if account.is_switched else []
        where = ["--config", str(self.local.config_path), "--output", str(self.output)]
        with pytest.raises(SystemExit) as caught:
            main(["pgbouncer", "render", *where, *owner, *arguments])
        return caught.value.code

    def start(self) -> None:
        """Start the PgBouncer under the account of the servers."""
        account = server_account()
        program = find_service("pgbouncer", account)
        assert program is not None
        with (self.folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [program.path, self.output / "alpha" / "pgbouncer.ini"],
                stdout=log,
                stderr=log,
                **account.spawn_arguments,
            )
        wait_until(self.accepts, PATIENCE, f"PgBouncer runs: {self.folder / 'log'}")

    def accepts(self) -> bool:
        """Return whether somebody can connect."""
        assert self.process is not None
        assert self.process.poll() is None, (self.folder / "log").read_text()
        try:
            self.connect().close()
        except psycopg.OperationalError:
            return False
        return True

    def leads_to(self, server: str, database: str = "shardkit") -> bool:
        """Return whether a new client is led to a server."""
        try:
            with self.connect(database) as client:
                return asked(client, "SELECT current_setting('cluster_name')") == server
        except psycopg.OperationalError:
            return False

    def connect(self, database: str = "shardkit", *, is_admin: bool = False) -> psycopg.Connection:
        """Connect as a client."""
        _, topology = load(self.local.config_path)
        alpha = topology.physical["alpha"]
        url = alpha.admin_url if is_admin else alpha.primary.url
        return psycopg.connect(
            host="127.0.0.1",
            port=self.port,
            dbname=database,
            user=url.username,
            password=url.password,
            autocommit=True,
            prepare_threshold=None,
            connect_timeout=20,
        )

    def command(self, text: str) -> None:
        """Give the console a command, over the socket, as the user who runs the process."""
        account, me = server_account(), os.geteuid()
        if account.is_switched:
            os.seteuid(account.uid)
        try:
            console = psycopg.connect(
                host=str(self.sockets),
                port=self.port,
                user="pgbouncer",
                dbname="pgbouncer",
                autocommit=True,
            )
        finally:
            os.seteuid(me)
        with contextlib.closing(console):
            console.execute(text.encode())


@pytest.fixture
def pooled(new_cluster: NewCluster) -> Iterator[Pooled]:
    account = server_account()
    if find_service("pgbouncer", account) is None:
        pytest.skip("PgBouncer is not installed")
    # Where the servers' account can read.
    folder = Path(tempfile.mkdtemp(prefix="shardkit-", dir="/var/tmp"))
    folder.chmod(0o755)
    shape = {"physical": 1, "replicas": 1, "logical_shards": 4, "pgbouncer": False}
    with new_cluster(**shape, redis=False, memcached=False) as local:
        found = Pooled(local, folder, ports.choose({s.port for s in local.servers}))
        found.sockets.mkdir()
        if account.is_switched:
            os.chown(found.sockets, account.uid, account.gid)
        table = f'\n[pgbouncer]\nprocesses = 2\nport = {found.port}\nsockets = "{found.sockets}"\n'
        local.config_path.write_text(local.config_path.read_text() + table)
        try:
            yield found
        finally:
            if found.process is not None:
                found.process.terminate()
                found.process.wait(PATIENCE)
            shutil.rmtree(folder)


def asked(connection: psycopg.Connection, query: str) -> object:
    row = connection.execute(query.encode()).fetchone()
    assert row is not None
    return row[0]


def test_pgbouncer_runs_with_the_files_and_keeps_its_clients_over_a_failover(
    pooled: Pooled, capsys: pytest.CaptureFixture[str]
) -> None:
    local = pooled.local
    assert pooled.render("--check") == 1, "nothing is there yet"
    assert not pooled.output.exists()
    capsys.readouterr()
    assert pooled.render("--json") == 0
    told = json.loads(capsys.readouterr().out)["alpha"]
    assert told["changed"] == ["pgbouncer.ini", "userlist.txt"]
    assert told["written"] is True
    sizes = {name: each["pool_size"] for name, each in told["databases"].items()}
    assert sizes == {"shardkit": 64, "shardkit_read": 22, "shardkit_1": 22}, "of two processes"
    assert (pooled.output / "alpha" / "userlist.txt").stat().st_mode & 0o777 == 0o600
    assert pooled.render("--check") == 0
    pooled.start()

    # Every name leads where it should.
    name = "SELECT current_setting('cluster_name')"
    with pooled.connect() as writer, pooled.connect("shardkit_read") as reader:
        assert asked(writer, name) == asked(reader, name) == "alpha_0"
        assert asked(writer, "SHOW transaction_read_only") == "off"
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            reader.execute("CREATE TABLE t ()")
    with pooled.connect("shardkit_1") as reader:
        assert asked(reader, name) == "alpha_1"

    # The console shows, and takes commands on the socket only.
    with pooled.connect("pgbouncer", is_admin=True) as console:
        assert "PgBouncer" in str(asked(console, "SHOW VERSION"))
        with pytest.raises(psycopg.Error):
            console.execute("RELOAD")

    with pooled.connect() as client, pooled.connect("shardkit_1") as reader:
        assert asked(client, name) == "alpha_0"
        assert asked(reader, name) == "alpha_1"
        local.stop_server("alpha_0")
        with psycopg.connect(local.superuser_dsn("alpha_1"), autocommit=True) as superuser:
            superuser.execute("SELECT pg_promote(true, 60)")
        capsys.readouterr()
        assert pooled.render("--check", "--json") == 1
        document = json.loads(capsys.readouterr().out)
        assert document["alpha"]["changed"] == ["pgbouncer.ini"]
        assert len(document["alpha"]["silent"]) == 1
        assert pooled.render() == 0
        pooled.command("RELOAD")
        # PgBouncer refuses who asks until it has reached the new server.
        wait_until(lambda: pooled.leads_to("alpha_1"), PATIENCE, "the name leads elsewhere")
        # The same connections as before: what they ask for is elsewhere now.
        assert asked(client, name) == "alpha_1"
        assert asked(client, "SELECT pg_is_in_recovery()") is False
        local.rebuild_server("alpha_0")
        assert pooled.render("--check") == 0, "the roles are as they were rendered"
        wait_until(
            lambda: pooled.leads_to("alpha_0", "shardkit_1"), PATIENCE, "the replica is back"
        )
        assert asked(reader, "SELECT pg_is_in_recovery()") is True
        assert asked(reader, name) == "alpha_0"


def test_verifiers_of_the_server_let_clients_in(
    pooled: Pooled, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = pooled.local
    with psycopg.connect(local.superuser_dsn("alpha_0"), autocommit=True) as superuser:
        superuser.execute(ASKER.encode())
        rules = superuser.execute("SHOW hba_file").fetchone()
        assert rules is not None
        line = "host all shardkit_pooler 127.0.0.1/32 scram-sha-256\n"
        file = Path(rules[0])
        file.write_text(file.read_text() + line)
        superuser.execute(sql.SQL("SELECT pg_reload_conf()"))
    text = local.config_path.read_text().replace(
        "[pgbouncer]\n", '[pgbouncer]\nauth_user = "shardkit_pooler"\n'
    )
    local.config_path.write_text(text)
    assert pooled.render() == 2, "its password is not known"
    monkeypatch.setenv("SHARDKIT_POOLER_PASSWORD", "asks")
    assert pooled.render() == 0
    logins = (pooled.output / "alpha" / "userlist.txt").read_text()
    assert logins == '"shardkit_pooler" "asks"\n'
    _, topology = load(local.config_path)
    password = str(topology.physical["alpha"].primary.url.password)
    assert password not in (pooled.output / "alpha" / "pgbouncer.ini").read_text()
    pooled.start()
    with pooled.connect() as client:
        assert asked(client, "SELECT current_user::text") == "shardkit_app"


def test_the_embedded_clusters_pooler_is_rendered_alike(new_cluster: NewCluster) -> None:
    with new_cluster(
        physical=1, replicas=1, logical_shards=4, redis=False, memcached=False
    ) as local:
        if "pgbouncer" in local.missing:
            pytest.skip("PgBouncer is not installed")
        folder = local.config_path.parent / "files"
        where = ["--config", str(local.config_path), "--output", str(folder)]
        with pytest.raises(SystemExit) as caught:
            main(["pgbouncer", "render", *where])
        assert caught.value.code == 0
        text = (folder / "alpha" / "pgbouncer.ini").read_text()
        for server in ("alpha_0", "alpha_1"):
            assert f"port={local.server(server).port} dbname='shardkit'" in text
        assert f"listen_port = {local.server('pgbouncer_alpha').port}\n" in text
