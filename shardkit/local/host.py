"""What a failover can do about the servers of an embedded cluster, from within its process.

Stops a server by force, makes it a standby again by pg_rewind or anew, and has PgBouncer send to
the new primary. Used by tests, by benchmarks, and by `shardkit local up`.
"""

from __future__ import annotations

import logging
import threading
from typing import Final

from shardkit.errors import LocalServerError
from shardkit.local.cluster import LocalCluster
from shardkit.local.server import ServerKind
from shardkit.ops.failover.lost import LostRow

__all__ = ["LocalHost"]

_LOG: Final = logging.getLogger(__name__)


class LocalHost:
    """The host of an embedded cluster.

    Args:
        local: the cluster, started by this process.
        fences: whether it may stop servers; tests leave that out to see what holds without.
        rejoins: whether it may make servers standbys again.
        lists: whether it lists what is lost before.

    Attributes:
        lost: what the servers had that it has made anew, by name, the last time.
    """

    leads = True

    def __init__(
        self,
        local: LocalCluster,
        *,
        fences: bool = True,
        rejoins: bool = True,
        lists: bool = False,
    ) -> None:
        self._local = local
        self._fences = fences
        self.can_rejoin = rejoins
        self._lists = lists
        self.lost: dict[str, list[LostRow]] = {}
        self._lock = threading.Lock()

    def fence(self, physical: str, server: str) -> bool:
        """Stop a server: in good order when it answers, else by force."""
        if not self._fences:
            return False
        with self._lock:
            self._local.end_server(self._named(physical, server))
        return True

    def rejoin(self, physical: str, server: str, primary: str, *, anew: bool = False) -> None:
        """Make a server a standby of the primary."""
        name, leader = self._named(physical, server), self._named(physical, primary)
        with self._lock:
            if self._lists:
                self._local.stop_server(name)
                self.lost[name] = self._local.lost(name, leader)
                if self.lost[name]:
                    _LOG.warning("%d rows of %s are lost", len(self.lost[name]), name)
            self._local.rejoin_server(name, leader, anew=anew)

    def lead(self, physical: str, primary: str) -> None:
        """Have PgBouncer send to the primary."""
        with self._lock:
            self._local.lead(physical, self._named(physical, primary))

    def revive(self) -> list[str]:
        """Start every PgBouncer again that ended by itself; return their names."""
        with self._lock:
            return self._local.revive()

    def _named(self, physical: str, address: str) -> str:
        port = int(address.rpartition(":")[2])
        for server in self._local.servers:
            is_member = server.physical == physical and server.kind is ServerKind.POSTGRESQL
            if is_member and server.port == port:
                return server.name
        raise LocalServerError(f"{address}: no server of {physical} listens there")
