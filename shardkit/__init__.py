"""shardkit: many logical shards on a few PostgreSQL servers, as an extension of SQLAlchemy."""

from shardkit import ids
from shardkit.async_session import AsyncReadSession, AsyncWriteSession
from shardkit.cluster import AsyncCluster, Cluster
from shardkit.models import Reference, Sharded
from shardkit.router import Route
from shardkit.session import ReadSession
from shardkit.statements import all_shards
from shardkit.writer import WriteSession

__all__ = [
    "AsyncCluster",
    "AsyncReadSession",
    "AsyncWriteSession",
    "Cluster",
    "ReadSession",
    "Reference",
    "Route",
    "Sharded",
    "WriteSession",
    "all_shards",
    "ids",
]
