"""TLS and SCRAM for real: servers that take nothing else, a PgBouncer in front, and whom to trust."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest

from shardkit import Cluster
from shardkit.cli import main
from shardkit.config import load
from shardkit.errors import EndpointUnavailableError
from shardkit.local import ports
from shardkit.local.account import server_account
from shardkit.local.binaries import find_service
from shardkit.ops import migrate, rolesrun
from shardkit.ops.doctor import examine
from shardkit.ops.status import read_status
from shardkit.testing import create_tables, wait_until
from shardkit.topology import PhysicalShard, libpq_options
from tests.fixtures.certificates import certified
from tests.fixtures.roled import give_roles
from tests.models import Base, User

pytestmark = pytest.mark.integration

PATIENCE = 60.0

RULES = """\
local    all       all                      trust
hostssl  all       all       127.0.0.1/32   scram-sha-256
"""


@dataclass(frozen=True)
class Strict:
    """One server that nobody talks to in plain text, and the file that describes it."""

    path: Path
    port: int


@pytest.fixture(scope="module")
def certificates() -> Iterator[Path]:
    """Where the servers' account can read."""
    folder = Path(tempfile.mkdtemp(prefix="shardkit-", dir="/var/tmp"))
    folder.chmod(0o755)
    yield certified(folder, "127.0.0.1")
    shutil.rmtree(folder)


def with_tls() -> Path:
    """Return a PostgreSQL that can do TLS; those that come with pip may not."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    found += [Path(path) for path in [shutil.which("postgres")] if path]
    usable = [path for path in found if b"libssl" in path.resolve().read_bytes()]
    if not usable:
        pytest.skip("no PostgreSQL here was built with TLS")
    return usable[-1].resolve()


@pytest.fixture(scope="module")
def strict(certificates: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Strict]:
    program, account = with_tls(), server_account()
    data, sockets = certificates / "data", certificates / "run"
    for folder in (data, sockets):
        folder.mkdir(mode=0o700)
        if account.is_switched:
            os.chown(folder, account.uid, account.gid)
    subprocess.run(
        [program.with_name("initdb"), "-D", data, "-U", "postgres", "--no-sync", "-A", "reject"],
        check=True, capture_output=True, **account.spawn_arguments,
    )  # fmt: skip
    (certificates / "pg_hba.conf").write_text(RULES)
    port = ports.choose(set())
    settings = {
        "listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": sockets, "ssl": "on",
        "fsync": "off", "ssl_cert_file": certificates / "server.crt",
        "ssl_key_file": certificates / "server.key", "ssl_min_protocol_version": "TLSv1.3",
        "hba_file": certificates / "pg_hba.conf", "shared_buffers": "16MB",
    }  # fmt: skip
    with (certificates / "log").open("wb") as log:
        process = subprocess.Popen(
            [program, "-D", data, *(f"--{key}={value}" for key, value in settings.items())],
            stdout=log, stderr=log, **account.spawn_arguments,
        )  # fmt: skip
    sockets.chmod(0o755)
    local: dict[str, Any] = {
        "host": str(sockets),
        "port": port,
        "user": "postgres",
        "autocommit": True,
    }
    try:
        wait_until(lambda: accepts(local), PATIENCE, f"PostgreSQL runs: {certificates / 'log'}")
        with psycopg.connect(dbname="postgres", **local) as superuser:
            superuser.execute("CREATE ROLE shardkit_admin LOGIN CREATEROLE PASSWORD 'the admin''s'")
            superuser.execute("CREATE ROLE boss LOGIN SUPERUSER PASSWORD 'the boss''s'")
            superuser.execute("CREATE DATABASE shardkit OWNER shardkit_admin")
        file = tmp_path_factory.mktemp("strict") / "shardkit.toml"
        for name in ("ca.crt", "other.crt"):
            shutil.copy(certificates / name, file.parent / name)
        file.write_text(
            f"""
[cluster]
name = "strict"
logical_shards = 2

