"""The id function that the id layout is known from, as published, for comparison.

Source: Instagram Engineering, "Sharding & IDs at Instagram", 2012. It reads a sequence, then the
clock, and wraps the sequence: neither is under a lock, and nothing carries.
"""

from __future__ import annotations

__all__ = ["PUBLISHED"]

PUBLISHED = """
CREATE SEQUENCE {schema}.table_id_seq;
CREATE OR REPLACE FUNCTION {schema}.next_id(OUT result bigint) AS $$
DECLARE
    our_epoch bigint := 1314220021721;
    seq_id bigint;
    now_millis bigint;
    shard_id int := {shard};
BEGIN
    SELECT nextval('{schema}.table_id_seq') % 1024 INTO seq_id;
    SELECT FLOOR(EXTRACT(EPOCH FROM clock_timestamp()) * 1000) INTO now_millis;
    result := (now_millis - our_epoch) << 23;
    result := result | (shard_id << 10);
    result := result | (seq_id);
END;
$$ LANGUAGE PLPGSQL;
GRANT USAGE ON SEQUENCE {schema}.table_id_seq TO PUBLIC;
"""
