"""`python -m app.run`: the whole thing as a person starts and ends it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardkit.local import read_status, stop_cluster
from shardkit.testing import wait_until

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.uncontained("is about `make run`, which runs the embedded cluster"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where the cluster lives; its data is deleted afterwards."""
    directory = tmp_path / "cluster"
    yield directory
    stop_cluster(directory, delete_data=True)


def started(folder: Path) -> tuple[subprocess.Popen[str], str, int]:
    """Start it and return its address and its relay's process, once it serves."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-u", "-m", "app.run", "--dir", str(folder)),
            *("--port", "0", "--people", "5"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said = []
    for line in process.stdout or ():
        said.append(line)
        if match := re.match(r"serving (http://\S+)", line):
            relay = re.search(r"^relay: process (\d+)$", "".join(said), re.MULTILINE)
            assert relay is not None
            return process, match[1], int(relay[1])
    process.wait()
    raise AssertionError("".join(said))


def n_running(folder: Path) -> int:
    return sum(server.pid is not None for server in read_status(folder).servers)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.fault
def test_it_serves_and_every_end_takes_the_servers_with_it(folder: Path) -> None:
    first, address, relay = started(folder)
    with urllib.request.urlopen(address + "readyz", timeout=10) as answer:
        assert answer.status == 200
    assert n_running(folder) >= 7
    first.kill()
    first.communicate(timeout=30)
    wait_until(lambda: n_running(folder) == 0, 30.0, "a killed run leaves no server")
    wait_until(lambda: not is_running(relay), 30.0, "nor its relay")

    second, address, relay = started(folder)
    os.kill(relay, signal.SIGKILL)
    assert second.stdout is not None
    assert second.stdout.readline() == "the relay ended with -9 and is started again\n"
    with urllib.request.urlopen(address, timeout=10) as answer:
        assert answer.status == 200
    second.send_signal(signal.SIGINT)
    output, _ = second.communicate(timeout=60)
    assert second.returncode == 0
    assert output.rstrip().endswith("stopped")
    assert "Traceback" not in output
    assert n_running(folder) == 0
