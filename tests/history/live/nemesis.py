"""The seeded schedule: which logical shard moves where, and what breaks when, until it is enough.

Moves and faults go on at the same time, each drawn from the seed. What was done, and how often, is
counted; every fault and every move is a fact of the history.
"""

from __future__ import annotations

import random
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Final, Protocol

from shardkit.testing import wait_until
from tests.history.live.faults import FAULTS, SERVERS
from tests.history.live.losses import LONGEST, Losses
from tests.history.live.movers import AtStep
from tests.history.live.plan import draw_of
from tests.history.live.stage import Stage

__all__ = ["Mover", "Nemesis"]


class Mover(Protocol):
    """What moves logical shards.

    Attributes:
        is_sturdy: whether servers may fail meanwhile.
        shards: that it moves.
        at_step: told of each step of a move.
    """

    is_sturdy: bool
    shards: Sequence[int]
    at_step: AtStep

    def move(self, shard: int, source: str, target: str) -> int:
        """Move a logical shard; return how often it has changed hands."""

    def settle(self) -> None:
        """Finish or give up what is under way, once all is healed."""

    def close(self) -> None:
        """End what is left of it."""


class Nemesis:
    """What breaks and moves.

    Args:
        stage: what is broken.
        movers: what moves, side by side.
        faults: names of what may break; empty for nothing.
        pause: seconds between two faults, about.
        move_pause: seconds between two moves of one mover, about.
        failover_pause: seconds between two losses of a primary, about; only where it is watched.
        is_watched: whether `shardkit failover watch` runs.
        deaf: replicas that do not receive the log for a while before a primary is lost, once, at
            the end; None for no such loss.

    Attributes:
        counts: what was done how often.
        losses: of primaries, and the watcher; None where nobody watches.
    """

    def __init__(
        self,
        stage: Stage,
        movers: Sequence[Mover] = (),
        *,
        faults: Sequence[str] = tuple(FAULTS),
        pause: float = 1.0,
        move_pause: float = 0.5,
        failover_pause: float = 10.0,
        is_watched: bool = False,
        deaf: int | None = None,
    ) -> None:
        self.stage = stage
        self.movers = tuple(movers)
        self.counts: Counter[str] = Counter()
        self.losses = Losses(stage, self.counts, lambda: bool(self._moving)) if is_watched else None
        self._faults = tuple(faults)
        self._pause = pause
        self._move_pause = move_pause
        self._failover_pause = failover_pause
        self._deaf = deaf
        self._moving: set[int] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._servers = threading.Lock()
        self._failed: list[BaseException] = []

    def run(self, seconds: float) -> None:
        """Break and move for so long; all is healed when it returns.

        Raises:
            AssertionError: something does not come to its end, or a server stays away.
            Exception: what went wrong here, and not on a server.
        """
        losses = self.losses
        threads = [
            self._thread(f"moves {n}", self._moves(each)) for n, each in enumerate(self.movers)
        ]
        if self._faults:
            threads.append(self._thread("breaks", self._breaks))
        if losses is not None and self._deaf is None:
            for mover in self.movers:
                mover.at_step = losses.at_step
            threads.append(self._thread("loses", self._loses))
        if self._deaf is not None:
            self._stop.wait(seconds / 2)
            self._make_deaf(self._deaf)
            self._stop.wait(seconds / 2)
            for physical in self.stage.topology.physical:
                self.stage.local.kill_server(self.stage.primary(physical).name)
        with _NOTHING if losses is None else losses.watching:
            for thread in threads:
                thread.start()
            if self._deaf is None:
                self._stop.wait(seconds)
            self._stop.set()
            for thread in threads:
                thread.join()
            if self._failed:
                raise self._failed[0]
            self.stage.check_servers(databases=False)
            if losses is not None:
                if self._deaf is not None:
                    n = len(self.stage.topology.physical)
                    what = "every physical shard has another primary"
                    wait_until(lambda: self.counts["failovers"] >= n, LONGEST, what)
                losses.watching.wait(LONGEST)
            for mover in self.movers:
                mover.settle()
        self.stage.check_servers()

    def _thread(self, name: str, loop: Callable[[random.Random], None]) -> threading.Thread:
        return threading.Thread(target=self._kept, args=(loop, draw_of(self.stage.plan, name)))

    def _kept(self, loop: Callable[[random.Random], None], draw: random.Random) -> None:
        try:
            while not self._stop.is_set():
                loop(draw)
        except BaseException as error:  # noqa: BLE001  raised again where it was run
            traceback.print_exc()
            self._failed.append(error)
            self._stop.set()

    def _count(self, what: str, n: int = 1) -> None:
        with self._lock:  # several movers count
            self.counts[what] += n

    def _moves(self, mover: Mover) -> Callable[[random.Random], None]:
        def one(draw: random.Random) -> None:
            shard = draw.choice(mover.shards)
            with self._shared(is_safe=mover.is_sturdy):
                source = self.stage.owner_of(shard)
                target = draw.choice(sorted({*self.stage.topology.physical} - {source}))
                self._moving.add(shard)
                try:
                    n = mover.move(shard, source, target)
                finally:
                    self._moving.discard(shard)
            self._count("moves" if n else "moves given up", n or 1)
            self._stop.wait(draw.random() * 2 * self._move_pause)

        return one

    def _make_deaf(self, n: int) -> None:
        for physical in self.stage.topology.physical:
            for server in self.stage.replicas(physical)[:n]:
                with self.stage.superuser_of(server.name) as replica:
                    replica.execute("ALTER SYSTEM SET primary_conninfo = 'host=/nowhere'")
                    replica.execute("SELECT pg_reload_conf()")

    def _loses(self, draw: random.Random) -> None:
        assert self.losses is not None, "only then it is run"
        self._stop.wait(draw.random() * 2 * self._failover_pause)
        if not self._stop.is_set():
            self.losses.lose(draw, self._stop, has_moves=bool(self.movers))

    def _shared(self, *, is_safe: bool) -> AbstractContextManager[object]:
        """Return the lock of what may not happen while a mover is at work that is not sturdy."""
        return _NOTHING if is_safe else self._servers

    def _breaks(self, draw: random.Random) -> None:
        name = draw.choice(self._faults)
        is_safe = name not in SERVERS or all(mover.is_sturdy for mover in self.movers)
        with self._shared(is_safe=is_safe):
            began = time.monotonic_ns()
            broken = FAULTS[name](self.stage, draw)
            what, seconds = next(broken)
            self.stage.note(f"for {seconds:.3f} s: {what}")
            self._stop.wait(seconds)
            if next(broken, None) is not None:
                raise AssertionError(f"{name} breaks twice")
            self.stage.fault(what, began)
        self._count(name)
        self._stop.wait(draw.random() * 2 * self._pause)


_NOTHING: Final[AbstractContextManager[object]] = nullcontext()
