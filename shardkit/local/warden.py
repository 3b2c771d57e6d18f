"""Ends a cluster's servers when their owner dies without doing it.

Run as a script of its own (`python -I -S warden.py`), standard library only, so that it is small
and starts at once. The owner writes one JSON line to its standard input whenever the set of
processes changes: `[[pid, started, signal], …]`. The end of that input means that the owner is
gone, whatever ended it; the processes of the last line are then asked to stop and, after ten
seconds, killed. A process whose start time differs is left alone.

Not PR_SET_PDEATHSIG: that fires when the *thread* that started the child ends, and is cleared
when the child changes its user. Source: prctl(2), PR_SET_PDEATHSIG.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
from pathlib import Path

_PATIENCE_MS = 10_000


def main() -> None:
    """Read lines until the owner is gone, then end what the last one names."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    last = "[]"
    for line in sys.stdin:
        if line.endswith("\n"):
            last = line
    end([(int(pid), int(started), int(number)) for pid, started, number in json.loads(last)])


def end(marks: list[tuple[int, int, int]]) -> None:
    """Signal each process, wait for all, kill those that stay."""
    waiting: dict[int, int] = {}
    for pid, started, number in marks:
        try:
            descriptor = os.pidfd_open(pid)
        except OSError:
            continue
        if _started(pid) != started:
            os.close(descriptor)
            continue
        _signal(descriptor, number)
        _signal(descriptor, signal.SIGCONT)
        waiting[descriptor] = pid
    poll = select.poll()
    for descriptor in waiting:
        poll.register(descriptor, select.POLLIN)
    while waiting:
        ended = poll.poll(_PATIENCE_MS)
        if not ended:
            break
        for descriptor, _ in ended:
            poll.unregister(descriptor)
            del waiting[descriptor]
    for descriptor in waiting:
        _signal(descriptor, signal.SIGKILL)


def _started(pid: int) -> int | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[19])


def _signal(descriptor: int, number: int) -> None:
    try:
        signal.pidfd_send_signal(descriptor, number)
    except OSError:
        return


if __name__ == "__main__":
    main()
