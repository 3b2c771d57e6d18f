"""One transaction for each change of an ownership row: lock, decide, do, write down.

The row is locked before anything is decided, the decision is `shardkit.ops.moves.transitions`, and
what it asks for is done before COMMIT: a crash leaves all of it or nothing. Called by movers and
by failover, over direct connections with the login that owns the schemas.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import psycopg
from psycopg import errors as pg
from psycopg import sql

from shardkit.errors import OutcomeUnknownError, RefusedError, TryAgainError
from shardkit.gates import lsn_of
from shardkit.ops.blame import blockers, first_line
from shardkit.ops.moves import texts
from shardkit.ops.moves.entries import noted
from shardkit.ops.moves.promotions import promote
from shardkit.ops.moves.transitions import Action, Decide, Event, Fence, Move, Row, Yield, step
from shardkit.ops.ownershiptables import TIMELINE
from shardkit.topology import schema_name

__all__ = [
    "LOCK_TIMEOUT",
    "Changed",
    "Seen",
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

_CLOSING: Final = Fence | Decide | Yield
"""After these nobody may write."""

_PATIENCE: Final = 2.0
"""Seconds for which a fence waits for autovacuum, in nobody's way."""

_NONE_WRITES: Final = """
DO $none$ BEGIN IF EXISTS ({writers}) THEN
    RAISE EXCEPTION 'somebody may write' USING ERRCODE = '40001'; END IF;
END $none$
"""

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
        found: what `then` has returned; None where it was not run.
    """

    before: Row | None
    row: Row
    lsn: int
    state: int | None = None
    found: tuple[Any, ...] | None = None


@dataclass(frozen=True, slots=True)
class Seen:
    """What was last seen of a server, to decide by while it is still so.

    Attributes:
        row: the ownership row.
        at: seconds of the server's clock.
        timeline: of the server; None where the event does not depend on it.
    """

    row: Row
    at: float = 0.0
    timeline: int | None = None


def row_of(connection: Connection, logical_shard: int) -> Row | None:
    """Return the ownership row of a logical shard on a physical shard, or None."""
    return texts.row(connection.execute(texts.READ, (logical_shard,)).fetchone())


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
    seen: Seen | None = None,
    then: sql.Composed | None = None,
) -> Changed:
    """Let an event happen to the ownership row of a logical shard, in one transaction.

    In one round trip where the row and the timeline are still as they were seen; else in three.

    Args:
        connection: to the primary, in autocommit mode and with nothing open.
        logical_shard: its number.
        event: what is to happen; a function makes it of the server's time and timeline.
        roles: logins of the application: a fence is refused unless it stops every one of them.
        lock_timeout: seconds to queue for each lock.
        note: written into the journal of moves in the same transaction; None for nothing. For
            events of a move only.
        seen: decided by this first, and nothing is done of that unless it is still so.
        then: a query of one row, run in the same round trip right after COMMIT.

    Raises:
        RefusedError: the row does not allow it, or a login would still write; nothing changed.
        TryAgainError: a lock was not granted in time; the error names who has it (retryable).
        OutcomeUnknownError: the answer to COMMIT was lost: look at the row again.
    """
    sent = False
    number = logical_shard
    try:
        if seen is not None:
            sent = True
            now_ = event if isinstance(event, Event) else event(seen.at, seen.timeline or 0)
            with suppress(pg.SerializationFailure, RefusedError):
                return _at_once(connection, number, now_, roles, lock_timeout, note, seen, then)
            sent = False
            connection.rollback()
        begin = texts.BEGIN.format(lock_timeout=_milliseconds(lock_timeout), shard=int(number))
        rows, clock = texts.sets(connection.execute(begin.encode()))
        before = texts.row(rows[0] if rows else None)
        if not isinstance(event, Event):
            event = event(float(clock[0][0]), int(clock[0][1]))
        decided = step(before, event)
        state = None
        script = [_doing(number, action, lock_timeout) for action in decided.actions]
        if isinstance(event, _CLOSING):
            script.append(_writers_of(number, roles, granted=True))
        script += _written(number, event, decided.row, before, note)
        if script:  # in one round trip
            found = texts.sets(connection.execute(sql.SQL(";").join(script)))
            if isinstance(event, _CLOSING):
                _refuse(found[-1])
            if Action.LOCK in decided.actions:
                state = int(found[0][0][0])
        sent = True
        [(lsn,)] = texts.sets(connection.execute(_DONE))[-1]
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


def _at_once(  # noqa: PLR0917  all that `change` is given
    connection: Connection,
    number: int,
    event: Event,
    roles: Sequence[str],
    lock_timeout: float,
    note: Mapping[str, Any] | None,
    seen: Seen,
    then: sql.Composed | None,
) -> Changed:
    """Do all of a change in one round trip.

    Raises:
        psycopg.errors.SerializationFailure: the row is another one, or somebody could still write;
            nothing was done.
        RefusedError: the row that is known does not allow it.
    """
    decided = step(seen.row, event)
    script: list[sql.Composable] = [
        sql.SQL(texts.STILL).format(
            lock_timeout=_milliseconds(lock_timeout),
            shard=number,
            values=sql.SQL(", ").join(map(sql.Literal, texts.values(seen.row))),
            timeline=seen.timeline,
        ),
        *(_doing(number, action, lock_timeout) for action in decided.actions),
    ]
    if isinstance(event, _CLOSING):
        writers_of = _writers_of(number, roles, granted=True)
        script.append(sql.SQL(_NONE_WRITES).format(writers=writers_of))
    script += _written(number, event, decided.row, seen.row, note)
    script += [sql.SQL(_DONE), *filter(None, [then])]
    found = texts.sets(connection.execute(sql.SQL(";").join(script)))
    last = found.pop()[0] if then is not None else None
    state = int(found[0][0][0]) if Action.LOCK in decided.actions else None
    return Changed(seen.row, decided.row, lsn_of(found[-1][0][0].encode()), state, last)


def _written(
    number: int, event: Event, row: Row, before: Row | None, note: Mapping[str, Any] | None
) -> list[sql.Composed]:
    """Return the SQL that writes a row and a line of the journal, as far as there is need."""
    script = []
    if row != before:
        script.append(sql.SQL(texts.WRITE).format(number, *texts.values(row)))
    if note is not None:
        move: Move = event.move  # type: ignore[union-attr]  # of a move, as `change` says
        script.append(noted(number, move, type(event).__name__, detail=note))
    return script


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
