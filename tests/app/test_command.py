"""`python -m app` as an operator runs it."""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import typer
from typer.testing import CliRunner

from shardkit.local import LocalCluster

pytestmark = pytest.mark.integration

FOLDER = Path(__file__).parents[2]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", *arguments]


def refused(program: str, *arguments: str) -> tuple[int, str]:
    """Run the function of a program as it runs itself; return its exit code and what it said."""
    app = typer.Typer()
    app.command()(importlib.import_module(program).main)
    done = CliRunner().invoke(app, list(arguments))
    assert isinstance(done.exception, SystemExit), "no trace"
    return done.exit_code, done.stderr


@contextmanager
def running(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command(*arguments), cwd=FOLDER, env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_taken_port_is_said_and_the_next_used(app_cluster: LocalCluster) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = str(app_cluster.config_path)
        with running("app", "--config", config, "--port", str(port)) as process:
            assert process.stdout is not None
            assert process.stdout.readline().startswith(f"port {port} is taken, using ")
            url = process.stdout.readline().split()[-1]
            with httpx.Client(base_url=url, timeout=20) as client:
                assert client.get("/readyz").json()["status"] == "ready"
            process.send_signal(signal.SIGTERM)
            process.wait(20)


@pytest.mark.parametrize(
    "program", ["app.__main__", "app.demo.__main__", "app.workers", "app.repair"]
)
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--config", "nothing.toml"], "nothing.toml: no such file"),
        (["--config", "."], "is a directory"),
    ],
)
def test_a_wrong_configuration_is_one_line_and_exit_2(
    program: str, arguments: list[str], says: str
) -> None:
    code, error = refused(program, *arguments)
    assert code == 2
    assert says in error


def test_a_wrong_setting_is_named() -> None:
    code, error = refused("app.__main__", "--port", "70000")
    assert code == 2
    assert "port" in error


def test_the_relay_runs_under_shardkits_own_command(app_cluster: LocalCluster) -> None:
    done = subprocess.run(
        command("shardkit", "outbox", "relay", "--app", "app.workers:relay", "--drain", "--json"),
        cwd=FOLDER,
        env={**os.environ, "APP_CONFIG": str(app_cluster.config_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["delivered"] >= 0


def test_the_relay_ends_with_its_parent(app_cluster: LocalCluster) -> None:
    arguments = ["app.workers", "--config", str(app_cluster.config_path)]
    attached = subprocess.Popen(
        command(*arguments, "--attached"), cwd=FOLDER, stdin=subprocess.PIPE
    )
    with attached:
        assert attached.stdin is not None
        attached.stdin.close()
        assert attached.wait(30) == 0


def test_help_says_what_there_is() -> None:
    for program, words in (
        ("app", ("--config", "--port")),
        ("app.demo", ("--people", "--seed")),
        ("app.workers", ("--config", "--attached")),
        ("app.repair", ("--dry-run", "--json", "--batch")),
    ):
        done = subprocess.run(
            command(program, "--help"), cwd=FOLDER, capture_output=True, text=True, check=True
        )
        for word in words:
            assert word in done.stdout
