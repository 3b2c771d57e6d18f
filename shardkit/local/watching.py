"""An embedded cluster whose lost primaries are replaced, as `shardkit failover watch` would.

Only the process that started the servers can make one a standby again, so it is the one that
watches. Called by `shardkit local up` and by programs that run a cluster for people.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from shardkit.config import load
from shardkit.local.cluster import LocalCluster
from shardkit.local.host import LocalHost
from shardkit.ops import failover
from shardkit.ops.failover.machine import Action, Rest, Wait
from shardkit.ops.failover.words import words

__all__ = ["watched"]

_LOG: Final = logging.getLogger(__name__)


@contextmanager
def watched(local: LocalCluster, tell: Callable[[str], object]) -> Iterator[None]:
    """Replace primaries that are lost while the block runs; nothing where there are no replicas.

    Args:
        local: a cluster that this process has started.
        tell: told of each step in a line, from other threads.
    """
    settings, topology = load(local.config_path)
    names = [name for name, shard in topology.physical.items() if shard.replicas]
    if not names:
        yield
        return
    stop = threading.Event()

    def said(physical: str, action: Action) -> None:
        if not isinstance(action, Rest | Wait):
            tell(f"{physical}: {words(action)}")

    def watch() -> None:
        try:
            failover.watch(
                settings,
                topology,
                physical=names,
                host=LocalHost(local, lists=True),
                stop=stop,
                progress=said,
            )
        except Exception:  # noqa: BLE001  the cluster goes on without
            _LOG.exception("nobody replaces lost primaries any more")

    thread = threading.Thread(target=watch, name="shardkit failover", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
