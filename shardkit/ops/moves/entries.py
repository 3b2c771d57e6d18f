"""Lines of the journal of moves, as they are written; `shardkit.ops.moves.journal` reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import psycopg
from psycopg import sql

from shardkit.ops.moves.transitions import Move

__all__ = ["journal", "noted"]

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
