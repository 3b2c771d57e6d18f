"""Is anything old ever shown when everything fails at once? `make test-chaos-cache`; minutes.

Three Memcached servers and a gutter. One is so small that it evicts all the time; one is killed and
started again, empty; one is behind a link that loses, delays, refuses and resets. Writers are
killed at any moment, and on purpose between COMMIT and store. Entries live an hour, so what is
not repaired stays. Readers check every answer of the cache against what the database had
committed a second before they began (a process asks it all the time), and against what had been
acknowledged. A server that was gone missed what was written meanwhile: a process that never
noticed may be shown that until a relay has been there; so of it a second is counted from its
return, and what was shown before is reported by itself.

Beside it, in the same servers, of the same rows, under the same kills: plain cache-aside. It must
be caught, or the judge sees nothing.
"""

from __future__ import annotations

import math
import multiprocessing
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final

import psycopg

from benchmarks.cacheroles import CHECKED
from benchmarks.cachestages import Machines, Sessions
from benchmarks.measure import report, servers
from shardkit.testing import FaultProxy, wait_until

__all__ = ["BOUND", "Machines", "Outcome", "Sessions", "run"]

BOUND: Final = 1.0
"""Seconds after a commit from which nobody may be shown anything older."""

WANTED: Final = 10_000_000
_FAR: Final = 2  # the server behind the link
PEERS = ("cache-aside",)
ARMS: Final = {"machines": 0.9, "sessions in memcached": 0.06, "sessions in redis": 0.04}
"""Who plays, and which share of the reads."""

TARGETS = {
    "late_reads": "≤ 0", "mixed_up_reads": "≤ 0", "aside_late_reads": "≥ 1",
    "evictions": "≥ 1", "restarts": "≥ 1", "link_faults": "≥ 1",
}  # fmt: skip


def main(*, as_json: bool, quick: bool = False) -> None:
    failed = False
    for arm, share in ARMS.items():
        with servers(physical=1, logical_shards=8) as local:
            config = local.config_path
            stage = Machines(config) if arm == "machines" else Sessions(config, arm.split()[-1])
            wanted = round((100_000 if quick else WANTED) * share)
            outcome = run(stage, checked=wanted, timeout=3600.0, said=not as_json)
        targets = TARGETS | {"checked_reads": f"≥ {wanted}"}
        report(
            f"cachechaos, {arm}",
            outcome.figures,
            peers=PEERS,
            medians={},
            targets=targets,
            as_json=as_json,
        )
        if not as_json:
            print(outcome.bound)
        counts = outcome.counts
        failed |= bool(counts["late"] or counts["mixed"] or not counts["aside_late"])
    if failed:
        sys.exit(1)


@dataclass
class Outcome:
    """What was seen.

    Attributes:
        counts: sums of `CHECKED`.
        seconds: it took.
        evictions: entries that the smallest server threw out.
        restarts: of the server that is killed.
        link_faults: of the link.
        left: rows of the outbox at the end that were not repaired.
    """

    counts: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    evictions: int = 0
    restarts: int = 0
    link_faults: int = 0
    left: int = 0

    @property
    def figures(self) -> dict[str, float]:
        """What is reported."""
        counts = self.counts
        return {
            "checked_reads": counts["checked"],
            "late_reads": counts["late"],
            "late_reads_of_a_server_just_back": counts["returning"],
            "mixed_up_reads": counts["mixed"],
            "older_than_acknowledged": counts["older"],
            "share_from_the_cache": counts["checked"]
            / max(1, counts["checked"] + counts["loaded"]),
            "aside_reads": counts["aside"],
            "aside_late_reads": counts["aside_late"],
            "writes": counts["written"],
            "evictions": self.evictions,
            "restarts": self.restarts,
            "link_faults": self.link_faults,
            "left_in_the_outbox": self.left,
            "seconds": self.seconds,
        }

    @property
    def bound(self) -> str:
        """What so many reads without a late one prove, and no more."""
        n, late = self.counts["checked"], self.counts["late"]
        if late:
            return f"{late:,} of {n:,} reads were shown something older than {BOUND:g} s"
        # The rule of three: 1 - 0.05 ** (1 / n), about 3 / n.
        share = -math.expm1(math.log(0.05) / max(n, 1))
        return f"0 late reads in {n:,}: at most {share:.1e} of all, at 95 % confidence"


class Server:
    """One Memcached, or one Redis that forgets everything when it is killed."""

    def __init__(self, kind: str, *, is_small: bool = False) -> None:
        program = shutil.which("redis-server" if kind == "redis" else kind)
        if program is None:
            sys.exit(f"{kind} is not installed")
        with socket.create_server(("127.0.0.1", 0)) as found:
            self.port = found.getsockname()[1]
        self.kind = kind
        port = str(self.port)
        if kind == "redis":
            self._command = [program, "--bind", "127.0.0.1", "--port", port, "--save", ""]
            small = ["--maxmemory", "2500kb", "--maxmemory-policy", "volatile-lru"]
        else:
            self._command = [program, "-l", "127.0.0.1", "-p", port, "-U", "0", "-t", "1"]
            self._command += ["-u", "nobody"]
            small = ["-m", "1", "-I", "512k"]
        self._command += small if is_small else []
        self.start()

    def at(self, port: int) -> str:
        """Return how backends are told of it, or of a link to it."""
        return f"redis://127.0.0.1:{port}/0" if self.kind == "redis" else f"127.0.0.1:{port}"

    @property
    def name(self) -> str:
        """How backends are told of it."""
        return self.at(self.port)

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        wait_until(lambda: self.evictions() >= 0, timeout=10, what=f"{self.kind} answers")

    def ask(self, request: bytes) -> bytes:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=2) as connection:
                connection.sendall(request)
                said = b""
                while not re.search(rb"evictions \d+\r|evicted_keys:\d+\r", said):
                    if not (more := connection.recv(65536)):
                        break
                    said += more
                return said
        except OSError:
            return b""

    def evictions(self) -> int:
        """Return how many entries it threw out for room; -1 when it does not answer."""
        said = self.ask(b"INFO\r\n" if self.kind == "redis" else b"stats\r\n")
        found = re.search(rb"(?:evictions |evicted_keys:)(\d+)", said)
        return -1 if found is None else int(found[1])

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()


