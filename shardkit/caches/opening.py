"""Makes the backend that `[cache]` describes. Opens no connection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Unpack
from weakref import WeakValueDictionary

from shardkit.caches.async_memcached import AsyncMemcached
from shardkit.caches.backend import AsyncBackend, Backend
from shardkit.caches.memcached import Memcached
from shardkit.caches.memory import AsyncMemoryCache, MemoryCache
from shardkit.caches.null import AsyncNullCache, NullCache
from shardkit.caches.redis import AsyncRedis, Redis
from shardkit.caches.redis_cluster import AsyncRedisCluster, RedisCluster
from shardkit.caches.serving import Options
from shardkit.sections import CacheConfig

__all__ = ["async_backend", "backend"]

_SERVED: Final[dict[str, tuple[Callable[..., Backend], Callable[..., AsyncBackend]]]] = {
    "memcached": (Memcached, AsyncMemcached),
    "redis": (Redis, AsyncRedis),
    "redis-cluster": (RedisCluster, AsyncRedisCluster),
}


def _options(config: CacheConfig) -> Options:
    return {
        "gutter": config.gutter,
        "deadline": config.timeout,
        "connections": config.connections,
    }


def backend(config: CacheConfig, **more: Unpack[Options]) -> Backend:
    """Return the backend for threads.

    Args:
        config: `[cache]`.
        more: options in place of those that are configured, as `RELAY_OPTIONS`.
    """
    if made := _SERVED.get(config.backend):
        return made[0](config.nodes, **(_options(config) | more))
    return _memory() if config.backend == "memory" else NullCache()


def async_backend(config: CacheConfig, **more: Unpack[Options]) -> AsyncBackend:
    """Return the backend for asyncio; the arguments are those of `backend`."""
    if made := _SERVED.get(config.backend):
        return made[1](config.nodes, **(_options(config) | more))
    return AsyncMemoryCache(_memory()) if config.backend == "memory" else AsyncNullCache()


_KEPT: WeakValueDictionary[str, MemoryCache] = WeakValueDictionary()


def _memory() -> MemoryCache:
    """Return the one of this process: clusters of one process must not have different caches."""
    return _KEPT.setdefault("memory", MemoryCache())
