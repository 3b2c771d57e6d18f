"""shardkit: many logical shards on a few PostgreSQL servers, as an extension of SQLAlchemy."""

from shardkit import ids, tokens
from shardkit.async_session import AsyncReadSession, AsyncWriteSession
from shardkit.cluster import AsyncCluster, Cluster
from shardkit.deadlines import deadline
from shardkit.derived import CachedCount, CachedList
from shardkit.emitting import after_delete, after_insert, after_update
from shardkit.events import CacheRead
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
    "tokens",
    "unique_lookup",
]
