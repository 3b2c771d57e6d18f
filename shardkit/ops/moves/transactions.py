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
from shardkit.ops.blame import blockers, first_line
from shardkit.ops.moves.entries import noted
from shardkit.ops.moves.transitions import Action, Decide, Event, Fence, Move, Row, Yield, step
from shardkit.ops.ownershiptables import TIMELINE
from shardkit.ownership import State
from shardkit.topology import schema_name

__all__ = [
    "LOCK_TIMEOUT",
    "Changed",
    "change",
    "now",
    "promote",
    "rehearse",
    "row_of",
    "writers",
]

Connection = psycopg.Connection[tuple[Any, ...]]

LOCK_TIMEOUT: Final = 0.25
"""Seconds that a fence queues for a lock: whoever wants to write queues behind it meanwhile."""

_COLUMNS: Final = (
    "epoch, state, moved_to, move_id::text, attempt, "
    "pg_catalog.date_part('epoch', fenced_at), fence_timeline"
)

# A row lock: one change at a time. LOCAL: both settings end with the transaction.
_BEGIN: Final = f"""
BEGIN; SET LOCAL lock_timeout = {{lock_timeout}}; SET LOCAL synchronous_commit = on;
SELECT {_COLUMNS} FROM shardkit.ownership WHERE logical_shard = {{shard}} FOR UPDATE;
SELECT pg_catalog.date_part('epoch', pg_catalog.clock_timestamp()), {TIMELINE}
"""

_READ: Final = f"SELECT {_COLUMNS} FROM shardkit.ownership WHERE logical_shard = %s"

_WRITE: Final = """
INSERT INTO shardkit.ownership
    (logical_shard, epoch, state, moved_to, move_id, attempt, fenced_at, fence_timeline)
VALUES ({}, {}, {}, {}, {}::uuid, {}, to_timestamp({}), {})
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

# Every table in one order, so that two that lock cannot deadlock. SHARE UPDATE EXCLUSIVE first: it
# keeps autovacuum out, which makes way after `deadlock_timeout`, and no writer waits behind it.
# EXCLUSIVE then: waits for writers under way, and lets readers pass. The state of ids is among the
# tables, which a function leases with the rights of its owner; its row is touched, since a
# transaction with an older snapshot would lease ids as if nothing had happened.
_LOCK: Final = """
DO $$
DECLARE
    tables text := (SELECT pg_catalog.string_agg(pg_catalog.format('%I.%I', {schema}, c.relname),
        ', ' ORDER BY c.relname) FROM pg_catalog.pg_class AS c
        WHERE c.relnamespace = {schema}::pg_catalog.regnamespace AND c.relkind IN ('r', 'p'));
BEGIN
    SET LOCAL lock_timeout = {patience};
    EXECUTE 'LOCK TABLE ' || tables || ' IN SHARE UPDATE EXCLUSIVE MODE';
    SET LOCAL lock_timeout = {lock_timeout};
    EXECUTE 'LOCK TABLE ' || tables || ' IN EXCLUSIVE MODE';
END $$;
UPDATE {ids} SET state = state + 1 RETURNING state
"""

_PATIENCE: Final = 2.0
"""Seconds for which a fence waits for autovacuum, in nobody's way."""

_DONE: Final = "COMMIT; SELECT pg_catalog.pg_current_wal_insert_lsn()::text"

# Catalogues only. Owners, superusers and members of either have what no REVOKE takes.
_WRITERS: Final = """
SELECT r.role, min(c.relname), bool_or(w.rolsuper), bool_or(pg_has_role(w.oid, c.relowner, 'USAGE'))
FROM unnest({roles}::name[]) AS r (role) JOIN pg_catalog.pg_roles AS w ON w.rolname = r.role,
    pg_catalog.pg_class AS c
WHERE c.relnamespace = {schema}::regnamespace AND c.relkind IN ('r', 'p')
    AND has_table_privilege(w.oid, c.oid, 'INSERT, UPDATE, DELETE, TRUNCATE')
    AND ({granted} OR w.rolsuper OR pg_has_role(w.oid, c.relowner, 'USAGE'))
GROUP BY r.role
"""


