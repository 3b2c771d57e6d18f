"""The first transaction on a promoted primary: its timeline, the epochs of what it owns, its ids.

Called by failover and by restores. Source: docs/moves.md, docs/failover.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import psycopg
from psycopg import sql

from shardkit.ids import MAX_AHEAD_MS, SEQUENCE_BITS
from shardkit.ops.ownershiptables import TIMELINE
from shardkit.topology import schema_name

__all__ = ["promote"]

Connection = psycopg.Connection[tuple[Any, ...]]

_CLOCK_ERROR_MS: Final = 250
"""How far the clocks of two servers may be apart, beyond the seconds that a failover takes."""

# A row lock. Ids are leased at most MAX_AHEAD_MS ahead of the clock of the server that leases.
_PASS_IDS: Final = (
    "UPDATE {} SET state = greatest(state, (shardkit.id_clock_ms() + "
    f"{MAX_AHEAD_MS + _CLOCK_ERROR_MS}) << {SEQUENCE_BITS})"
)


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
