"""The watcher of `shardkit failover` over the servers of a run; tells what it has done.

It runs in the process that owns the servers, because it stops, rewinds and starts them.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Self

from shardkit.local import LocalHost
from shardkit.ops.failover import watch
from shardkit.ops.failover.machine import Action, Register, Rest
from shardkit.testing import wait_until
from tests.history.live.stage import Stage

__all__ = ["Watching"]


class Watching:
    """A watcher in a thread.

    Args:
        stage: whose servers it watches.
        on_failover: told the name of a physical shard that has a new primary.

    Attributes:
        host: what it does to servers from outside.
        said: what it did, by kind.
        latest: the last action for each physical shard.
    """

    def __init__(self, stage: Stage, on_failover: Callable[[str], None]) -> None:
        self._stage = stage
        self.host = LocalHost(stage.local)
        self.host._lock = stage.lock  # faults start and stop servers, too
        self.said: Counter[str] = Counter()
        self.latest: dict[str, Action] = {}
        self._on_failover = on_failover
        self._stop = threading.Event()
        self._failed: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, args=(stage,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(60.0)
        if self._failed:
            raise self._failed[0]

    def _run(self, stage: Stage) -> None:
        try:
            watch(
                stage.config, stage.topology, host=self.host, stop=self._stop, progress=self._told
            )
        except BaseException as error:  # noqa: BLE001  raised where it is ended
            self._failed.append(error)

    def _told(self, physical: str, action: Action) -> None:
        self.latest[physical] = action
        self.said[type(action).__name__] += 1
        self._stage.note(f"watcher of {physical}: {action}")
        if isinstance(action, Register):
            self._on_failover(physical)

    def is_well(self, physical: str) -> bool:
        """Tell whether every server of a physical shard follows its primary."""
        return isinstance(self.latest.get(physical), Rest)

    def are_well(self) -> bool:
        """Tell whether that holds for all physical shards."""
        return bool(self.latest) and all(map(self.is_well, self.latest))

    def wait(self, seconds: float) -> None:
        """Wait until all is well everywhere."""
        wait_until(
            self.are_well,
            seconds,
            f"all servers are well: {self.latest}",
        )