@dataclass(frozen=True, slots=True)
class Changed:
    """What has been committed.

    Attributes:
        before: the row until then; None where there was none.
        row: the row now.
        lsn: a log position after the commit, in bytes: whoever has replayed it has seen it.
        state: of ids, after a lock: the last that was written before the tables were closed.
    """

    before: Row | None
    row: Row
    lsn: int
    state: int | None = None


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
    return _why(connection.execute(_writers_of(logical_shard, roles, granted=False)).fetchall())


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
    number = logical_shard
    try:
        begin = _BEGIN.format(lock_timeout=_milliseconds(lock_timeout), shard=int(number))
        rows, clock = _sets(connection.execute(begin.encode()))
        before = _row(rows[0] if rows else None)
        if not isinstance(event, Event):
            event = event(float(clock[0][0]), int(clock[0][1]))
        decided = step(before, event)
        state = None
        script = [_doing(number, action, lock_timeout) for action in decided.actions]
        if isinstance(event, Fence | Decide | Yield):
            script.append(_writers_of(number, roles, granted=True))
        if decided.row != before:
            script.append(sql.SQL(_WRITE).format(number, *_values(decided.row)))
        if note is not None:
            move: Move = event.move  # type: ignore[union-attr]  # as the docstring says
            script.append(noted(number, move, type(event).__name__, detail=note))
        if script:  # in one round trip
            found = _sets(connection.execute(sql.SQL(";").join(script)))
            if isinstance(event, Fence | Decide | Yield):
                _refuse(found[-1])
            if Action.LOCK in decided.actions:
                state = int(found[0][0][0])
        sent = True
        [(lsn,)] = _sets(connection.execute(_DONE))[-1]
        return Changed(before, decided.row, lsn_of(lsn.encode()), state)
    except (pg.LockNotAvailable, pg.DeadlockDetected) as error:
        connection.rollback()
        raise TryAgainError(
            f"no lock within {lock_timeout:g} s: {first_line(error)}",
            hint=blockers(connection, logical_shard),
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
    finally:
        if not connection.closed and connection.info.transaction_status:
            connection.rollback()


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
        connection.execute(
            "SET LOCAL transaction_read_only = off; SET LOCAL synchronous_commit = local"
        )
        # A row lock on the identity keeps two from doing it at once.
        found = connection.execute(
            f"SELECT timeline, {TIMELINE}, pg_catalog.pg_snapshot_xmax("
            "pg_catalog.pg_current_snapshot())::text::bigint % 4294967296 "
            "FROM shardkit.identity FOR UPDATE".encode()
        ).fetchone()
        assert found is not None, "a primary that shardkit has set up"
        registered, timeline, next_xid = found
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
        noted = {"before": registered, "next_xid": next_xid, **(detail or {})}
        connection.execute(
            "INSERT INTO shardkit.failovers (kind, server, timeline, detail) "
            "VALUES ('promoted', %s, %s, %s)",
            (
                server,
                timeline,
                json.dumps(noted),
            ),
        )
        return timeline, sorted(number for (number,) in rows)


def rehearse(connection: Connection, logical_shard: int, *actions: Action) -> None:
    """Do what a fence or an activation will do, and take it back: the next time it is quick.

    A server process learns its catalogue and compiles functions at their first use. Locks no table,
    and changes nothing.
    """
    script = [_doing(logical_shard, action, 0.0) for action in actions]
    with connection.transaction(force_rollback=True):
        connection.execute(sql.SQL(";").join([sql.SQL("SET LOCAL lock_timeout = 100"), *script]))


def _doing(logical_shard: int, action: Action, lock_timeout: float) -> sql.Composed:
    """Return the SQL of what the transaction of a change does besides."""
    schema = schema_name(logical_shard)
    match action:
        case Action.LOCK:
            return sql.SQL(_LOCK).format(
                schema=schema,
                ids=sql.Identifier(schema, "shardkit_id_state"),
                patience=_milliseconds(max(lock_timeout, _PATIENCE)),
                lock_timeout=_milliseconds(lock_timeout),
            )
        case Action.CLOSE_WRITES:
            return sql.SQL("SELECT shardkit.close_shard({}, false)").format(logical_shard)
        case Action.CLOSE:
            return sql.SQL("SELECT shardkit.close_shard({}, true)").format(logical_shard)
        case Action.OPEN:
            return sql.SQL("SELECT shardkit.open_shard({})").format(logical_shard)


def _refuse(rows: Sequence[tuple[Any, ...]]) -> None:
    if found := _why(rows):
        raise RefusedError(
            "a fence would not stop "
            + "; ".join(f"{role}, which {why}" for role, why in found.items()),
            hint="give the application a login of its own that owns nothing: docs/moves.md",
        )


def _writers_of(logical_shard: int, roles: Sequence[str], *, granted: bool) -> sql.Composed:
    return sql.SQL(_WRITERS).format(
        roles=list(roles), schema=schema_name(logical_shard), granted=granted
    )


def _why(rows: Sequence[tuple[Any, ...]]) -> dict[str, str]:
    return {
        role: "is a superuser" if is_super
        else f"owns {table}, or belongs to its owner" if owns
        else f"may write to {table}"
        for role, table, is_super, owns in rows
    }  # fmt: skip


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def _sets(cursor: psycopg.Cursor[tuple[Any, ...]]) -> list[list[tuple[Any, ...]]]:
    """Return the rows of every statement of a script that has any."""
    found = []
    while True:
        if cursor.description is not None:
            found.append(cursor.fetchall())
        if not cursor.nextset():
            return found


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
