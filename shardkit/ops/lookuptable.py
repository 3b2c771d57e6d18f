"""The table of a logical shard's schema that keeps who has the unique values whose hash it is.

One row per value: the ids that may have it and, beside each, the ticket of the transaction that
said so. Part of what `shardkit.ops.catalog` creates. Source: docs/lookup.md.
"""

from __future__ import annotations

from psycopg import sql

__all__ = ["lookup_statements"]


def lookup_statements(schema: sql.Identifier) -> list[sql.Composed]:
    """Return the statements that create the table in the schema of a logical shard."""
    return [
        # Takes locks on a new object only.
        sql.SQL(
            "CREATE TABLE IF NOT EXISTS {}.shardkit_lookup (lookup text NOT NULL, "
            "value bytea NOT NULL, ids bigint[] NOT NULL, tickets bigint[] NOT NULL, "
            "PRIMARY KEY (lookup, value), "
            "CHECK (cardinality(ids) > 0 AND cardinality(ids) = cardinality(tickets)))"
        ).format(schema)
    ]