[admin]
user = "shardkit_admin"
password = "the admin's"

[[physical]]
name = "alpha"
logical_shards = "0-1"
primary = "postgresql://shardkit_app@127.0.0.1:{port}/shardkit"
"""
        )
        file.chmod(0o600)
        give_roles(file, app=True)
        file.write_text(file.read_text() + tls("ca.crt"))
        yield Strict(file, port)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(PATIENCE)


def test_a_superuser_makes_what_the_admin_may_not(
    strict: Strict, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    where = ["--config", str(strict.path)]
    with pytest.raises(SystemExit) as ended:
        main(["roles", "plan", *where])
    assert not ended.value.code
    out = capsys.readouterr().out
    if "which replicates" in out and "needs a superuser" not in out:
        assert with_tls().parts[-3] >= "16", "only then may it"
    monkeypatch.setenv("SHARDKIT_ROLES_PASSWORD", "the boss's")
    with pytest.raises(SystemExit) as ended:
        main(["roles", "apply", "--user", "boss", *where])
    assert not ended.value.code, capsys.readouterr()
    _, topology = load(strict.path)
    assert migrate.apply(topology, ()).error is None
    create_tables(topology, Base.metadata)
    [part] = rolesrun.plan(topology)
    assert (part.changes, part.notes, part.error) == ((), (), None)


def tls(authority: str, mode: str = "verify-full") -> str:
    return f"""
[tls]
mode = "{mode}"
root_cert = "{authority}"
channel_binding = "require"
require_auth = "scram-sha-256"
"""


def changed(strict: Strict, change: Callable[[str], str]) -> PhysicalShard:
    """Return the physical shard as another file has it."""
    text = strict.path.read_text()
    file = strict.path.parent / "other.toml"
    file.write_text(change(text))
    file.chmod(0o600)
    assert file.read_text() != text
    return load(file)[1].physical["alpha"]


def test_everybody_comes_by_tls_and_scram(strict: Strict) -> None:
    config, topology = load(strict.path)
    alpha = topology.physical["alpha"]
    with Cluster(topology) as cluster, cluster.writer() as session:
        session.add(User(name="ana"))
        session.commit()
        query = "SELECT version FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
        assert cluster.connections.ask("alpha", query, {}, primary=True) == [("TLSv1.3",)]
    urls = (alpha.admin_url, alpha.control_url, alpha.relay_url, alpha.monitor_url, alpha.mover_url)
    for url in urls:
        assert url is not None
        with psycopg.connect(**libpq_options(url)) as connection:
            row = connection.execute(
                "SELECT ssl, current_setting('is_superuser') FROM pg_stat_ssl"
                " WHERE pid = pg_backend_pid()"
            ).fetchone()
            assert row == (True, "off")
    assert [each.error for each in read_status(topology)] == [None]
    found = examine(config, topology, timeout=PATIENCE).findings
    assert not [each for each in found if each.check in {"unreachable", "not-looked-at"}]


def test_plain_text_is_refused_by_the_server(strict: Strict) -> None:
    plain = changed(strict, lambda text: text[: text.index("[tls]")] + '[tls]\nmode = "disable"\n')
    with pytest.raises(psycopg.OperationalError, match="no encryption"):
        psycopg.connect(**libpq_options(plain.primary.url))


REFUSALS = [
    ("ca.crt", "other.crt", "certificate verify failed"),
    ("@127.0.0.1:", "@localhost:", 'does not match host name "localhost"'),
    ("scram-sha-256", "md5", "authentication method requirement"),
]


@pytest.mark.parametrize(("old", "new", "reason"), REFUSALS, ids=["authority", "name", "method"])
def test_a_server_that_does_not_prove_who_it_is_is_left_alone(
    strict: Strict, capsys: pytest.CaptureFixture[str], old: str, new: str, reason: str
) -> None:
    changed(strict, lambda text: text.replace(old, new))
    file = strict.path.parent / "other.toml"
    _, topology = load(file)
    with (
        Cluster(topology) as cluster,
        cluster.reader() as session,
        pytest.raises(EndpointUnavailableError, match=reason),
    ):
        session.get(User, 1 << 10)
    [status] = read_status(topology)
    assert reason in str(status.error)
    with pytest.raises(SystemExit) as ended:
        main(["roles", "plan", "--config", str(file)])
    assert ended.value.code == 4
    assert reason in capsys.readouterr().err


def test_pgbouncer_verifies_and_is_verified(strict: Strict, certificates: Path) -> None:
    account = server_account()
    program = find_service("pgbouncer", account)
    if program is None:
        pytest.skip("PgBouncer is not installed")
    port = ports.choose({strict.port})
    sockets = certificates / "sockets"
    sockets.mkdir()
    if account.is_switched:
        os.chown(sockets, account.uid, account.gid)
    pooled = f"""
