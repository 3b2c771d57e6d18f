"""How long a migration may take and hold others up. Source: docs/migrations.md."""

from __future__ import annotations

from dataclasses import dataclass

from shardkit.ops.guard import SMALL_BYTES

__all__ = ["Limits"]


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a transaction may take and hold others up.

    Attributes:
        lock_timeout: seconds to queue for a lock; whoever queues behind waits as long.
        statement_timeout: seconds one statement may run.
        lock_attempts: times per logical shard that a transaction is tried, or not even tried
            since whoever held a lock the last time still does.
        longest_pause: upper bound of the jittered seconds between two attempts.
        connections: transactions at once per physical shard.
        patience: seconds to wait for another runner's session lock; a server needs a moment to
            notice that a killed runner is gone.
        index_timeout: seconds that building one index CONCURRENTLY may take.
        max_lag_bytes: of log a replica may have left to replay while the run goes on; None for
            no such rule.
        lag_patience: seconds to wait for it before the run halts.
        small_bytes: size up to which a table may be scanned or written anew under a lock.
        backfill_seconds: that a batch of a backfill should take; whoever wants one of its rows
            waits as long.
        backfill_rate: rows a second that backfills go through on a physical shard; None for no
            bound.
    """

    lock_timeout: float = 0.3
    statement_timeout: float = 60.0
    lock_attempts: int = 30
    longest_pause: float = 1.0
    connections: int = 4
    patience: float = 2.0
    index_timeout: float = 3600.0
    max_lag_bytes: int | None = 64 << 20
    lag_patience: float = 60.0
    small_bytes: int = SMALL_BYTES
    backfill_seconds: float = 0.1
    backfill_rate: float | None = None
