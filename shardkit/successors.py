"""Finds the primary among the servers of a physical shard, whoever has made it that.

Every server is asked at once what it is; the one that takes writes, is of the right cluster and
physical shard, and whose timeline is registered, is the primary. One that was promoted and has not
been registered (`shardkit failover adopt`) is not used: nobody knows yet whether it has all that
was acknowledged. Asked by `shardkit.mapwatch` when a primary is silent or is one no more.
Source: libpq's `target_session_attrs`, which asks for a role and not for a lineage.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Any, Final

import psycopg
from psycopg import AsyncConnection

from shardkit.ownership import Answer, is_lawful
from shardkit.topology import Endpoint, Topology, libpq_options

__all__ = ["successor"]

_LOG: Final = logging.getLogger(__name__)

PATIENCE: Final = 1.0
"""Seconds that a server has to say what it is."""

# AccessShareLock on a small table. Columns that an older version lacks are read as JSON.
_ASK: Final = """
SELECT i.cluster, i.physical, s.system_identifier, (to_jsonb(i) ->> 'timeline')::bigint,
    CASE WHEN NOT pg_catalog.pg_is_in_recovery() THEN ('x' || pg_catalog.substr(
        pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_insert_lsn()), 1, 8))::bit(32)::bigint
    END
FROM shardkit.identity AS i, pg_catalog.pg_control_system() AS s
"""


async def successor(topology: Topology, physical: str, known: Answer | None) -> Endpoint | None:
    """Return the endpoint of a physical shard that is its primary, None where none says so.

    Args:
        topology: the cluster as it is known.
        physical: name of the physical shard.
        known: what was last believed of its primary.
    """
    shard = topology.physical[physical]
    tasks = {
        asyncio.ensure_future(_said(topology.name, endpoint)): endpoint
        for endpoint in shard.endpoints
    }
    best: tuple[int, Endpoint] | None = None
    try:
        for task in asyncio.as_completed(tasks, timeout=PATIENCE * 2):
            answer, endpoint = await task
            if answer is None or not is_lawful(known, answer):
                continue
            if best is None or answer.timeline > best[0]:
                best = (answer.timeline, endpoint)
            if known is not None and answer.timeline > known.timeline:
                break  # a new one; a frozen server is not waited for
    except TimeoutError:
        pass
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return None if best is None else best[1]


async def _said(cluster: str, endpoint: Endpoint) -> tuple[Answer | None, Endpoint]:
    connection: AsyncConnection[Any] | None = None
    try:
        async with asyncio.timeout(PATIENCE):
            connection = await AsyncConnection.connect(
                autocommit=True,
                prepare_threshold=None,
                **{"application_name": "shardkit map", **libpq_options(endpoint.url)},
            )
            row = await (await connection.execute(_ASK)).fetchone()
    except (psycopg.Error, OSError, TimeoutError) as error:
        _LOG.debug("%s does not say what it is: %s", endpoint, type(error).__name__)
        row = None
    finally:
        if connection is not None:
            with suppress(psycopg.Error):
                connection.pgconn.finish()
    if row is None or tuple(row[:2]) != (cluster, endpoint.physical) or row[4] is None:
        return None, endpoint
    return Answer(row[2], row[4], {}, row[3]), endpoint
