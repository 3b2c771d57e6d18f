"""The triggers of cached tables, completed after the revisions by `shardkit migrate apply`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import psycopg

from shardkit.derived import Cached
from shardkit.errors import MigrationError, TryAgainError
from shardkit.ops import cachetriggers
from shardkit.ops.apply import MigrationOutcome
from shardkit.ops.limits import Limits

__all__ = ["with_triggers"]


def with_triggers(
    outcome: MigrationOutcome,
    connections: Mapping[str, psycopg.Connection[Any]],
    cached: Cached,
    limits: Limits,
) -> MigrationOutcome:
    """Create what triggers cached tables lack, and return the outcome with what went wrong."""
    failed = dict(outcome.failed)
    if outcome.halted:
        return outcome  # logical shards that were not reached may lack the tables
    for name, connection in connections.items():
        if name in failed:
            continue
        # AccessShareLock.
        query = "SELECT logical_shard FROM shardkit.ownership WHERE state = 'active' ORDER BY 1"
        try:
            owned = [row[0] for row in connection.execute(query)]
            numbers = [number for number in owned if number not in outcome.laggards]
            cachetriggers.complete(
                connection,
                numbers,
                cached.tables,
                cached.watches,
                lock_timeout=limits.lock_timeout,
                attempts=limits.lock_attempts,
            )
        except psycopg.errors.LockNotAvailable as error:
            failed[name] = TryAgainError(
                f"no lock for the triggers of a cached table: {str(error).splitlines()[0]}"
            )
        except psycopg.Error as error:
            failed[name] = MigrationError(
                f"the triggers of cached tables: {str(error).strip().splitlines()[0]}",
                endpoint=name,
            )
    return replace(outcome, failed=failed)
