"""Ownership rows as SQL, and back: what `shardkit.ops.moves.transactions` sends. Pure."""

from __future__ import annotations

from typing import Any, Final

import psycopg

from shardkit.ops.moves.transitions import Row
from shardkit.ops.ownershiptables import TIMELINE
from shardkit.ownership import State

__all__ = ["BEGIN", "READ", "STILL", "WRITE", "row", "sets", "values"]

_COLUMNS: Final = (
    "epoch, state, moved_to, move_id::text, attempt, "
    "pg_catalog.date_part('epoch', fenced_at), fence_timeline"
)

# A row lock: one change at a time. LOCAL: both settings end with the transaction.
BEGIN: Final = f"""
BEGIN; SET LOCAL lock_timeout = {{lock_timeout}}; SET LOCAL synchronous_commit = on;
SELECT {_COLUMNS} FROM shardkit.ownership WHERE logical_shard = {{shard}} FOR UPDATE;
SELECT pg_catalog.date_part('epoch', pg_catalog.clock_timestamp()), {TIMELINE}
"""

READ: Final = f"SELECT {_COLUMNS} FROM shardkit.ownership WHERE logical_shard = %s"

WRITE: Final = """
INSERT INTO shardkit.ownership
    (logical_shard, epoch, state, moved_to, move_id, attempt, fenced_at, fence_timeline)
VALUES ({}, {}, {}, {}, {}::uuid, {}, to_timestamp({}), {})
ON CONFLICT (logical_shard) DO UPDATE SET epoch = excluded.epoch, state = excluded.state,
    moved_to = excluded.moved_to, move_id = excluded.move_id, attempt = excluded.attempt,
    fenced_at = excluded.fenced_at, fence_timeline = excluded.fence_timeline
"""

# A row lock. Whoever has seen a row decides by it, and nothing is done if it is another one by now.
STILL: Final = f"""
BEGIN; SET LOCAL lock_timeout = {{lock_timeout}}; SET LOCAL synchronous_commit = on;
DO $still$ BEGIN
    PERFORM FROM shardkit.ownership WHERE logical_shard = {{shard}}
        AND ROW({_COLUMNS}) IS NOT DISTINCT FROM ROW({{values}})
        AND coalesce({{timeline}} = {TIMELINE}, true) FOR UPDATE;
    IF NOT FOUND THEN RAISE EXCEPTION 'it has changed' USING ERRCODE = '40001'; END IF;
END $still$
"""


def sets(cursor: psycopg.Cursor[tuple[Any, ...]]) -> list[list[tuple[Any, ...]]]:
    """Return the rows of every statement of a script that has any."""
    found = []
    while True:
        if cursor.description is not None:
            found.append(cursor.fetchall())
        if not cursor.nextset():
            return found


def row(found: tuple[Any, ...] | None) -> Row | None:
    """Return the row that was read, or None for none."""
    if found is None:
        return None
    epoch, state, *others = found
    return Row(epoch, State(state), *others)


def values(row: Row) -> tuple[Any, ...]:
    """Return a row as it is written, without its number."""
    return (
        row.epoch,
        row.state.value,
        row.moved_to,
        row.move_id,
        row.attempt,
        row.fenced_at,
        row.fence_timeline,
    )
