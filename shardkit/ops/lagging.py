"""Whether the servers bear more of a migration: how far the replicas are behind.

Asked before every wave and between round trips of one. Source: docs/migrations.md.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import psycopg

from shardkit.clock import SYSTEM

__all__ = ["LagRule"]

# Takes no lock. A replica that is connected and has not replayed the log; those that are gone are
# for `shardkit status` to report, and DDL does not make them worse.
_LAG = """
SELECT coalesce(max(pg_wal_lsn_diff(pg_current_wal_lsn(), replay_lsn)), 0)::bigint
FROM pg_stat_replication WHERE state IN ('streaming', 'catchup')
"""

_PAUSE = 0.2
_BETWEEN = 1.0


@dataclass(slots=True)
class LagRule:
    """The rule of one physical shard.

    Attributes:
        connection: to its primary.
        max_lag_bytes: of log that a replica may have left to replay; None for no rule.
        patience: seconds to wait for it to be less, before the run is halted.
    """

    connection: psycopg.Connection[Any]
    max_lag_bytes: int | None
    patience: float
    _next: float = 0.0

    def wait(self, stop: threading.Event, *, now: bool = False) -> str | None:
        """Wait until all is well, and return None; else what is not well.

        Args:
            stop: set when the run ends, which ends the wait.
            now: ask even if it was asked a moment ago.
        """
        if self.max_lag_bytes is None or (not now and SYSTEM.monotonic() < self._next):
            return None
        until = SYSTEM.monotonic() + self.patience
        while (lag := self._lag()) > self.max_lag_bytes:
            if SYSTEM.monotonic() >= until or stop.wait(_PAUSE):
                return f"a replica is {lag} bytes of log behind, more than {self.max_lag_bytes}"
        self._next = SYSTEM.monotonic() + _BETWEEN
        return None

    def _lag(self) -> int:
        row = self.connection.execute(_LAG).fetchone()
        return int(row[0]) if row else 0
