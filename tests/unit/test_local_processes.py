"""Processes by pid and start time, and what ends them."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from shardkit.local import ServerKind, ServerStatus, ports, processes
from shardkit.local.account import Account
from shardkit.local.binaries import Program
from shardkit.local.options import LocalOptions
from shardkit.local.owner import Warden, end_leftovers
from shardkit.local.processes import ProcessMark
from shardkit.local.server import ServerProcess
from shardkit.local.state import DirectoryLock, ServerState, State
from shardkit.testing import wait_until


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"]) as child:
        yield child
        child.kill()


def mark_of(child: subprocess.Popen[bytes]) -> ProcessMark:
    mark = processes.find(child.pid)
    assert mark is not None
    return mark


def test_a_recycled_pid_is_not_signalled(sleeper: subprocess.Popen[bytes]) -> None:
    mark = mark_of(sleeper)
    earlier = replace(mark, started=mark.started - 1)
    assert not processes.is_alive(earlier)
    assert not processes.send(earlier, signal.SIGKILL)
    assert processes.is_alive(mark)
    assert processes.send(mark, signal.SIGKILL)
    assert processes.wait_gone([mark], 5) == []


def test_a_zombie_counts_as_gone(sleeper: subprocess.Popen[bytes]) -> None:
    mark = mark_of(sleeper)
    os.kill(sleeper.pid, signal.SIGKILL)
    wait_until(lambda: not processes.is_alive(mark), 5, "the killed child counts as gone")
    assert sleeper.returncode is None, "nobody has collected it yet"


def test_a_paused_process_is_known(sleeper: subprocess.Popen[bytes]) -> None:
    mark = mark_of(sleeper)
    processes.send(mark, signal.SIGSTOP)
    wait_until(lambda: processes.is_paused(mark), 5, "the process is paused")
    assert processes.is_alive(mark)


def test_only_server_programs_count_in_a_folder(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "600"], cwd=tmp_path) as child:
        assert processes.processes_in(tmp_path) == []
        child.kill()


def test_the_warden_ends_what_it_was_told_last_and_nothing_else(
    sleeper: subprocess.Popen[bytes],
) -> None:
    mark = mark_of(sleeper)
    with subprocess.Popen(["sleep", "600"]) as other:
        warden = Warden()
        warden.watch({mark_of(other): signal.SIGTERM})
        warden.watch({mark: signal.SIGTERM, replace(mark_of(other), started=1): signal.SIGKILL})
        warden.abandon()
        assert sleeper.wait(10) == -signal.SIGTERM
        assert other.poll() is None
        other.kill()


def test_a_dismissed_warden_ends_nothing(sleeper: subprocess.Popen[bytes]) -> None:
    warden = Warden()
    warden.watch({mark_of(sleeper): signal.SIGKILL})
    warden.dismiss()
    assert sleeper.poll() is None


def test_leftovers_of_the_state_file_are_ended(
    sleeper: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    mark = mark_of(sleeper)
    server = ServerState("redis", "redis", None, 6379, "7", process=mark)
    state = State(LocalOptions(), tmp_path, servers={"redis": server})
    assert end_leftovers(state, tmp_path) == 1
    assert sleeper.wait(5) == -signal.SIGTERM
    assert end_leftovers(state, tmp_path) == 0


def test_the_state_survives_its_file_and_not_a_copy_of_it(tmp_path: Path) -> None:
    me = processes.find(os.getpid())
    server = ServerState("alpha_0", "postgresql", "alpha", 5501, "18.4", True, me)
    state = State(LocalOptions(), tmp_path, me, True, False, {"alpha_0": server})
    file = tmp_path / "state.json"
    state.save(file)
    assert State.load(file) == state
    assert state.is_owned
    (tmp_path / "copy").mkdir()
    copied = tmp_path / "copy" / "state.json"
    copied.write_bytes(file.read_bytes())
    read = State.load(copied)
    assert read is not None
    assert not read.is_owned
    assert read.servers["alpha_0"].process is None


def test_a_directory_has_one_owner(tmp_path: Path) -> None:
    with DirectoryLock(tmp_path / "lock") as first, DirectoryLock(tmp_path / "lock") as second:
        assert first.acquire()
        assert not second.acquire()
        first.release()
        assert second.acquire()


@pytest.mark.enable_socket
def test_a_port_in_use_is_not_free() -> None:
    port = ports.choose(())
    assert ports.is_free(port)
    assert ports.choose({port}) != port


def test_wait_until_says_what_did_not_happen() -> None:
    with pytest.raises(AssertionError, match="pigs fly"):
        wait_until(lambda: False, 0.05, "pigs fly")


class _Idle(ServerProcess):
    """A server that does nothing, for a while."""

    kind = ServerKind.MEMCACHED

    def command(self) -> Sequence[str | Path]:
        return [self.program.path, "600"]

    def is_ready(self) -> bool:
        return self.mark is not None


@pytest.fixture
def idle(tmp_path: Path) -> Iterator[_Idle]:
    path = shutil.which("sleep")
    assert path is not None
    me = pwd.getpwuid(os.geteuid())
    server = _Idle(
        "idle",
        Program(Path(path), "1"),
        physical=None,
        port=1,
        folder=tmp_path,
        log=tmp_path / "idle.log",
        account=Account(me.pw_name, me.pw_uid, me.pw_gid, is_switched=False),
    )
    yield server
    server.kill()


def test_who_hears_late_of_an_end_does_not_forget_the_next_process(
    idle: _Idle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would run, be told of no new configuration, and be left when the cluster ends."""
    idle.launch()
    idle.kill()
    ended = idle._child
    assert ended is not None
    has_heard, may_go_on = threading.Event(), threading.Event()
    poll = ended.poll

    def late() -> int | None:
        code = poll()
        has_heard.set()
        assert may_go_on.wait(60)
        return code

    monkeypatch.setattr(ended, "poll", late)
    looks = threading.Thread(target=idle.snapshot)
    looks.start()
    assert has_heard.wait(60)
    mark = idle.launch()
    may_go_on.set()
    looks.join()
    assert idle.mark == mark
    assert idle.snapshot().status is ServerStatus.RUNNING