def run(
    stage: Machines | Sessions,
    *,
    checked: int,
    timeout: float,
    readers: int = 5,
    writers: int = 2,
    seed: int = 1,
    bound: float = BOUND,
    said: bool = False,
) -> Outcome:
    """Have everything fail until so many reads were checked and cache-aside caught, or time is up.

    Args:
        stage: who takes part, and where.
        checked: reads that a cache answered.
        timeout: seconds.
        readers: processes that read.
        writers: processes that write; each is killed every second or two.
        seed: of what is drawn; what happens depends on the machine nevertheless.
        bound: seconds after a commit from which nothing older may be shown.
        said: whether to say how far it is, twice a minute.
    """
    outcome, began = Outcome(), time.monotonic()
    next_word = began + 30.0
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.cachesessions"])
    n = readers + writers + 1
    with ExitStack() as stack:
        database = stack.enter_context(psycopg.connect(stage.dsn, autocommit=True))
        stack.enter_context(stage.made(database))
        small = Server(stage.kind, is_small=True)
        mortal, far, gutter = Server(stage.kind), Server(stage.kind), Server(stage.kind)
        for server in (small, mortal, far, gutter):
            stack.callback(server.kill)
        proxy = stack.enter_context(FaultProxy("127.0.0.1", far.port, protocol="tcp", seed=seed))
        shared = stage.shared(
            (small.name, mortal.name, far.at(proxy.port)),
            (gutter.name,),
            stage.n_rows,
            context.Array("q", stage.n_rows, lock=False),
            context.Array("d", 3, lock=False),
            context.Array("q", stage.n_rows, lock=False),
            context.Array("q", n * len(CHECKED), lock=False),
            context.Event(),
            bound,
            seed,
        )
        relays, writes, reads = stage.roles
        roles = [relays, *[writes] * writers, *[reads] * readers]
        processes: list[Any] = [
            context.Process(target=role, args=(shared, at), daemon=True)
            for at, role in enumerate(roles)
        ]
        trouble = threading.Thread(target=_trouble, args=(shared, mortal, proxy, outcome))
        try:
            for each in (*processes, trouble):
                each.start()
            looks: deque[tuple[float, list[Any]]] = deque()
            while time.monotonic() - began < timeout:
                outcome.evictions = max(outcome.evictions, small.evictions())
                if _sum(shared, "checked") >= checked and _has_happened(shared, outcome):
                    break
                rows = stage.look(database)
                looks.append((time.monotonic() + bound, rows))  # committed before now
                _follow(shared, looks)
                if said and time.monotonic() > next_word:
                    next_word += 30.0
                    seen = {name: _sum(shared, name) for name in CHECKED}
                    print(f"{time.monotonic() - began:6.0f} s {seen}", file=sys.stderr, flush=True)
                if any(not each.is_alive() for each in processes):
                    raise AssertionError("somebody ended before the end")
        finally:
            shared.stop.set()
            for each in (*processes, trouble):
                if each.ident is not None:
                    each.join(30)
            for each in processes:
                if each.is_alive():
                    each.kill()
        outcome.counts = {name: _sum(shared, name) for name in CHECKED}
        outcome.left = stage.left(database)
    outcome.seconds = time.monotonic() - began
    return outcome


def _has_happened(shared: Any, outcome: Outcome) -> bool:
    """Whether there was trouble of every kind, and the judge has caught cache-aside."""
    troubles = (outcome.evictions, outcome.restarts, outcome.link_faults)
    return all(troubles) and _sum(shared, "aside_late") > 0


def _sum(shared: Any, name: str) -> int:
    return sum(shared.counters[CHECKED.index(name) :: len(CHECKED)])


def _follow(shared: Any, looks: deque[tuple[float, list[Any]]]) -> None:
    """Say of looks at the database that are the bound old: nothing less is to be shown.

    Readers take what is said before they begin to read.
    """
    shared.stop.wait(0.1)
    while looks and looks[0][0] <= time.monotonic():
        for row, version in looks.popleft()[1]:
            shared.floors[row] = version


def _trouble(shared: Any, mortal: Server, proxy: FaultProxy, outcome: Outcome) -> None:
    """Kill a server and break a link, again and again."""
    rng = random.Random(shared.seed)
    faults = [
        lambda: proxy.shape(latency=0.02, jitter=0.06),
        lambda: proxy.shape(latency=0.2),
        proxy.black_hole,
        proxy.stall,
        proxy.refuse,
        proxy.reset,
        proxy.half_open,
    ]
    while not shared.stop.wait(rng.uniform(0.3, 3.0)):
        if rng.random() < 0.3:
            mortal.kill()
            shared.stop.wait(rng.uniform(0, 0.7))
            mortal.start()
            outcome.restarts += 1
        else:
            shared.returned[_FAR] = math.inf
            rng.choice(faults)()
            outcome.link_faults += 1
            shared.stop.wait(rng.choice((0.05, 0.2, 0.6, 2.0)))
            proxy.heal()
            shared.returned[_FAR] = time.monotonic()
    proxy.heal()


if __name__ == "__main__":
    main(as_json="--json" in sys.argv, quick="--quick" in sys.argv)
