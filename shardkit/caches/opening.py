"""Makes the backend that `[cache]` describes. Opens no connection."""

from __future__ import annotations

from weakref import WeakValueDictionary

from shardkit.caches.async_memcached import AsyncMemcached
from shardkit.caches.backend import AsyncBackend, Backend
from shardkit.caches.memcached import Memcached
from shardkit.caches.memory import AsyncMemoryCache, MemoryCache
from shardkit.caches.null import AsyncNullCache, NullCache
from shardkit.caches.redis import AsyncRedis, Redis
from shardkit.sections import CacheConfig

__all__ = ["async_backend", "backend"]


def backend(config: CacheConfig) -> Backend:
    """Return the backend for threads."""
    if config.backend in {"memcached", "redis"}:
        made = Memcached if config.backend == "memcached" else Redis
        return made(
            config.nodes,
            gutter=config.gutter,
            deadline=config.timeout,
            connections=config.connections,
        )
    return _memory() if config.backend == "memory" else NullCache()


def async_backend(config: CacheConfig) -> AsyncBackend:
    """Return the backend for asyncio."""
    if config.backend in {"memcached", "redis"}:
        made = AsyncMemcached if config.backend == "memcached" else AsyncRedis
        return made(
            config.nodes,
            gutter=config.gutter,
            deadline=config.timeout,
            connections=config.connections,
        )
    return AsyncMemoryCache(_memory()) if config.backend == "memory" else AsyncNullCache()


_KEPT: WeakValueDictionary[str, MemoryCache] = WeakValueDictionary()


def _memory() -> MemoryCache:
    """Return the one of this process: clusters of one process must not have different caches."""
    return _KEPT.setdefault("memory", MemoryCache())
