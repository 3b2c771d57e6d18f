"""The functions of the admin schema that tell how far a server has replayed its log.

Part of `shardkit.ops.catalog`. Readers call them on replicas, with every statement that must see
something (`shardkit.gates`), and probes do (`shardkit.probes`).
"""

from __future__ import annotations

from psycopg import sql

__all__ = ["log_statements"]

# Takes no lock. The position is read before the timeline: a replica never goes back to an earlier
# timeline, so one that receives a timeline now was on no later one when it was at that position.
# NULL where the position proves nothing: a primary, a replica that follows nobody, a transaction
# whose statements share one snapshot. The owner needs pg_read_all_stats to see the timeline,
# without it the answer is NULL and readers ask the primary.
_REPLAYED = """
CREATE OR REPLACE FUNCTION shardkit.replayed(target pg_lsn, patience_ms integer) RETURNS text
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    reached pg_lsn := pg_last_wal_replay_lsn();
    until timestamptz;
BEGIN
    IF reached < target AND patience_ms > 0 THEN
        until := clock_timestamp() + patience_ms * interval '1 ms';
        LOOP
            PERFORM pg_sleep(0.0005);
            reached := pg_last_wal_replay_lsn();
            EXIT WHEN reached >= target OR clock_timestamp() >= until;
        END LOOP;
    END IF;
    IF NOT pg_is_in_recovery() OR current_setting('transaction_isolation') <> 'read committed' THEN
        RETURN NULL;
    END IF;
    RETURN reached || ' ' || (SELECT to_hex(w.received_tli) FROM pg_stat_get_wal_receiver() AS w);
END
$$
"""


def log_statements() -> list[sql.SQL]:
    """Return the statements that create the functions."""
    return [sql.SQL(_REPLAYED)]
