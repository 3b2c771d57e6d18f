"""shardkit: many logical shards on a few PostgreSQL servers, as an extension of SQLAlchemy."""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from shardkit import ids, tokens
    from shardkit.async_session import AsyncReadSession, AsyncWriteSession
    from shardkit.cluster import AsyncCluster, Cluster
    from shardkit.deadlines import deadline
    from shardkit.derived import CachedCount, CachedList
    from shardkit.emitting import after_delete, after_insert, after_update
    from shardkit.events import CacheRead
    from shardkit.garbage import set_aside
    from shardkit.guards import background
    from shardkit.models import Reference, Sharded
    from shardkit.placement import LeastLoaded, Pinned, Weighted
    from shardkit.relay import Relay
    from shardkit.router import Route
    from shardkit.session import ReadSession
    from shardkit.statements import all_shards
    from shardkit.strategies import Directory, Range
    from shardkit.uniques import unique_lookup
    from shardkit.writer import WriteSession

__all__ = [
    "AsyncCluster",
    "AsyncReadSession",
    "AsyncWriteSession",
    "CacheRead",
    "CachedCount",
    "CachedList",
    "Cluster",
    "Directory",
    "LeastLoaded",
    "Pinned",
    "Range",
    "ReadSession",
    "Reference",
    "Relay",
    "Route",
    "Sharded",
    "Weighted",
    "WriteSession",
    "after_delete",
    "after_insert",
    "after_update",
    "all_shards",
    "background",
    "deadline",
    "ids",
    "set_aside",
    "tokens",
    "unique_lookup",
]

# Imported when they are first asked for (PEP 562): a command that needs no session, such as
# `shardkit ids parse`, does not wait for all of SQLAlchemy.
_HOME: Final = {
    "AsyncCluster": "cluster",
    "AsyncReadSession": "async_session",
    "AsyncWriteSession": "async_session",
    "CacheRead": "events",
    "CachedCount": "derived",
    "CachedList": "derived",
    "Cluster": "cluster",
    "Directory": "strategies",
    "LeastLoaded": "placement",
    "Pinned": "placement",
    "Range": "strategies",
    "ReadSession": "session",
    "Reference": "models",
    "Relay": "relay",
    "Route": "router",
    "Sharded": "models",
    "Weighted": "placement",
    "WriteSession": "writer",
    "after_delete": "emitting",
    "after_insert": "emitting",
    "after_update": "emitting",
    "all_shards": "statements",
    "background": "guards",
    "deadline": "deadlines",
    "set_aside": "garbage",
    "unique_lookup": "uniques",
}


if not TYPE_CHECKING:  # else type checkers would take any name for one of these

    def __getattr__(name: str) -> Any:
        if name in {"ids", "tokens"}:
            return import_module(f"shardkit.{name}")
        if name not in _HOME:
            raise AttributeError(f"module 'shardkit' has no attribute {name!r}")
        found = getattr(import_module(f"shardkit.{_HOME[name]}"), name)
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
