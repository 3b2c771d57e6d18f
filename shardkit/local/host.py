"""What a failover can do about the servers of an embedded cluster, from within its process.

Stops a server by force, makes it a standby again by pg_rewind or anew, and has PgBouncer send to
the new primary. Used by tests, by benchmarks, and by `shardkit local up`.
"""

from __future__ import annotations

import threading

from shardkit.errors import LocalServerError
from shardkit.local.cluster import LocalCluster
from shardkit.local.server import ServerKind

__all__ = ["LocalHost"]


class LocalHost:
    """The host of an embedded cluster.

    Args:
        local: the cluster, started by this process.
        fences: whether it may stop servers; tests leave that out to see what holds without.
        rejoins: whether it may make servers standbys again.
    """

    leads = True

    def __init__(self, local: LocalCluster, *, fences: bool = True, rejoins: bool = True) -> None:
        self._local = local
        self._fences = fences
        self.can_rejoin = rejoins
        self._lock = threading.Lock()

    def fence(self, physical: str, server: str) -> bool:
        """Stop a server: in good order when it answers, else by force."""
        if not self._fences:
            return False
        with self._lock:
            self._local.end_server(self._named(physical, server))
        return True

    def rejoin(self, physical: str, server: str, primary: str) -> None:
        """Make a server a standby of the primary."""
        with self._lock:
            self._local.rejoin_server(self._named(physical, server), self._named(physical, primary))

    def lead(self, physical: str, primary: str) -> None:
        """Have PgBouncer send to the primary."""
        with self._lock:
            self._local.lead(physical, self._named(physical, primary))

    def _named(self, physical: str, address: str) -> str:
        port = int(address.rpartition(":")[2])
        for server in self._local.servers:
            is_member = server.physical == physical and server.kind is ServerKind.POSTGRESQL
            if is_member and server.port == port:
                return server.name
        raise LocalServerError(f"{address}: no server of {physical} listens there")
