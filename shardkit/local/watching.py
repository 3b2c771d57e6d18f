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
from shardkit.errors import LocalServerError
from shardkit.local.cluster import LocalCluster
from shardkit.local.host import LocalHost
from shardkit.ops import failover
from shardkit.ops.failover.machine import Action, Rest, Wait
from shardkit.ops.failover.words import words

__all__ = ["watched"]

_LOG: Final = logging.getLogger(__name__)

_PAUSE: Final = 0.5
"""Seconds between two looks at PgBouncers; each is a system call."""


@contextmanager
def watched(local: LocalCluster, tell: Callable[[str], object]) -> Iterator[None]:
    """Replace primaries that are lost while the block runs, where there are replicas.

    PgBouncers that end by themselves are started again.

    Args:
        local: a cluster that this process has started.
        tell: told of each step in a line, from other threads.
    """
    settings, topology = load(local.config_path)
    names = [name for name, shard in topology.physical.items() if shard.replicas]
    stop, host = threading.Event(), LocalHost(local, lists=True)

    def said(physical: str, action: Action) -> None:
        if not isinstance(action, Rest | Wait):
            tell(f"{physical}: {words(action)}")

    def watch() -> None:
        try:
            failover.watch(
                settings,
                topology,
                physical=names,
                host=host,
                stop=stop,
                progress=said,
            )
        except Exception:  # noqa: BLE001  the cluster goes on without
            _LOG.exception("nobody replaces lost primaries any more")

    def keep() -> None:
        while not stop.wait(_PAUSE):
            try:
                for name in host.revive():
                    tell(f"{name} had ended, and runs again")
            except LocalServerError:
                _LOG.exception("a PgBouncer does not start")

    work = [keep, *([watch] if names else [])]
    threads = [threading.Thread(target=each, name="shardkit watch", daemon=True) for each in work]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
