"""The database's side of minting ids: functions that count a logical shard's state forwards.

One row per logical shard, `shardkit_id_state` in its schema, holds the last state given away,
`milliseconds << 10 | sequence`. Both ways of minting go through `shardkit.reserve_ids`, and so
through that row: `shardkit.lease_ids` for blocks, and `shardkit.next_id` for SQL clients, also as
a column default. Part of the admin schema, see `shardkit.ops.catalog`. Source: docs/ids.md.
"""

from __future__ import annotations

from psycopg import sql

from shardkit.ids import (
    EPOCH_MS,
    MAX_AHEAD_MS,
    MAX_LEASE,
    SEQUENCE_BITS,
    SEQUENCE_MASK,
    TIME_BITS,
    TIME_SHIFT,
)
from shardkit.minting import CLOCK_BEHIND, NOT_ACTIVE, NOT_HERE

__all__ = ["id_statements"]

_PATIENCE_MS = 1000
"""Milliseconds a function waits for the clock before it raises CLOCK_BEHIND."""

_LOCK_TIMEOUT_MS = 2000
"""Milliseconds it queues for the row, which a transaction that called next_id holds to its end."""

_LARGEST_BLOCK = 512
_BLOCK_TTL_MS = 200

# Takes no lock. The only place ids get the time from, so that a test can move it.
_CLOCK = f"""
CREATE OR REPLACE FUNCTION shardkit.id_clock_ms() RETURNS bigint LANGUAGE sql VOLATILE AS
'SELECT floor(pg_catalog.date_part(''epoch'', pg_catalog.clock_timestamp()) * 1000)::bigint'
    ' - {EPOCH_MS}'
"""

# A row lock on the state until the end of the transaction: it makes ranges disjoint. The state
# never falls, and after this call it is less than MAX_AHEAD_MS ahead of the clock. The second
# look at the ownership row comes after the lock, so that nothing is given away once a fence,
# which takes the table's lock, has committed.
_RESERVE = f"""
CREATE OR REPLACE FUNCTION shardkit.reserve_ids(shard integer, n integer) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    id_state text := format('shard_%s.shardkit_id_state', lpad(shard::text, 4, '0'));
    owned text;
    last bigint;
    too_far bigint;
    waited double precision := 0;
BEGIN
    IF n IS NULL OR n NOT BETWEEN 1 AND {MAX_LEASE} THEN
        RAISE EXCEPTION 'lease of % ids: must be 1 to {MAX_LEASE}', n USING ERRCODE = '22023';
    END IF;
    SELECT o.state INTO owned FROM shardkit.ownership AS o WHERE o.logical_shard = shard;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'logical shard % does not exist on this server', shard
            USING ERRCODE = '{NOT_HERE}';
    END IF;
    IF current_setting('synchronous_commit') = 'off' THEN
        -- What has been given away must not be forgotten in a crash.
        PERFORM set_config('synchronous_commit', 'local', true);
    END IF;
    LOOP
        EXECUTE 'UPDATE ' || id_state || ' SET state = '
            'greatest(state + 1, shardkit.id_clock_ms() << {SEQUENCE_BITS}) + $1 - 1 '
            'WHERE state + $1 < (shardkit.id_clock_ms() + {MAX_AHEAD_MS}) << {SEQUENCE_BITS} '
            'RETURNING state' INTO last USING n;
        EXIT WHEN last IS NOT NULL;
        EXECUTE 'SELECT state + $1 - ((shardkit.id_clock_ms() + {MAX_AHEAD_MS}) << {SEQUENCE_BITS})'
            ' FROM ' || id_state INTO STRICT too_far USING n;
        too_far := greatest((too_far >> {SEQUENCE_BITS}) + 1, 1);
        IF waited + too_far > {_PATIENCE_MS} THEN
            RAISE EXCEPTION 'the clock of the server is % ms too far behind the last id', too_far
                USING ERRCODE = '{CLOCK_BEHIND}';
        END IF;
        PERFORM pg_sleep(too_far / 1000.0);
        waited := waited + too_far;
    END LOOP;
    IF last >> {SEQUENCE_BITS + TIME_BITS} <> 0 THEN
        RAISE EXCEPTION 'the clock of the server is past the end of the id layout'
            USING ERRCODE = '22003';
    END IF;
    SELECT o.state INTO owned FROM shardkit.ownership AS o WHERE o.logical_shard = shard;
    IF owned IS DISTINCT FROM 'active' THEN
        RAISE EXCEPTION 'logical shard % is % on this server', shard, coalesce(owned, 'gone')
            USING ERRCODE = '{NOT_ACTIVE}';
    END IF;
    RETURN last - n + 1;
END
$$
"""

# Rows are locked in ascending order, so that two callers cannot deadlock. To be called in a
# transaction of its own: a range is given away for good once that has committed.
_LEASE = f"""
CREATE OR REPLACE FUNCTION shardkit.lease_ids(shards integer[], counts integer[])
RETURNS TABLE (logical_shard integer, first_state bigint)
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET lock_timeout = {_LOCK_TIMEOUT_MS} AS $$
DECLARE
    n integer;
BEGIN
    FOR logical_shard, n IN SELECT s, c FROM unnest(shards, counts) AS t (s, c) ORDER BY s LOOP
        first_state := shardkit.reserve_ids(logical_shard, n);
        RETURN NEXT;
    END LOOP;
END
$$
"""

# The row lock lasts to the end of the caller's transaction anyway, so a transaction that asks
# again gets a block, twice as large each time: a setting that ends with the transaction, and that
# a rollback to a savepoint takes back together with the row. "shard next last size".
_NEXT = f"""
CREATE OR REPLACE FUNCTION shardkit.next_id(logical_shard integer) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET lock_timeout = {_LOCK_TIMEOUT_MS} AS $$
DECLARE
    block bigint[] := nullif(current_setting('shardkit.id_block', true), '')::bigint[];
    size integer := 1;
    state bigint;
    last bigint;
BEGIN
    IF block[1] = logical_shard THEN
        state := block[2];
        last := block[3];
        size := least(block[4] * 2, {_LARGEST_BLOCK});
    END IF;
    IF state IS NULL OR state > last
        OR (state >> {SEQUENCE_BITS}) + {_BLOCK_TTL_MS} < shardkit.id_clock_ms()
    THEN
        state := shardkit.reserve_ids(logical_shard, size);
        last := state + size - 1;
    ELSE
        size := block[4];
    END IF;
    PERFORM set_config(
        'shardkit.id_block', ARRAY[logical_shard, state + 1, last, size]::text, true
    );
    -- All of these operators have one precedence in PostgreSQL.
    RETURN ((state >> {SEQUENCE_BITS}) << {TIME_SHIFT})
        | (logical_shard::bigint << {SEQUENCE_BITS}) | (state & {SEQUENCE_MASK});
END
$$
"""


def id_statements() -> list[sql.SQL]:
    """Return the statements that create the functions."""
    return [sql.SQL(text) for text in (_CLOCK, _RESERVE, _LEASE, _NEXT)]
