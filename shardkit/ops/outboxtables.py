"""The outbox as DDL: tables in every logical shard's schema, leases and functions beside them.

A logical shard's schema holds what must be fenced, moved and failed over with its rows: events
not delivered yet (`shardkit_outbox`), what failed and is tried again (`shardkit_outbox_retry`),
what was given up (`shardkit_outbox_dead`), and which events had their effect here
(`shardkit_effects`). Events are inserted and deleted, never updated: a backlog is one B-tree in
the order of delivery, and what happens to an event in between costs no version of its row.

The admin schema holds one lease row per logical shard, since a relay asks for several at once.
A lease is worth nothing after a move: its row counts only with the epoch it was given at.
Functions run with the rights of their caller, so a fence that revokes stops relays too.
Part of `shardkit.ops.catalog`; rights are in `shardkit.ops.rights`. Source: docs/outbox.md.
"""

from __future__ import annotations

from psycopg import sql

from shardkit.emitting import EPOCH_SHIFT, POSITION
from shardkit.topology import schema_name

__all__ = ["outbox_admin_statements", "outbox_statements"]

_OWNERS = 0x7368_6F77
"""First half of the lock that a relay holds while it lives: "show" in ASCII."""

_FULL_BATCH = 4096
"""Where a lease's batch stops growing; a claim may ask for less."""

# New objects only. A queue's table is dead rows mostly, so it is vacuumed by count and at once.
_TABLES = """
CREATE TABLE IF NOT EXISTS {schema}.shardkit_outbox (
    position bigint PRIMARY KEY,
    id bigint NOT NULL,
    key text,
    topic text NOT NULL,
    payload json NOT NULL,
    created timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp()
) WITH (
    autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000,
    autovacuum_vacuum_insert_threshold = -1, autovacuum_analyze_scale_factor = 0,
    autovacuum_analyze_threshold = 50000, autovacuum_vacuum_cost_delay = 0
);
CREATE TABLE IF NOT EXISTS {schema}.shardkit_outbox_retry (
    id bigint PRIMARY KEY,
    key text,
    attempts integer NOT NULL,
    due timestamptz NOT NULL,
    error text NOT NULL
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500);
CREATE INDEX IF NOT EXISTS shardkit_outbox_retry_key ON {schema}.shardkit_outbox_retry (key)
    WHERE key IS NOT NULL;
CREATE TABLE IF NOT EXISTS {schema}.shardkit_outbox_dead (
    id bigint PRIMARY KEY,
    key text,
    topic text NOT NULL,
    payload json NOT NULL,
    created timestamptz NOT NULL,
    attempts integer NOT NULL,
    error text NOT NULL,
    died timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp()
);
CREATE TABLE IF NOT EXISTS {schema}.shardkit_effects (
    event_id bigint NOT NULL,
    consumer text NOT NULL,
    applied timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    PRIMARY KEY (event_id, consumer)
) WITH (autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_cost_delay = 0);
CREATE INDEX IF NOT EXISTS shardkit_effects_applied ON {schema}.shardkit_effects
    USING brin (applied) WITH (pages_per_range = 8, autosummarize = on);
INSERT INTO shardkit.outbox_lease (logical_shard) VALUES ({shard}) ON CONFLICT DO NOTHING
"""

# New objects only. One sequence for all logical shards of the server: a position begins with the
# epoch of its logical shard, so order holds across a hand-over though no sequence is moved.
_ADMIN_TABLES = f"""
CREATE SEQUENCE IF NOT EXISTS {POSITION} AS bigint MAXVALUE {(1 << EPOCH_SHIFT) - 1};
CREATE TABLE IF NOT EXISTS shardkit.outbox_lease (
    logical_shard integer PRIMARY KEY,
    fence bigint NOT NULL DEFAULT 0,
    epoch bigint NOT NULL DEFAULT 0,
    owner integer,
    expires timestamptz,
    batch integer NOT NULL DEFAULT {_FULL_BATCH}
) WITH (fillfactor = 20, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000);
"""

