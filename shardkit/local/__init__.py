"""An embedded cluster of real servers, for a first try, for development and for tests."""

from __future__ import annotations

from shardkit.local.cluster import LocalCluster
from shardkit.local.host import LocalHost
from shardkit.local.journal import LocalProgress
from shardkit.local.options import LocalOptions
from shardkit.local.server import LocalServer, ServerKind, ServerStatus, log_tail
from shardkit.local.status import LocalStatus, read_status, stop_cluster
from shardkit.local.watching import watched

__all__ = [
    "LocalCluster",
    "LocalHost",
    "LocalOptions",
    "LocalProgress",
    "LocalServer",
    "LocalStatus",
    "ServerKind",
    "ServerStatus",
    "log_tail",
    "read_status",
    "stop_cluster",
    "watched",
]
