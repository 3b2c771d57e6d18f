"""Starts a cluster's owner in the background, for `shardkit local up --detach`.

The supervisor is the same command without `--detach`: it owns the servers, and ends with SIGTERM
from `shardkit local down`. Called by the command line only.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

from shardkit.clock import SYSTEM, Clock
from shardkit.errors import LocalServerError
from shardkit.local.account import server_account
from shardkit.local.journal import LocalProgress, Progress
from shardkit.local.layout import Layout
from shardkit.local.options import LocalOptions
from shardkit.local.server import log_tail, open_log
from shardkit.local.state import acquire
from shardkit.local.status import LocalStatus, read_status

__all__ = ["start_detached"]

_TIMEOUT = 180.0
_POLL = 0.05


def start_detached(
    directory: Path,
    options: LocalOptions,
    progress: Progress | None = None,
    *,
    clock: Clock = SYSTEM,
) -> LocalStatus:
    """Start a supervisor and wait until its cluster is up.

    Args:
        directory: where the cluster lives.
        options: its shape.
        progress: called when more servers are up than before.
        clock: where the time comes from.

    Returns:
        What runs; `owner_pid` is the supervisor.

    Raises:
        RefusedError: somebody owns the directory already.
        LocalServerError: the cluster did not come up; shows the supervisor's last words.
    """
    layout = Layout.of(directory, server_account())
    acquire(layout).release()
    log = layout.directory / "supervisor.log"
    with open_log(log) as output:
        start = output.tell()
        child = subprocess.Popen(
            [
                *(sys.executable, "-m", "shardkit", "local", "up"),
                *("--dir", str(layout.directory), *_arguments(options)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        status = _wait_up(child, layout, progress, start, clock)
    except BaseException:
        child.terminate()
        child.wait()
        raise
    # It outlives this process on purpose: nobody will collect its exit code.
    child.returncode = 0
    return status


def _wait_up(
    child: subprocess.Popen[bytes],
    layout: Layout,
    progress: Progress | None,
    start: int,
    clock: Clock,
) -> LocalStatus:
    log = layout.directory / "supervisor.log"
    pause = threading.Event()
    deadline = clock.monotonic() + _TIMEOUT
    done = 0
    while True:
        status = read_status(layout.directory)
        if status.owner_pid == child.pid:
            if status.is_ready:
                return status
            if status.n_running > done and progress is not None:
                done, total = status.n_running, len(status.servers)
                progress(LocalProgress(done, total, f"{done} of {total} servers"))
        if child.poll() is not None:
            raise LocalServerError(
                f"the supervisor ended with code {child.returncode}; its last words:\n"
                f"{log_tail(log, start)}",
                hint=f"its output: {log}",
            )
        if clock.monotonic() > deadline:
            raise LocalServerError(
                f"not up after {_TIMEOUT:g} seconds", hint=f"see {log} and the logs beside it"
            )
        pause.wait(_POLL)


def _arguments(options: LocalOptions) -> list[str]:
    """Return the options as the command line takes them."""
    numbers = ("physical", "replicas", "logical_shards")
    switches = ("redis", "memcached", "pgbouncer", "fsync")
    return [
        *(f"--{name.replace('_', '-')}={getattr(options, name)}" for name in numbers),
        *(f"--{name}" if getattr(options, name) else f"--no-{name}" for name in switches),
    ]
