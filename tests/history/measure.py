"""How long judging takes: `python -m tests.history.measure [TRANSACTIONS]`.

Writes the history of that many transactions of three steps each, of sixteen clients at a time, with
the recorder, and judges it: a million by default. Prints CPU seconds and memory at its peak.
"""

from __future__ import annotations

import random
import resource
import sys
import tempfile
import time
from pathlib import Path

from tests.history.judge import main as judge
from tests.history.recorder import Recorder

_CLIENTS = 16
_LISTS = 20
_LONGEST = 48


def write(folder: Path, n: int) -> None:
    """Write the history of a serial run; transactions are answered when the client's next begins."""
    rng, now = random.Random(n), 0

    def clock() -> int:
        nonlocal now
        now += 10_000
        return now

    recorders = [Recorder(folder, f"client-{i}", now=clock) for i in range(_CLIENTS)]
    lists: dict[int, list[int]] = {}
    keys, last = list(range(_LISTS)), _LISTS
    begun: dict[int, tuple[int, list[list[object]], list[int]]] = {}

    def answer(client: int) -> None:
        number, do, where = begun.pop(client)
        got = []
        for step, key in zip(do, where, strict=True):
            values = lists.setdefault(key, [])
            if step[0] == "append":
                values.append(int(str(step[2])))
            else:
                got.append(list(values))
        recorders[client].ok(number, got)

    for i in range(n):
        client = i % _CLIENTS
        if client in begun:
            answer(client)
        do: list[list[object]] = []
        where = []
        for step in range(3):
            at = rng.randrange(_LISTS)
            if len(lists.get(keys[at], ())) > _LONGEST:
                keys[at], last = last, last + 1
            where.append(keys[at])
            is_append = rng.random() < 0.5
            do.append(["append", keys[at], 3 * i + step] if is_append else ["read", keys[at]])
        number = recorders[client].invoke(
            "append", do, level="repeatable read", shard=keys[0] % 64, deadline=2.0
        )
        begun[client] = number, do, where
    for client in list(begun):
        answer(client)
    for recorder in recorders:
        recorder.end()


def main() -> int:
    """Write, judge, and print what it took."""
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), n)
        began = time.process_time()
        code = judge([folder])
        seconds = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{n:,} transactions: {seconds:.1f} s of CPU, {peak:,.0f} MB at most")
    return code


if __name__ == "__main__":
    sys.exit(main())
