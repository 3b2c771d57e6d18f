"""DDL and moves exclude each other: who may change the tables of a logical shard, and who may not.

Two names, which every part of shardkit that needs either uses:

- `MIGRATION_KEY`, an advisory lock on each primary. A migration holds it in its session, alone,
  from before it reads the ledgers until its end; it goes when the runner does, however it ends.
- `shardkit.ddl_locks`, a table on each primary with a row for each logical shard whose tables must
  stay as they are. A move takes one on its source for as long as it lasts, and it outlives the
  mover: what is copied half is no more fit for DDL when nobody is at work.

A row is taken under the shared advisory lock, so either the migration sees the row and leaves that
logical shard alone, or the row is not had while the migration runs. Moves of one server do not
keep each other out. Called by `shardkit.ops.primaries` and by moves.
"""

from __future__ import annotations

from typing import Any

import psycopg

from shardkit.errors import RefusedError, TryAgainError

__all__ = ["MIGRATION_KEY", "release", "take"]

MIGRATION_KEY = 0x7368_6172_646B_6974
"""Key of the advisory lock that a migration holds on each primary: "shardkit" in ASCII."""


def take(
    connection: psycopg.Connection[Any], logical_shard: int, *, holder: str, reason: str
) -> None:
    """Keep migrations away from a logical shard until `release`; again by the same holder is fine.

    Args:
        connection: to the primary that owns it, with the admin login, outside a transaction.
        logical_shard: which.
        holder: who asks, such as the id of a move; the same one releases it.
        reason: what migrations tell their users.

    Raises:
        TryAgainError: a migration is at work on this server (retryable).
        RefusedError: somebody else has it.
    """
    with connection.transaction():
        # Ends with the transaction: a row that is committed is seen by every later migration.
        free = connection.execute(
            "SELECT pg_try_advisory_xact_lock_shared(%s)", (MIGRATION_KEY,)
        ).fetchone()
        if not free or not free[0]:
            raise TryAgainError(
                "a migration is at work on the server of this logical shard",
                hint="wait for `shardkit migrate` to end",
                logical_shard=logical_shard,
            )
        # A row lock on the logical shard's own row.
        row = connection.execute(
            "INSERT INTO shardkit.ddl_locks AS l (logical_shard, holder, reason) "
            "VALUES (%s, %s, %s) ON CONFLICT (logical_shard) DO UPDATE SET holder = l.holder "
            "RETURNING holder, reason",
            (logical_shard, holder, reason),
        ).fetchone()
        if row is not None and row[0] != holder:
            raise RefusedError(
                f"its DDL lock is held by {row[0]}: {row[1]}",
                hint="wait for it to end; the row is in shardkit.ddl_locks",
                logical_shard=logical_shard,
            )


def release(connection: psycopg.Connection[Any], logical_shard: int, *, holder: str) -> bool:
    """Let migrations at a logical shard again; return whether the holder had it."""
    done = connection.execute(
        "DELETE FROM shardkit.ddl_locks WHERE logical_shard = %s AND holder = %s",
        (logical_shard, holder),
    )
    return done.rowcount == 1
