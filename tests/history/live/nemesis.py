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
from typing import Final, Protocol

import psycopg

from shardkit.testing import wait_until
from tests.history.live.faults import FAULTS, SERVERS
from tests.history.live.plan import draw_of
from tests.history.live.stage import Stage
from tests.history.live.watching import Watching

__all__ = ["Mover", "Nemesis"]


_LONGEST: Final = 90.0
"""Seconds that a failover may take until every server follows again, on a busy machine."""


class Mover(Protocol):
    """What moves logical shards.

    Attributes:
        is_sturdy: whether servers may fail meanwhile.
    """

    is_sturdy: bool

    def move(self, shard: int, source: str, target: str) -> bool:
        """Move a logical shard; return whether it has changed hands."""

    def settle(self) -> None:
        """Finish or give up what is under way, once all is healed."""

    def close(self) -> None:
        """End what is left of it."""


class Nemesis:
    """What breaks and moves.

    Args:
        stage: what is broken.
        mover: what moves.
        faults: names of what may break; empty for nothing.
        pause: seconds between two faults, about.
        move_pause: seconds between two moves, about.
        failover_pause: seconds between two losses of a primary, about; only where it is watched.
        is_watched: whether `shardkit failover watch` runs.
        deaf: replicas that do not receive the log for a while before a primary is lost, once, at
            the end; None for no such loss.

    Attributes:
        counts: what was done how often.
        is_moving: whether a move is under way.
    """

    def __init__(
        self,
        stage: Stage,
        mover: Mover | None,
        *,
        faults: Sequence[str] = tuple(FAULTS),
        pause: float = 1.0,
        move_pause: float = 0.5,
        failover_pause: float = 10.0,
        is_watched: bool = False,
        deaf: int | None = None,
    ) -> None:
        self.stage = stage
        self.mover = mover
        self.counts: Counter[str] = Counter()
        self.is_moving = False
        self._faults = tuple(faults)
        self._pause = pause
        self._move_pause = move_pause
        self._failover_pause = failover_pause
        self._deaf = deaf
        self.watching = Watching(stage, self._failed_over) if is_watched else None
        self._stop = threading.Event()
        self._servers = threading.Lock()
        self._failed: list[BaseException] = []

    def run(self, seconds: float) -> None:
        """Break and move for so long; all is healed when it returns.

        Raises:
            Exception: what went wrong here, and not on a server.
        """
        loops: list[Callable[[random.Random], None]] = []
        if self.mover is not None:
            loops.append(self._moves)
        if self._faults:
            loops.append(self._breaks)
        if self.watching is not None and self._deaf is None:
            loops.append(self._loses)
        threads = [
            threading.Thread(
                target=self._kept, args=(loop, draw_of(self.stage.plan, loop.__name__))
            )
            for loop in loops
        ]
        if self._deaf is not None:
            self._stop.wait(seconds / 2)
            self._make_deaf(self._deaf)
            self._stop.wait(seconds / 2)
            for physical in self.stage.topology.physical:
                self.stage.local.kill_server(self.stage.primary(physical).name)
        with self.watching or _Nothing():
            for thread in threads:
                thread.start()
            if self._deaf is None:
                self._stop.wait(seconds)
            self._stop.set()
            for thread in threads:
                thread.join()
            if self._failed:
                raise self._failed[0]
            if self.watching is not None:
                if self._deaf is not None:
                    n = len(self.stage.topology.physical)
                    what = "every physical shard has another primary"
                    wait_until(lambda: self.counts["failovers"] >= n, _LONGEST, what)
                self.watching.wait(_LONGEST)
            if self.mover is not None:
                self.mover.settle()

    def _kept(self, loop: Callable[[random.Random], None], draw: random.Random) -> None:
        try:
            while not self._stop.is_set():
                loop(draw)
        except BaseException as error:  # noqa: BLE001  raised again where it was run
            traceback.print_exc()
            self._failed.append(error)
            self._stop.set()

    def _moves(self, draw: random.Random) -> None:
        assert self.mover is not None, "only then it is run"
        shard = draw.randrange(self.stage.plan.logical_shards)
        with self._exclusively():
            source = self.stage.owner_of(shard)
            target = draw.choice(sorted({*self.stage.topology.physical} - {source}))
            self.is_moving = True
            try:
                is_moved = self.mover.move(shard, source, target)
            finally:
                self.is_moving = False
        self.counts["moves" if is_moved else "moves given up"] += 1
        self._stop.wait(draw.random() * 2 * self._move_pause)

    def _make_deaf(self, n: int) -> None:
        for physical in self.stage.topology.physical:
            for server in self.stage.replicas(physical)[:n]:
                with self.stage.superuser_of(server.name) as replica:
                    replica.execute("ALTER SYSTEM SET primary_conninfo = 'host=/nowhere'")
                    replica.execute("SELECT pg_reload_conf()")

    def _failed_over(self, _physical: str) -> None:
        self.counts["failovers"] += 1
        self.counts["failovers during a move"] += self.is_moving

    def _loses(self, draw: random.Random) -> None:
        """Kill or freeze a primary for good; wait until another has taken its place."""
        assert self.watching is not None, "only then it is run"
        self._stop.wait(draw.random() * 2 * self._failover_pause)
        physical = draw.choice(sorted(self.stage.topology.physical))
        how = draw.choice(("kill", "kill", "freeze"))
        try:
            primary = self.stage.primary(physical).name
        except psycopg.Error:
            return
        if self._stop.is_set() or not self.watching.is_well(physical):
            return
        began = time.monotonic_ns()
        with self.stage.lock:
            if how == "kill":
                self.stage.local.kill_server(primary)
            else:
                self.stage.local.pause(primary)
        self.counts[f"{how} a primary for good"] += 1
        before = self.counts["failovers"]
        watching = self.watching
        wait_until(
            lambda: self.counts["failovers"] > before and watching.is_well(physical),
            _LONGEST,
            f"another primary of {physical}: {watching.latest}",
        )
        self.stage.fault(f"{how} {primary} for good", began)

    def _exclusively(self) -> threading.Lock | _Nothing:
        assert self.mover is not None, "asked while something moves"
        return _Nothing() if self.mover.is_sturdy else self._servers

    def _breaks(self, draw: random.Random) -> None:
        name = draw.choice(self._faults)
        is_shared = self.mover is None or self.mover.is_sturdy or name not in SERVERS
        with _Nothing() if is_shared else self._servers:
            began = time.monotonic_ns()
            broken = FAULTS[name](self.stage, draw)
            what, seconds = next(broken)
            self._stop.wait(seconds)
            if next(broken, None) is not None:
                raise AssertionError(f"{name} breaks twice")
            self.stage.fault(what, began)
        self.counts[name] += 1
        self._stop.wait(draw.random() * 2 * self._pause)


class _Nothing:
    """No lock."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass
