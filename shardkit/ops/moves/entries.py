"""Lines of the journal of moves, as they are written; `shardkit.ops.moves.journal` reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import psycopg
from psycopg import sql

from shardkit.ops.moves.transitions import Move

__all__ = ["KEPT", "journal", "noted", "prune"]

KEPT: Final = 4
"""Moves of one logical shard whose lines a server keeps, the present one among them."""

# A row lock on each line that goes. What the present move needs stays however old it is.
_PRUNE: Final = """
DELETE FROM shardkit.move_journal WHERE logical_shard = %(shard)s
    AND move_id <> ALL (%(needed)s::uuid[])
    AND move_id NOT IN (SELECT move_id FROM shardkit.move_journal WHERE logical_shard = %(shard)s
        GROUP BY move_id ORDER BY max(entry) DESC LIMIT %(kept)s)
"""

Connection = psycopg.Connection[tuple[Any, ...]]


def journal(
    connection: Connection,
    logical_shard: int,
    move: Move,
    name: str,
    *,
    is_done: bool = True,
    detail: Mapping[str, Any] | None = None,
) -> None:
    """Write into the journal of moves that a step begins, or is done.

    Args:
        connection: to the primary of the target.
        logical_shard: that is moved.
        move: which attempt.
        name: of the step.
        is_done: False before it, True after it.
        detail: what a resume needs to know.
    """
    connection.execute(noted(logical_shard, move, name, is_done=is_done, detail=detail))


def noted(
    logical_shard: int,
    move: Move,
    name: str,
    *,
    is_done: bool = True,
    detail: Mapping[str, Any] | None = None,
) -> sql.Composed:
    """Return the statement of `journal`."""
    return sql.SQL(
        "INSERT INTO shardkit.move_journal (move_id, attempt, logical_shard, step, is_done, lsn, "
        "detail) VALUES ({}, {}, {}, {}, {}, pg_catalog.pg_current_wal_insert_lsn(), {})"
    ).format(move.id, move.attempt, logical_shard, str(name), is_done, json.dumps(detail or {}))


def prune(connection: Connection, logical_shard: int, needed: Sequence[str]) -> int:
    """Forget the oldest moves of a logical shard that are over; return how many lines went.

    Only one move can have a logical shard, so all others that the journal knows are over.

    Args:
        connection: to the primary of the target, whose row this move has claimed.
        logical_shard: that is moved.
        needed: ids of the move, and of the one that it takes back.
    """
    given = {"shard": logical_shard, "needed": list(needed), "kept": KEPT}
    return connection.execute(_PRUNE, given).rowcount
