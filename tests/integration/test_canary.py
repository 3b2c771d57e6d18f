"""Passwords are nowhere they should not be: each command and error is searched for canaries."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import psycopg
import pytest

from shardkit import AsyncCluster, Cluster, Relay
from shardkit.config import load
from shardkit.errors import ConfigurationError, EndpointUnavailableError
from shardkit.local import LocalCluster
from shardkit.ops import migrate, outbox, rolesrun
from shardkit.ops.direct import connect
from shardkit.testing import wait_until
from tests.fixtures.roled import give_roles
from tests.fixtures.servers import lend, options
from tests.models import User

pytestmark = pytest.mark.integration

PATIENCE = 120.0
MARK = "kanarienvogel"
DUTIES = ("app", "admin", "migrator", "mover", "relay", "monitor")


def password(duty: str) -> str:
    """Return somebody's: with what needs quoting everywhere."""
    return f"{MARK}-{duty} '\"\\{MARK}"


def found_in(text: str) -> str | None:
    """Return where a canary sits in a text, in any spelling; None for nowhere."""
    at = text.lower().find(MARK)
    if at >= 0:
        return text[max(0, at - 200) : at + 60]
    spelt = [base64.b64encode(password(duty).encode()).decode() for duty in DUTIES]
    spelt += [quote(password(duty)) for duty in DUTIES]
    return next((each for each in spelt if each in text), None)


@dataclass(frozen=True)
class Nest:
    """A cluster whose passwords are canaries, and files of which something is wrong."""

    local: LocalCluster
    path: Path

    def variant(self, name: str, change: Callable[[str], str]) -> Path:
        """Return another file; it differs."""
        text = self.path.read_text(encoding="utf-8")
        file = self.path.parent / f"{name}.toml"
        file.write_text(change(text), encoding="utf-8")
        file.chmod(0o600)
        assert file.read_text(encoding="utf-8") != text
        return file


@pytest.fixture(scope="module")
def nest(
    postgres_version: str,  # noqa: ARG001  skips when there is none
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Nest]:
    shape = options(
        physical=1, replicas=0, logical_shards=2, redis=False, memcached=False, pgbouncer=False,
        settings={"log_statement": "all", "log_connections": "on", "log_min_error_statement": "debug5"},
    )  # fmt: skip
    with lend(tmp_path_factory.mktemp("nest") / "cluster", shape) as local:
        text = local.config_path.read_text(encoding="utf-8")
        with psycopg.connect(local.superuser_dsn("alpha_0"), autocommit=True) as superuser:
            for duty in ("app", "admin"):
                name = f"shardkit_{duty}"
                verifier = superuser.pgconn.encrypt_password(
                    password(duty).encode(), name.encode(), b"scram-sha-256"
                )
                superuser.execute(f"ALTER ROLE {name} PASSWORD '{verifier.decode()}'")
        _, topology = load(local.config_path)
        alpha = topology.physical["alpha"]
        assert alpha.control_url is not None
        for duty, url in (("app", alpha.primary.url), ("admin", alpha.control_url)):
            old = str(url.password)
            assert old in text
            new = quote(password(duty), safe="")
            text = text.replace(f":{old}@", f":{new}@").replace(
                f'"{old}"', "'''" + password(duty) + "'''"
            )
        file = local.config_path.parent / "canaries.toml"
        file.write_text(text, encoding="utf-8")
        file.chmod(0o600)
        text += '\n[migrations]\nlocation = "app:migrations"\n'
        file.write_text(text, encoding="utf-8")
        give_roles(file, {duty: password(duty) for duty in DUTIES})
        yield Nest(local, file)


# In a process of its own, with everything logged that Python's libraries would log.
PROGRAM = """
import json, logging, sys
logging.basicConfig(level=1)
from shardkit.cli import main
codes = []
for words in json.loads(sys.argv[1]):
    try:
        main(words)
    except SystemExit as ended:
        codes.append(ended.code or 0)
print()
print(json.dumps(codes))
"""


def searched(*commands: list[str], file: Path, **environment: str) -> list[int]:
    """Run commands, look at all they say and at how they are called; return their exit codes."""
    words = [[*command, "--config", str(file)] for command in commands]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, json.dumps(words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
    )
    seen: set[str] = set()
    while True:
        with contextlib.suppress(OSError):
            seen.add(Path(f"/proc/{process.pid}/cmdline").read_text())
            for task in Path(f"/proc/{process.pid}/task").iterdir():
                for child in (task / "children").read_text().split():
                    seen.add(Path(f"/proc/{child}/cmdline").read_text())
        try:
            out, _ = process.communicate(timeout=0.1)
        except subprocess.TimeoutExpired:
            continue
        break
    assert seen
    assert found_in(out) is None, commands
    assert not [each for each in seen if found_in(each)]
    assert process.returncode == 0, out
    codes: list[int] = json.loads(out.strip().splitlines()[-1])
    assert len(codes) == len(commands)
    return codes


def test_no_command_tells_a_password(nest: Nest) -> None:
    files = nest.path.parent / "pgbouncer"
    codes = searched(
        ["roles", "plan", "--sql"],
        ["roles", "apply", "--json"],
        ["migrate", "apply"],
        ["status", "--json"],
        ["outbox", "status"],
        ["pgbouncer", "render", "--output", str(files), "--json"],
        ["doctor", "--json"],
        file=nest.path,
    )
    assert codes[:6] == [0] * 6
    assert codes[6] in {0, 1}, "the servers of tests do not wait for their disks"
    lists = list(files.rglob("userlist.txt"))
    assert [file.stat().st_mode & 0o777 for file in lists] == [0o600]
    assert MARK in lists[0].read_text(encoding="utf-8"), "where it has to be"
    for file in files.rglob("*.ini"):
        assert found_in(file.read_text(encoding="utf-8")) is None