# Row locks on the leases that are free, skipping those that another claim is about to take. A
# lease is free when nobody holds it, when it has expired by the server's clock, when the lock of
# its holder is gone, as after kill -9, or when it is of before a hand-over. The settings keep the
# plan: statistics of a queue are always wrong, and the order of the primary key is the order of
# delivery.
# A holder that did not end properly may have been killed by an event, so its successor takes an
# eighth as many; a batch of one is counted as an attempt before it is delivered.
_CLAIM = f"""
CREATE OR REPLACE FUNCTION shardkit.outbox_claim(
    shards integer[], worker integer, seconds double precision, n_shards integer, n_events integer
) RETURNS TABLE (
    shard integer, fence bigint, "position" bigint, id bigint, key text, topic text,
    payload json, created timestamptz, attempts integer
) LANGUAGE plpgsql SET search_path = pg_catalog SET enable_seqscan = off
SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
SET jit = off AS $$
DECLARE
    lease record;
    place text;
    room integer := n_events;
    wanted integer;
    found integer;
    due text;
    head record;
BEGIN
    FOR lease IN
        SELECT l.logical_shard, l.owner, l.batch, o.epoch
        FROM shardkit.outbox_lease AS l JOIN shardkit.ownership AS o USING (logical_shard)
        WHERE l.logical_shard = ANY (shards) AND o.state = 'active'
            AND (l.owner IS NULL OR l.expires < clock_timestamp() OR l.epoch <> o.epoch
                OR (l.owner > 0 AND l.owner <> worker
                    AND pg_try_advisory_xact_lock({_OWNERS}, l.owner)))
        ORDER BY array_position(shards, l.logical_shard)
        LIMIT n_shards FOR UPDATE OF l SKIP LOCKED
    LOOP
        EXIT WHEN room <= 0;
        wanted := lease.batch;
        IF lease.owner IS NOT NULL THEN
            wanted := greatest(wanted / 8, 1);
        END IF;
        UPDATE shardkit.outbox_lease AS l SET fence = l.fence + 1, epoch = lease.epoch,
            owner = worker, expires = clock_timestamp() + make_interval(secs => seconds),
            batch = wanted
        WHERE l.logical_shard = lease.logical_shard RETURNING l.fence INTO outbox_claim.fence;
        place := 'shard_' || lpad(lease.logical_shard::text, 4, '0');
        due := format(
            'FROM %1$I.shardkit_outbox AS o'
            ' LEFT JOIN %1$I.shardkit_outbox_retry AS own ON own.id = o.id'
            ' WHERE (own.due IS NULL OR own.due <= $3) AND NOT EXISTS ('
            'SELECT FROM %1$I.shardkit_outbox_retry AS r WHERE r.key = o.key AND r.due > $3)'
            ' ORDER BY o.position LIMIT $4', place
        );
        IF wanted > 1 THEN
            RETURN QUERY EXECUTE 'SELECT $1, $2, o.position, o.id, o.key, o.topic, o.payload,'
                ' o.created, coalesce(own.attempts, 0) ' || due
            USING lease.logical_shard, outbox_claim.fence, clock_timestamp(), least(wanted, room);
        ELSE
            EXECUTE 'SELECT o.position AS place, coalesce(own.attempts, 0) AS tries ' || due
            INTO head USING NULL::integer, NULL::bigint, clock_timestamp(), 1;
            EXECUTE format(
                'INSERT INTO %1$I.shardkit_outbox_retry AS r (id, key, attempts, due, error)'
                ' SELECT id, key, 1, $2, ''the relay ended while it was handled'''
                ' FROM %1$I.shardkit_outbox WHERE position = $1'
                ' ON CONFLICT (id) DO UPDATE SET attempts = r.attempts + 1, due = $2', place
            ) USING head.place,
                clock_timestamp() + make_interval(secs => least(2.0 ^ head.tries, 300)::float8);
            RETURN QUERY EXECUTE format(
                'SELECT $1, $2, o.position, o.id, o.key, o.topic, o.payload, o.created, $3'
                ' FROM %1$I.shardkit_outbox AS o WHERE position = $4', place
            ) USING lease.logical_shard, outbox_claim.fence, head.tries, head.place;
        END IF;
        GET DIAGNOSTICS found = ROW_COUNT;
        room := room - found;
        IF found = 0 THEN
            UPDATE shardkit.outbox_lease AS l SET owner = NULL, expires = NULL
            WHERE l.logical_shard = lease.logical_shard;
        END IF;
    END LOOP;
END
$$
"""

