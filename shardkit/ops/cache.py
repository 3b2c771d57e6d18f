"""`shardkit cache`: whether servers answer, and emptying one.

Called by the command line. What servers show is `shardkit.ops.cacheaudit`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from shardkit.caches.opening import backend
from shardkit.caches.served import ServedCache
from shardkit.caching.operations import UNKNOWN, Op, Request
from shardkit.clock import SYSTEM, Clock
from shardkit.errors import ConfigurationError
from shardkit.sections import CacheConfig

__all__ = ["PATIENT", "NodeStatus", "flush", "node_status"]

PATIENT: Final = 1.0
"""Seconds a server has to answer: nobody's request waits for a command."""


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """One cache server.

    Attributes:
        name: `host:port`.
        is_gutter: whether it stands in for others.
        answers: whether it may be read; a Redis with the data of an earlier moment may not.
        must_flush: whether it has to be emptied first.
        seconds: the answer took; None without one.
    """

    name: str
    is_gutter: bool
    answers: bool
    must_flush: bool
    seconds: float | None


def node_status(config: CacheConfig, *, clock: Clock = SYSTEM) -> list[NodeStatus]:
    """Return whether each server answers.

    Args:
        config: `[cache]`.
        clock: source of time.
    """
    cache = backend(config, deadline=PATIENT, hold=0.0, clock=clock)
    try:
        if not isinstance(cache, ServedCache):  # in this process, or none
            return []
        probe = [Request(Op.READ, "shardkit:nobody")]
        cache.run(probe)  # a cluster tells who is in it
        found = []
        for node in (*cache.nodes.homes, *cache.nodes.gutter):
            began = clock.monotonic()
            (answer,) = cache.asks(node, probe)
            answers = answer != UNKNOWN  # a cluster may send it on, which is an answer, too
            took = clock.monotonic() - began if answers else None
            found.append(NodeStatus(node.name, node.is_gutter, answers, node.must_flush, took))
        return found
    finally:
        cache.close()


def flush(config: CacheConfig, name: str, *, dry_run: bool = False) -> bool:
    """Empty a server, for every process; return whether it answered.

    Args:
        config: `[cache]`.
        name: of the server, as `node_status` says it.
        dry_run: change nothing.

    Raises:
        ConfigurationError: there is no such server.
    """
    known = [each.name for each in node_status(config)]
    if name not in known:
        raise ConfigurationError(
            f"the cache has no server {name!r}", hint=f"name one of: {', '.join(known) or 'none'}"
        )
    if dry_run:
        return True
    cache = backend(config, deadline=PATIENT)
    try:
        cache.run([Request(Op.READ, "shardkit:nobody")])
        return cache.flush(name)
    finally:
        cache.close()
