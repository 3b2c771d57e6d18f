"""A relay process: `python -m tests.history.live.relayer PLAN NAME [--linked]`; ends on SIGTERM.

Its handler writes down every delivery, and its effect is a row on another logical shard.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shardkit import Relay
from shardkit.outbox import Backoff, Event, once
from tests.history import bugs
from tests.history.live.plan import NotedCluster, Plan
from tests.history.live.tables import Effect
from tests.history.recorder import Recorder

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Deliver until told to stop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plan")
    parser.add_argument("name", help="of the process, such as relay-3")
    parser.add_argument("--linked", action="store_true", help="go by the links that break")
    given = parser.parse_args(arguments)
    plan = Plan.read(given.plan)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    bugs.apply(plan.bug)
    with plan.cluster(is_linked=given.linked) as cluster:
        handler = _Handler(plan, cluster, given.name)
        relay = Relay(
            cluster,
            {"happened": handler.handle},
            lease=2.0,
            poll=0.05,
            # What fails while servers fail over is tried again soon, and never given up.
            backoff=Backoff(first=0.1, longest=1.0, attempts=10_000),
        )
        relay.run(stop)
        handler.end()
    return 0


class _Handler:
    """Writes down what is delivered; each thread of the relay has a file of its own."""

    def __init__(self, plan: Plan, cluster: NotedCluster, name: str) -> None:
        self._plan = plan
        self._name = name
        self._mine = threading.local()
        self._recorders: list[Recorder] = []
        self._lock = threading.Lock()
        self.handle = once(cluster.writer, near=lambda event: event.payload["home"])(self._handled)

    def _recorder(self) -> Recorder:
        if not hasattr(self._mine, "recorder"):
            with self._lock:
                name = f"{self._name}.{len(self._recorders)}"
                self._mine.recorder = Recorder(Path(self._plan.folder), name)
                self._recorders.append(self._mine.recorder)
        return self._mine.recorder  # type: ignore[no-any-return]  # a recorder

    def _handled(self, session: Any, event: Event) -> None:
        told = event.payload
        recorder = self._recorder()
        n = recorder.invoke("deliver", ["deliver", told["key"], told["event"], told["position"]])
        try:
            session.add(Effect(home_id=told["home"], event=told["event"]))
            session.flush()
        except BaseException as error:
            recorder.unknown(n, why=type(error).__name__)
            raise
        recorder.ok(n)

    def end(self) -> None:
        """Write down that nothing comes any more."""
        for recorder in self._recorders:
            recorder.end()


if __name__ == "__main__":
    sys.exit(main())