# Row locks on the leases and on the events that are deleted. Nothing happens to a logical shard
# whose lease was taken over, or that has changed hands: it is returned.
_FINISH = f"""
CREATE OR REPLACE FUNCTION shardkit.outbox_finish(
    shards integer[], fences bigint[], done_shards integer[], done bigint[],
    release boolean, seconds double precision
) RETURNS SETOF integer
LANGUAGE plpgsql SET search_path = pg_catalog SET enable_seqscan = off AS $$
DECLARE
    place text;
    positions bigint[];
BEGIN
    FOR i IN 1 .. cardinality(shards) LOOP
        UPDATE shardkit.outbox_lease AS l SET
            owner = CASE WHEN release THEN NULL ELSE l.owner END,
            expires = CASE WHEN NOT release
                THEN clock_timestamp() + make_interval(secs => seconds) END,
            batch = CASE WHEN release THEN least(l.batch * 2, {_FULL_BATCH}) ELSE l.batch END
        FROM shardkit.ownership AS o
        WHERE l.logical_shard = shards[i] AND l.fence = fences[i] AND l.owner IS NOT NULL
            AND o.logical_shard = l.logical_shard AND o.state = 'active' AND o.epoch = l.epoch;
        IF NOT FOUND THEN
            RETURN NEXT shards[i];
            CONTINUE;
        END IF;
        positions := ARRAY(
            SELECT p FROM unnest(done_shards, done) AS d (s, p) WHERE s = shards[i]
        );
        CONTINUE WHEN cardinality(positions) = 0;
        place := 'shard_' || lpad(shards[i]::text, 4, '0');
        EXECUTE format(
            'WITH gone AS (DELETE FROM %1$I.shardkit_outbox WHERE position = ANY ($1)'
            ' RETURNING id) DELETE FROM %1$I.shardkit_outbox_retry AS r USING gone'
            ' WHERE r.id = gone.id', place
        ) USING positions;
    END LOOP;
END
$$
"""

# Row locks on the lease, the event and its entry. False: the lease is not the caller's any more.
_FAIL = """
CREATE OR REPLACE FUNCTION shardkit.outbox_fail(
    shard integer, fence bigint, "position" bigint, tries integer, seconds double precision,
    reason text
) RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog SET enable_seqscan = off AS $$
DECLARE
    place text := 'shard_' || lpad(shard::text, 4, '0');
BEGIN
    PERFORM FROM shardkit.outbox_lease AS l JOIN shardkit.ownership AS o USING (logical_shard)
    WHERE l.logical_shard = shard AND l.fence = outbox_fail.fence AND l.owner IS NOT NULL
        AND o.state = 'active' AND o.epoch = l.epoch FOR UPDATE OF l;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    IF seconds IS NULL THEN
        EXECUTE format(
            'WITH gone AS (DELETE FROM %1$I.shardkit_outbox WHERE position = $1 RETURNING *),'
            ' forgotten AS (DELETE FROM %1$I.shardkit_outbox_retry AS r USING gone'
            ' WHERE r.id = gone.id) INSERT INTO %1$I.shardkit_outbox_dead'
            ' (id, key, topic, payload, created, attempts, error)'
            ' SELECT id, key, topic, payload, created, $2, $3 FROM gone', place
        ) USING "position", tries, reason;
    ELSE
        EXECUTE format(
            'INSERT INTO %1$I.shardkit_outbox_retry AS r (id, key, attempts, due, error)'
            ' SELECT o.id, o.key, $2, $3, $4 FROM %1$I.shardkit_outbox AS o WHERE position = $1'
            ' ON CONFLICT (id) DO UPDATE SET attempts = $2, due = $3, error = $4', place
        ) USING "position", tries, clock_timestamp() + make_interval(secs => seconds), reason;
    END IF;
    RETURN true;
END
$$
"""

# A session lock of the relay's number, to its connection's end; false when another has it.
_ALIVE = f"""
CREATE OR REPLACE FUNCTION shardkit.outbox_alive(worker integer) RETURNS boolean
LANGUAGE sql VOLATILE SET search_path = pg_catalog AS
'SELECT pg_try_advisory_lock({_OWNERS}, worker)'
"""


def outbox_admin_statements() -> list[sql.SQL]:
    """Return the statements that complete the admin schema of one physical shard."""
    return [sql.SQL(text) for text in (_ADMIN_TABLES, _CLAIM, _FINISH, _FAIL, _ALIVE)]


def outbox_statements(logical_shard: int) -> list[sql.Composed]:
    """Return the statements that create the outbox of one logical shard."""
    schema = sql.Identifier(schema_name(logical_shard))
    return [sql.SQL(_TABLES).format(schema=schema, shard=logical_shard)]
