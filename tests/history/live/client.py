"""A client process: `python -m tests.history.live.client PLAN NAME [--linked]`; ends on SIGTERM.

Its threads are the clients; each has a file of its own. What it was told by errors is printed at
the end, as one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.history import bugs
from tests.history.live.plan import NotedCluster, Plan
from tests.history.live.work import Client
from tests.history.recorder import HistoryFullError, Recorder

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Work until told to stop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plan")
    parser.add_argument("name", help="of the process, such as client-3")
    parser.add_argument("--linked", action="store_true", help="go by the links that break")
    given = parser.parse_args(arguments)
    plan = Plan.read(given.plan)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    errors: Counter[str] = Counter()
    bugs.apply(plan.bug)
    with plan.cluster(is_linked=given.linked) as cluster:
        threads = [
            threading.Thread(target=_work, args=(plan, cluster, f"{given.name}.{n}", stop, errors))
            for n in range(plan.threads)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    print(json.dumps({"process": given.name, "errors": errors}))
    return 0


def _work(
    plan: Plan, cluster: NotedCluster, name: str, stop: threading.Event, errors: Counter[str]
) -> None:
    recorder = Recorder(Path(plan.folder), name)
    client = Client(plan, cluster, name, recorder)
    try:
        while not stop.is_set():
            client.step()
            if plan.think:
                stop.wait(client.draw.random() * plan.think)
    except HistoryFullError:
        pass
    except BaseException:
        traceback.print_exc()  # a mistake of the test, not of a server: its operation hangs
        stop.set()
        raise
    errors.update(client.errors)
    recorder.end()


if __name__ == "__main__":
    began = time.monotonic()
    sys.exit(main())
