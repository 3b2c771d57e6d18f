"""What `shardkit status` says of the cache: every server of it, asked at the same time.

Reads are those the servers have counted, of all programs, since they started. What was found is
known to the programs only, as `cluster.cache.counts`: Memcached counts a lease that it makes as a
hit. Needs the `cache` extra. Changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import redis
from pymemcache.client.base import Client
from pymemcache.exceptions import MemcacheError

from shardkit.caches.memcached import split_address
from shardkit.sections import CacheConfig

__all__ = ["CacheStatus", "read_cache_status"]

TIMEOUT: Final = 3.0
"""Seconds that a server has to answer."""


@dataclass(frozen=True, slots=True)
class CacheStatus:
    """One server of the cache as it answered.

    Attributes:
        server: `host:port`.
        backend: `memcached` or `redis`.
        is_gutter: whether it only stands in for others.
        is_reachable: whether it answered in time.
        version: of the server; this and all that follows None when it did not answer.
        entries: that it holds.
        reads: since it started.
        evictions: entries that it gave up for room.
        error: why it did not answer, in one line.
    """

    server: str
    backend: str
    is_gutter: bool
    is_reachable: bool
    version: str | None = None
    entries: int | None = None
    reads: int | None = None
    evictions: int | None = None
    error: str | None = None


def read_cache_status(config: CacheConfig, *, timeout: float = TIMEOUT) -> list[CacheStatus]:
    """Return the status of every server of a cache, the gutter last; empty without servers.

    Args:
        config: `[cache]`.
        timeout: seconds that each has to answer, above 0.
    """
    nodes = [(name, False) for name in config.nodes] + [(name, True) for name in config.gutter]
    if not nodes:
        return []
    ask = _ask_memcached if config.backend == "memcached" else _ask_redis

    def status(node: tuple[str, bool]) -> CacheStatus:
        name, is_gutter = node
        shown = name.rpartition("@")[2] if "@" in name else name.rpartition("//")[2]
        shown = shown.partition("/")[0]
        try:
            said = ask(name, timeout)
        except (OSError, MemcacheError, redis.RedisError, ValueError, KeyError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            return CacheStatus(shown, config.backend, is_gutter, is_reachable=False, error=reason)
        return CacheStatus(shown, config.backend, is_gutter, is_reachable=True, **said)

    with ThreadPoolExecutor(len(nodes)) as threads:
        return list(threads.map(status, nodes))


def _ask_memcached(name: str, timeout: float) -> Mapping[str, Any]:
    client = Client(split_address(name), connect_timeout=timeout, timeout=timeout)
    try:
        said = client.stats()
    finally:
        client.close()
    return {
        "version": said[b"version"].decode(),
        "entries": int(said[b"curr_items"]),
        "reads": int(said[b"cmd_get"]),
        "evictions": int(said[b"evictions"]),
    }


def _ask_redis(name: str, timeout: float) -> Mapping[str, Any]:
    with redis.Redis.from_url(
        name, socket_connect_timeout=timeout, socket_timeout=timeout
    ) as client:
        said: Any = client.info()
        entries: Any = client.dbsize()
    return {
        "version": str(said["redis_version"]),
        "entries": int(entries),
        "reads": int(said["keyspace_hits"]) + int(said["keyspace_misses"]),
        "evictions": int(said["evicted_keys"]),
    }
