"""Indexes built and dropped CONCURRENTLY, so that nobody waits, and what a crash leaves of them.

Such a statement cannot run in a transaction, so its ledger row cannot commit with it. A row that
says what is begun commits before, and one that says it is done after; a rerun that finds the first
looks at the index: valid, it is what was begun; invalid, as after a kill, a failover or a
duplicate, it is dropped and built again. Called by `shardkit.ops.physical`.
Source: the PostgreSQL manual, CREATE INDEX, "Building Indexes Concurrently".
"""

from __future__ import annotations

import contextlib
from typing import Any

import psycopg
from psycopg import sql

from shardkit.ops.ledger import recorded
from shardkit.ops.revisions import Revision
from shardkit.ops.steps import Step, render
from shardkit.topology import schema_name

__all__ = ["run"]

Connection = psycopg.Connection[tuple[Any, ...]]


def run(
    connection: Connection, logical_shard: int, revision: Revision, step: Step, *, seconds: float
) -> None:
    """Do a step that is one such statement, and write it down.

    Args:
        connection: in autocommit mode.
        logical_shard: where.
        revision: whose step it is.
        step: what `shardkit.ops.steps` made of the statement.
        seconds: it may take; the statement waits for every transaction that is older than
            itself, while it holds nobody up.

    Raises:
        psycopg.Error: it failed; an invalid index that it left has been dropped.
    """
    assert step.index is not None
    index = sql.Identifier(schema_name(logical_shard), step.index)
    # No lock_timeout: what it waits for is the end of other transactions, and nobody waits for it,
    # since SHARE UPDATE EXCLUSIVE conflicts neither with reads nor with writes.
    connection.execute(f"SET statement_timeout = {round(seconds * 1000)}".encode())
    connection.execute("SET lock_timeout = 0")
    try:
        begun = connection.execute(
            sql.SQL("SELECT FROM {} WHERE revision = {} AND building = {} AND step = {}").format(
                sql.Identifier(schema_name(logical_shard), "shardkit_version"),
                revision.id,
                step.index,
                step.end - 1,
            )
        ).fetchone()
        valid = _is_valid(connection, index)
        if begun is None:
            _record(connection, logical_shard, recorded(revision, step, begun=step.index))
        if step.is_drop:
            if begun is None or valid is not None:
                connection.execute(render(step.statements[0], logical_shard).encode())
        else:
            if valid is False:
                _drop(connection, index)
                valid = None
            if begun is None or valid is None:
                _build(connection, render(step.statements[0], logical_shard), index)
        _record(connection, logical_shard, recorded(revision, step))
    finally:
        if not connection.closed:
            with contextlib.suppress(psycopg.Error):
                connection.execute("RESET statement_timeout")
                connection.execute("RESET lock_timeout")


def _build(connection: Connection, text: str, index: sql.Identifier) -> None:
    try:
        connection.execute(text.encode())
    except psycopg.Error:
        # An invalid index slows writes down and serves nobody.
        with contextlib.suppress(psycopg.Error):
            if not connection.closed and _is_valid(connection, index) is False:
                _drop(connection, index)
        raise


def _drop(connection: Connection, index: sql.Identifier) -> None:
    # SHARE UPDATE EXCLUSIVE on the table: it waits for another build, and for nobody else.
    connection.execute(sql.SQL("DROP INDEX CONCURRENTLY IF EXISTS {}").format(index))


def _is_valid(connection: Connection, index: sql.Identifier) -> bool | None:
    """Return whether an index is valid; None when there is none."""
    row = connection.execute(
        "SELECT indisvalid AND indisready FROM pg_index WHERE indexrelid = to_regclass(%s)",
        (index.as_string(None),),
    ).fetchone()
    return None if row is None else bool(row[0])


def _record(connection: Connection, logical_shard: int, statement: sql.Composable) -> None:
    connection.execute(render(statement.as_string(None), logical_shard).encode())
