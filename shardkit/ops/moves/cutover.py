"""What happens while nobody can write: drain, sequences, and two frozen snapshots for later.

As few round trips as there can be, and none whose time grows with the logical shard. The fence
raises the state of ids in its own transaction, the last one that writes to the tables: whoever has
that row on the target has everything. Called by the driver; decides nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import psycopg
from psycopg import sql

from shardkit.clock import SYSTEM
from shardkit.gates import lsn_of
from shardkit.topology import schema_name

__all__ = [
    "MARGIN",
    "Left",
    "flushed",
    "has_standbys",
    "land",
    "leaving",
    "left",
    "reached",
    "snapshot",
    "touch",
]

Connection = psycopg.Connection[Any]

MARGIN: Final = 1000
"""Numbers that a sequence skips at a hand-over: more than any session may have in its cache."""

# `pg_sequence_last_value` is NULL for one that was never used.
_LEFT: Final = """
SELECT (SELECT state FROM {ids}),
    (SELECT json_object_agg(s.relname, s.value) FROM (
        SELECT c.relname, pg_sequence_last_value(q.seqrelid) AS value
        FROM pg_sequence AS q JOIN pg_class AS c ON c.oid = q.seqrelid
        WHERE c.relnamespace = {schema}::regnamespace) AS s WHERE s.value IS NOT NULL),
    pg_current_wal_flush_lsn()::text
"""

# Looks every millisecond, beside the apply: each look is of its own snapshot.
_ARRIVED: Final = """
DO $arrived$
DECLARE until timestamptz := clock_timestamp() + {seconds} * interval '1 s';
BEGIN
    WHILE (SELECT state < {state} FROM {ids}) LOOP
        IF clock_timestamp() > until THEN
            RAISE EXCEPTION 'it has not arrived' USING ERRCODE = 'query_canceled';
        END IF;
        PERFORM pg_sleep(0.001);
    END LOOP;
END $arrived$
"""

# Past the cache of a session, and downwards for a sequence that counts down; at its end it stays.
_SEQUENCES: Final = """
SELECT setval(q.seqrelid, CASE
    WHEN q.seqincrement > 0 THEN least(q.seqmax, s.value::bigint
        + least(q.seqincrement * greatest({margin}, 2 * q.seqcache), q.seqmax - s.value::bigint))
    ELSE greatest(q.seqmin, s.value::bigint
        + greatest(q.seqincrement * greatest({margin}, 2 * q.seqcache),
            q.seqmin - s.value::bigint)) END)
FROM json_each_text({values}) AS s (name, value)
    JOIN pg_sequence AS q ON q.seqrelid = to_regclass(format('%I.%I', {schema}::text, s.name))
"""

_POLLS: Final = (0.0005, 0.001, 0.002)

# No lock. A replica that is connected may be promoted; subscribers use logical slots.
_STANDBYS: Final = """
SELECT FROM pg_stat_replication AS r
WHERE NOT EXISTS (SELECT FROM pg_replication_slots AS s
    WHERE s.active_pid = r.pid AND s.slot_type = 'logical') LIMIT 1
"""

_FLUSHED: Final = """
SELECT coalesce(bool_and(r.flush_lsn >= %s::pg_lsn), true)
FROM pg_stat_replication AS r
WHERE r.state = 'streaming'
    AND NOT EXISTS (SELECT FROM pg_replication_slots AS s
        WHERE s.active_pid = r.pid AND s.slot_type = 'logical')
"""


@dataclass(frozen=True, slots=True)
class Left:
    """What the source says after the fence, of what is to arrive.

    Attributes:
        state: of ids; the target has everything once it has this.
        sequences: last value of each that was used, by name.
        lsn: of its log.
    """

    state: int
    sequences: Mapping[str, int]
    lsn: int


def leaving(logical_shard: int) -> sql.Composed:
    """Return the query of what the source leaves behind; run after the fence, and by itself."""
    schema = schema_name(logical_shard)
    return sql.SQL(_LEFT).format(ids=sql.Identifier(schema, "shardkit_id_state"), schema=schema)


def left(row: tuple[Any, ...]) -> Left:
    """Return what the query of `leaving` has found."""
    return Left(row[0], row[1] or {}, lsn_of(row[2].encode()))


def snapshot(connection: Connection) -> None:
    """Begin a transaction whose snapshot is of now; it stays open."""
    connection.execute(
        "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SELECT 1 FROM pg_class LIMIT 1"
    )


def touch(connection: Connection, logical_shard: int) -> int:
    """Change a row of the source that nobody reads, and return what the target will have then."""
    row = connection.execute(
        sql.SQL("UPDATE {} SET state = state + 1 RETURNING state").format(
            sql.Identifier(schema_name(logical_shard), "shardkit_id_state")
        )
    ).fetchone()
    assert row is not None, "one row"
    return int(row[0])


def reached(connection: Connection, logical_shard: int, state: int, seconds: float) -> float | None:
    """Wait until the target has what the source had; return how long it took, or None if not.

    Args:
        connection: to the target.
        logical_shard: which.
        state: of ids, from `touch`.
        seconds: for how long to wait at most.
    """
    query = sql.SQL("SELECT state >= %s FROM {}").format(
        sql.Identifier(schema_name(logical_shard), "shardkit_id_state")
    )
    began = SYSTEM.monotonic()
    n = 0
    while True:
        row = connection.execute(query, (state,)).fetchone()
        took = SYSTEM.monotonic() - began
        if row == (True,):
            return took
        if took > seconds:
            return None
        SYSTEM.sleep(_POLLS[min(n, len(_POLLS) - 1)])
        n += 1


def land(
    connection: Connection, logical_shard: int, left: Left, note: sql.Composed, seconds: float
) -> bool:
    """Wait until the target has everything, on disk, and set its sequences past what was given.

    The transaction writes the journal and is synchronous, so whatever was applied before is on
    disk, too, and on the standbys that commits wait for. One round trip: the target itself looks
    whether all has arrived.

    Args:
        connection: to the target, in autocommit mode.
        logical_shard: which.
        left: what the source says.
        note: what is written into the journal.
        seconds: for how long to wait at most.

    Returns:
        Whether it has everything; if not, nothing was done.
    """
    schema = schema_name(logical_shard)
    ids = sql.Identifier(schema, "shardkit_id_state")
    script: list[sql.Composable] = [
        sql.SQL("BEGIN; SET LOCAL synchronous_commit = on"),
        sql.SQL(_ARRIVED).format(ids=ids, state=left.state, seconds=seconds),
        note,
    ]
    if left.sequences:
        values = json.dumps(dict(left.sequences))
        script.append(sql.SQL(_SEQUENCES).format(margin=MARGIN, values=values, schema=schema))
    try:
        connection.execute(sql.SQL(";").join([*script, sql.SQL("COMMIT")]))
    except psycopg.errors.QueryCanceled:
        return False
    finally:
        if not connection.closed and connection.info.transaction_status:
            connection.rollback()
    return True


def has_standbys(connection: Connection) -> bool:
    """Return whether any replica is connected that may be promoted."""
    return connection.execute(_STANDBYS).fetchone() is not None


def flushed(connection: Connection, lsn: int, seconds: float) -> bool:
    """Wait until every replica that may be promoted has a position of the log on disk."""
    text = f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"
    began = SYSTEM.monotonic()
    n = 0
    while True:
        if connection.execute(_FLUSHED, (text,)).fetchone() == (True,):
            return True
        if SYSTEM.monotonic() - began > seconds:
            return False
        SYSTEM.sleep(_POLLS[min(n, len(_POLLS) - 1)])
        n += 1
