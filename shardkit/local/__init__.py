"""An embedded cluster of real servers, for a first try, for development and for tests."""

from __future__ import annotations

from shardkit.local.cluster import LocalCluster, LocalProgress
from shardkit.local.options import LocalOptions
from shardkit.local.server import LocalServer, ServerKind, ServerStatus

__all__ = [
    "LocalCluster",
    "LocalOptions",
    "LocalProgress",
    "LocalServer",
    "ServerKind",
    "ServerStatus",
]
