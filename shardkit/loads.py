"""How full logical shards are, as the servers' own statistics have it.

One query per physical shard, whatever its size, and no lock on any table. Called by the
placement policy `LeastLoaded`, rarely.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

from sqlalchemy.exc import DBAPIError

from shardkit.directories import Servers
from shardkit.errors import UnavailableError
from shardkit.topology import schema_name

__all__ = ["loads"]

# Statistics only, no lock on tables: live rows counted since the server started, or the last
# ANALYZE's when that is more. Source: PostgreSQL manual, "The Cumulative Statistics System".
_LOADS = """
SELECT s.schemaname, sum(greatest(s.n_live_tup, c.reltuples))
FROM pg_catalog.pg_stat_user_tables AS s JOIN pg_catalog.pg_class AS c ON c.oid = s.relid
WHERE starts_with(s.schemaname, 'shard_') AND NOT starts_with(s.relname, 'shardkit_')
GROUP BY s.schemaname
"""


def loads(servers: Servers, logical_shards: Sequence[int]) -> dict[int, float]:
    """Return the number of rows of each logical shard, as its server estimates it.

    Those of a physical shard that does not answer are left out.
    """
    found: dict[int, float] = {}
    groups: Mapping[str, tuple[int, ...]] = servers.group(logical_shards)
    for physical, shards in groups.items():
        with suppress(UnavailableError, DBAPIError):
            rows = servers.ask(physical, _LOADS, {}, primary=True)
            counted = {schema: float(n_rows) for schema, n_rows in rows}
            found.update((shard, counted.get(schema_name(shard), 0.0)) for shard in shards)
    return found
