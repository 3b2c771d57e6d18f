"""One transaction for each change of an ownership row: lock, decide, do, write down.

The row is locked before anything is decided, the decision is `shardkit.ops.moves.transitions`, and
what it asks for is done before COMMIT: a crash leaves all of it or nothing. Called by movers and
by failover, over direct connections with the login that owns the schemas.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import psycopg
from psycopg import errors as pg
from psycopg import sql

from shardkit.errors import OutcomeUnknownError, RefusedError, TryAgainError
from shardkit.gates import lsn_of
from shardkit.ids import MAX_AHEAD_MS, SEQUENCE_BITS
from shardkit.ops.blame import first_line, holders
from shardkit.ops.moves.transitions import Action, Decide, Event, Fence, Move, Row, Yield, step
from shardkit.ops.ownershiptables import TIMELINE
from shardkit.ownership import State
from shardkit.topology import schema_name

__all__ = ["LOCK_TIMEOUT", "Changed", "change", "journal", "now", "promote", "row_of", "writers"]

Connection = psycopg.Connection[tuple[Any, ...]]

LOCK_TIMEOUT: Final = 0.25
"""Seconds that a fence queues for a lock: whoever wants to write queues behind it meanwhile."""

_COLUMNS: Final = (
    "epoch, state, moved_to, move_id::text, attempt, "
    "pg_catalog.date_part('epoch', fenced_at), fence_timeline"
)

# A row lock: one change at a time.
_LOCKED: Final = f"SELECT {_COLUMNS} FROM shardkit.ownership WHERE logical_shard = %s FOR UPDATE"

_READ: Final = f"SELECT {_COLUMNS} FROM shardkit.ownership WHERE logical_shard = %s"

_WRITE: Final = """
INSERT INTO shardkit.ownership
    (logical_shard, epoch, state, moved_to, move_id, attempt, fenced_at, fence_timeline)
VALUES (%s, %s, %s, %s, %s, %s, to_timestamp(%s), %s)
ON CONFLICT (logical_shard) DO UPDATE SET epoch = excluded.epoch, state = excluded.state,
    moved_to = excluded.moved_to, move_id = excluded.move_id, attempt = excluded.attempt,
    fenced_at = excluded.fenced_at, fence_timeline = excluded.fence_timeline
"""

_CLOCK_ERROR_MS: Final = 250
"""How far the clocks of two servers may be apart, beyond the seconds that a failover takes."""

# A row lock. Ids are leased at most MAX_AHEAD_MS ahead of the clock of the server that leases.
_PASS_IDS: Final = (
    "UPDATE {} SET state = greatest(state, (shardkit.id_clock_ms() + "
    f"{MAX_AHEAD_MS + _CLOCK_ERROR_MS}) << {SEQUENCE_BITS})"
)

# Catalogues only. Always in this order, so that two that lock cannot deadlock.
_TABLES: Final = """
SELECT relname FROM pg_catalog.pg_class
WHERE relnamespace = %s::regnamespace AND relkind IN ('r', 'p') ORDER BY relname
"""

# Catalogues only. Owners, superusers and members of either have what no REVOKE takes.
_WRITERS: Final = """
SELECT r.role, min(c.relname), bool_or(w.rolsuper), bool_or(pg_has_role(w.oid, c.relowner, 'USAGE'))
FROM unnest(%(roles)s::name[]) AS r (role) JOIN pg_catalog.pg_roles AS w ON w.rolname = r.role,
    pg_catalog.pg_class AS c
WHERE c.relnamespace = %(schema)s::regnamespace AND c.relkind IN ('r', 'p')
    AND has_table_privilege(w.oid, c.oid, 'INSERT, UPDATE, DELETE, TRUNCATE')
    AND (%(granted)s OR w.rolsuper OR pg_has_role(w.oid, c.relowner, 'USAGE'))