WRONG: dict[str, Callable[[str], str]] = {
    "host": lambda text: text.replace("@127.0.0.1:", "@127.0.0.1:1"),
    "syntax": lambda text: text.replace("password = '''", "password = ''' ''' '''"),
    "type": lambda text: text.replace("password = '''", "password = ['''") .replace("'''\n", "''']\n"),
    "key": lambda text: text.replace("[admin]", "[admin]\nusr = 'x'"),
    "address": lambda text: text.replace("postgresql://", "postgresql:/"),
    "file": lambda text: text.replace("secrets/relay", "secrets/rely"),
}  # fmt: skip


@pytest.mark.parametrize("name", ["host", "type", "address"])
def test_no_failure_tells_a_password(nest: Nest, name: str) -> None:
    file = nest.variant(name, WRONG[name])
    codes = searched(["status"], ["roles", "apply", "--json"], ["doctor"], file=file)
    assert set(codes) <= {1, 2, 4}


def test_a_wrong_password_is_not_told(nest: Nest) -> None:
    wrong = {f"SHARDKIT_{duty.upper()}_PASSWORD": f"{MARK}-wrong" for duty in (*DUTIES, "roles")}
    codes = searched(
        ["roles", "plan"],
        ["roles", "plan", "--user", "somebody"],
        ["migrate", "drift"],
        ["doctor"],
        ["status", "--json"],
        file=nest.path,
        **wrong,
    )
    assert set(codes) <= {1, 2, 4}


def shown(error: BaseException) -> str:
    """Return everything that an error has: its frames' locals, but the test's, and its causes."""
    parts: list[str] = []
    left: list[BaseException | None] = [error]
    seen: set[int] = set()
    while left:
        each = left.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        frames = [
            summary
            for summary in traceback.StackSummary.extract(
                traceback.walk_tb(each.__traceback__), capture_locals=True
            )
            if summary.filename != __file__
        ]
        parts += [str(each), repr(each), repr(each.args), repr(vars(each))]
        parts += [f"{frame.name} {frame.locals!r}" for frame in frames]
        left += [each.__cause__, each.__context__, getattr(each, "orig", None)]
    return "\n".join(parts)


@pytest.mark.parametrize("name", [name for name in WRONG if name != "host"])
def test_the_frames_of_a_wrong_file_hold_no_password(nest: Nest, name: str) -> None:
    file = nest.variant(name, WRONG[name])
    with pytest.raises(ConfigurationError) as caught:
        load(file)
    assert found_in(shown(caught.value)) is None


@pytest.mark.parametrize("is_wrong", [False, True], ids=["host", "password"])
def test_the_frames_of_a_lost_connection_hold_no_password(
    nest: Nest, is_wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = nest.path
    if is_wrong:
        file = nest.variant("wrong", lambda text: text.replace(f":{MARK}", f":{MARK}-wrong"))
        for duty in DUTIES:
            monkeypatch.setenv(f"SHARDKIT_{duty.upper()}_PASSWORD", f"{MARK}-wrong")
    else:
        file = nest.variant("host", WRONG["host"])
    config, topology = load(file)
    shard = topology.physical["alpha"]
    assert (
        found_in(f"{config!r} {topology!r} {shard!r} {shard.primary.url!r} {vars(config)!r}")
        is None
    )

    def read() -> object:
        with Cluster(topology) as cluster, cluster.reader() as session:
            return session.get(User, 1 << 10)

    def write() -> None:
        with Cluster(topology) as cluster, cluster.writer() as session:
            session.add(User(name="ana"))
            session.commit()

    async def later() -> None:
        async with AsyncCluster(topology) as cluster, cluster.reader() as session:
            await session.get(User, 1 << 10)

    def relay() -> None:
        with Cluster(topology) as cluster:
            Relay(cluster, {}).drain()

    def say(error: Exception | None) -> None:
        assert error is not None
        raise error

    attempts: list[Callable[[], object]] = [
        read, write, lambda: asyncio.run(later()), relay,
        lambda: connect(shard, application="test"),
        lambda: connect(shard, application="test", patience=5.0),
        lambda: say(rolesrun.plan(topology)[0].error),
        lambda: say(outbox.status(topology, interval=0)[0].error),
        lambda: say(migrate.apply(topology, ()).error),
    ]  # fmt: skip
    for attempt in attempts:
        with pytest.raises((EndpointUnavailableError, ConfigurationError, Exception)) as caught:
            attempt()
        assert found_in(shown(caught.value)) is None, attempt


def test_no_server_was_told_a_password(nest: Nest) -> None:
    rolesrun.apply(load(nest.path)[1])
    log = nest.path.parent / "logs" / "alpha_0.log"

    def has_statements() -> bool:
        return "SCRAM-SHA-256$" in log.read_text(encoding="utf-8", errors="replace")

    wait_until(has_statements, 20.0, "the server logs its statements")
    assert found_in(log.read_text(encoding="utf-8", errors="replace")) is None