[pgbouncer]
port = {port}
sockets = "{sockets}"
client_tls_cert = "{certificates}/server.crt"
client_tls_key = "{certificates}/server.key"
server_tls_ca = "{certificates}/ca.crt"
"""
    changed(strict, lambda text: text + pooled)
    file = strict.path.parent / "other.toml"
    output = certificates / "files"
    owner = ["--owner", account.name] if account.is_switched else []
    with pytest.raises(SystemExit) as ended:
        main(["pgbouncer", "render", "--config", str(file), "--output", str(output), *owner])
    assert not ended.value.code
    userlist = (output / "alpha" / "userlist.txt").read_text()
    for name in ("shardkit_app", "shardkit_relay", "shardkit_monitor"):
        assert f'"{name}" ' in userlist
    assert "shardkit_admin" not in userlist
    assert "shardkit_migrator" not in userlist
    with (certificates / "log").open("wb") as log:
        process = subprocess.Popen(
            [program.path, output / "alpha" / "pgbouncer.ini"],
            stdout=log, stderr=log, **account.spawn_arguments,
        )  # fmt: skip
    try:
        version = ".".join(program.version.split(".")[:2])

        def behind(text: str) -> str:
            address = f"postgresql://shardkit_app@127.0.0.1:{strict.port}/shardkit"
            return text.replace(
                f"@127.0.0.1:{strict.port}/shardkit", f"@127.0.0.1:{port}/shardkit"
            ).replace(
                "[[physical]]",
                f'[[physical]]\npooler = "pgbouncer {version}"\nadmin = "{address}"',
                1,
            )

        alpha = changed(strict, behind)
        assert alpha.primary.url.query["channel_binding"] == "prefer"
        wait_until(
            lambda: accepts(libpq_options(alpha.primary.url)),
            PATIENCE,
            f"PgBouncer runs: {certificates / 'log'}",
        )
        plain = {
            **libpq_options(alpha.primary.url),
            "sslmode": "disable",
            "channel_binding": "disable",
        }
        with pytest.raises(psycopg.OperationalError, match=r"SSL required|encrypt"):
            psycopg.connect(**plain)
        stranger = {**libpq_options(alpha.primary.url)}
        stranger["sslrootcert"] = str(certificates / "other.crt")
        with pytest.raises(psycopg.OperationalError, match="certificate verify failed"):
            psycopg.connect(**stranger)
        for url in (alpha.primary.url, alpha.relay_url, alpha.looking_at(alpha.primary.url)):
            assert url is not None
            with psycopg.connect(**libpq_options(url)) as client:
                row = client.execute(
                    "SELECT current_user::text, ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
                ).fetchone()
                assert row == (url.username, True)
        with Cluster(load(file)[1]) as cluster, cluster.writer() as session:
            session.add(User(name="ben"))
            session.commit()
    finally:
        process.terminate()
        process.wait(PATIENCE)


def accepts(options: dict[str, Any]) -> bool:
    """Return whether somebody can connect."""
    try:
        psycopg.connect(**options).close()
    except psycopg.OperationalError:
        return False
    return True