GROUP BY r.role
"""


@dataclass(frozen=True, slots=True)
class Changed:
    """What has been committed.

    Attributes:
        before: the row until then; None where there was none.
        row: the row now.
        lsn: a log position after the commit, in bytes: whoever has replayed it has seen it.
    """

    before: Row | None
    row: Row
    lsn: int


def row_of(connection: Connection, logical_shard: int) -> Row | None:
    """Return the ownership row of a logical shard on a physical shard, or None."""
    return _row(connection.execute(_READ, (logical_shard,)).fetchone())


def now(connection: Connection) -> tuple[float, int]:
    """Return the time of a primary, in seconds, and its timeline."""
    # No lock.
    text = f"SELECT pg_catalog.date_part('epoch', pg_catalog.clock_timestamp()), {TIMELINE}"
    found = connection.execute(text.encode()).fetchone()
    assert found is not None, "one row"
    return float(found[0]), int(found[1])


def writers(connection: Connection, logical_shard: int, roles: Sequence[str]) -> dict[str, str]:
    """Return which logins a fence would not stop, and why; empty when it stops all of them.

    A pre-check of moves: such a login owns the tables, belongs to their owner, or is a superuser.

    Args:
        connection: to the primary.
        logical_shard: whose tables.
        roles: the logins of the application.
    """
    return _writers(connection, logical_shard, roles, granted=False)


def change(
    connection: Connection,
    logical_shard: int,
    event: Event | Callable[[float, int], Event],
    *,
    roles: Sequence[str] = (),
    lock_timeout: float = LOCK_TIMEOUT,
    note: Mapping[str, Any] | None = None,
) -> Changed:
    """Let an event happen to the ownership row of a logical shard, in one transaction.

    Args:
        connection: to the primary, in autocommit mode and with nothing open.
        logical_shard: its number.
        event: what is to happen; a function makes it of the server's time and timeline.
        roles: logins of the application: a fence is refused unless it stops every one of them.
        lock_timeout: seconds to queue for each lock.
        note: written into the journal of moves in the same transaction; None for nothing. For
            events of a move only.

    Raises:
        RefusedError: the row does not allow it, or a login would still write; nothing changed.
        TryAgainError: a lock was not granted in time; the error names who has it (retryable).
        OutcomeUnknownError: the answer to COMMIT was lost: look at the row again.
    """
    sent = False
    try:
        with connection.transaction():
            # LOCAL: both end with the transaction.
            connection.execute(
                f"SET LOCAL lock_timeout = {max(1, round(lock_timeout * 1000))};"
                "SET LOCAL synchronous_commit = on".encode()
            )
            before = _row(connection.execute(_LOCKED, (logical_shard,)).fetchone())
            if not isinstance(event, Event):
                event = event(*now(connection))
            decided = step(before, event)
            for action in decided.actions:
                _do(connection, logical_shard, action)
            if isinstance(event, Fence | Decide | Yield):
                _refuse_writers(connection, logical_shard, roles)
            if decided.row != before:
                connection.execute(_WRITE, (logical_shard, *_values(decided.row)))
            if note is not None:
                move: Move = event.move  # type: ignore[union-attr]  # as the docstring says
                journal(connection, logical_shard, move, type(event).__name__, detail=note)
            sent = True
        sent = False
        found = connection.execute("SELECT pg_catalog.pg_current_wal_insert_lsn()::text")
        [(lsn,)] = found.fetchall()
        return Changed(before, decided.row, lsn_of(lsn.encode()))
    except (pg.LockNotAvailable, pg.DeadlockDetected) as error:
        raise TryAgainError(
            f"no lock within {lock_timeout:g} s: {first_line(error)}",
            hint=holders(connection, logical_shard),
            logical_shard=logical_shard,
        ) from error
    except RefusedError as error:
        error.logical_shard = logical_shard
        raise
    except psycopg.OperationalError as error:
        if sent and (connection.closed or connection.broken):
            raise OutcomeUnknownError(
                "the answer to COMMIT was lost",
                logical_shard=logical_shard,
                hint="read the ownership row again, and repeat the step if it has not happened",
            ) from error
        raise


def promote(
    connection: Connection, *, server: str = "", detail: Mapping[str, Any] | None = None
) -> tuple[int, list[int]]:
    """Put a promoted primary in order: its timeline, the epochs of what it owns, its ids.

    The first transaction on a new primary; doing it again changes nothing. No id comes again that
    was leased where the promoted server did not hear of it.

    Args:
        connection: to it.
        server: its address, for `shardkit.failovers`.
        detail: what else is noted there.

    Returns:
        The timeline, and the logical shards whose epoch has grown.
    """
    with connection.transaction():
        # Not confirmed by standbys, which follow only now, and ask for the newest timeline.
        connection.execute("SET LOCAL synchronous_commit = local")
        # A row lock on the identity keeps two from doing it at once.
        found = connection.execute(
            f"SELECT timeline, {TIMELINE} FROM shardkit.identity FOR UPDATE".encode()
        ).fetchone()
        assert found is not None, "a primary that shardkit has set up"
        registered, timeline = found
        if registered == timeline:
            return timeline, []
        rows = (
            []
            if registered is None
            else connection.execute(
                "UPDATE shardkit.ownership SET epoch = epoch + 1 "
                "WHERE state IN ('active', 'fenced') RETURNING logical_shard"
            ).fetchall()
        )
        for (number,) in rows:
            connection.execute(
                sql.SQL(_PASS_IDS).format(sql.Identifier(schema_name(number), "shardkit_id_state"))
            )
        connection.execute("UPDATE shardkit.identity SET timeline = %s", (timeline,))
        connection.execute(
            "INSERT INTO shardkit.failovers (kind, server, timeline, detail) "
            "VALUES ('promoted', %s, %s, %s)",
            (server, timeline, json.dumps({"before": registered, **(detail or {})})),
        )
        return timeline, sorted(number for (number,) in rows)


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
    connection.execute(
        "INSERT INTO shardkit.move_journal (move_id, attempt, logical_shard, step, is_done, lsn, "
        "detail) VALUES (%s, %s, %s, %s, %s, pg_catalog.pg_current_wal_insert_lsn(), %s)",
        (move.id, move.attempt, logical_shard, name, is_done, json.dumps(detail or {})),
    )


def _do(connection: Connection, logical_shard: int, action: Action) -> None:
    match action:
        case Action.LOCK:
            schema = schema_name(logical_shard)
            names = [name for (name,) in connection.execute(_TABLES, (schema,))]
            # EXCLUSIVE: waits for writers under way, and lets readers pass. The state of ids is
            # among the tables, which a function leases with the rights of its owner.
            connection.execute(
                sql.SQL("LOCK TABLE {} IN EXCLUSIVE MODE").format(
                    sql.SQL(", ").join(sql.Identifier(schema, name) for name in names)
                )
            )
            # A transaction with an older snapshot would lease ids as if nothing had happened.
            connection.execute(
                sql.SQL("UPDATE {} SET state = state + 1").format(
                    sql.Identifier(schema, "shardkit_id_state")
                )
            )
        case Action.CLOSE_WRITES:
            connection.execute("SELECT shardkit.close_shard(%s, false)", (logical_shard,))
        case Action.CLOSE:
            connection.execute("SELECT shardkit.close_shard(%s, true)", (logical_shard,))
        case Action.OPEN:
            connection.execute("SELECT shardkit.open_shard(%s)", (logical_shard,))


def _refuse_writers(connection: Connection, logical_shard: int, roles: Sequence[str]) -> None:
    found = _writers(connection, logical_shard, roles, granted=True)
    if found:
        raise RefusedError(
            "a fence would not stop "
            + "; ".join(f"{role}, which {why}" for role, why in found.items()),
            hint="give the application a login of its own that owns nothing: docs/moves.md",
        )


def _writers(
    connection: Connection, logical_shard: int, roles: Sequence[str], *, granted: bool
) -> dict[str, str]:
    rows = connection.execute(
        _WRITERS,
        {"roles": list(roles), "schema": schema_name(logical_shard), "granted": granted},
    )
    return {
        role: "is a superuser" if is_super
        else f"owns {table}, or belongs to its owner" if owns
        else f"may write to {table}"
        for role, table, is_super, owns in rows
    }  # fmt: skip


def _row(found: tuple[Any, ...] | None) -> Row | None:
    if found is None:
        return None
    epoch, state, *others = found
    return Row(epoch, State(state), *others)


def _values(row: Row) -> tuple[Any, ...]:
    return (
        row.epoch,
        row.state.value,
        row.moved_to,
        row.move_id,
        row.attempt,
        row.fenced_at,
        row.fence_timeline,
    )
