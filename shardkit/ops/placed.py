"""The topology with the shard map of the moment, for commands: asked of every primary at once.

Commands look where the ownership rows say, as clusters do (`shardkit.mapwatch`); what a silent
server owns is taken from the others, or from the first placement.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

import psycopg

from shardkit.errors import EndpointUnavailableError
from shardkit.ops.direct import connect
from shardkit.ops.poolers import server_url
from shardkit.ownership import Answer, claims_of, merged
from shardkit.successors import successor
from shardkit.topology import Endpoint, PhysicalShard, Topology, like

__all__ = ["as_led", "as_placed"]

# AccessShareLock on a small table.
_ROWS = """
SELECT pg_catalog.string_agg(pg_catalog.concat_ws(' ', logical_shard, epoch, state, moved_to), ',')
FROM shardkit.ownership
"""


def as_led(topology: Topology) -> Topology:
    """Return the topology with the primaries of now, after failovers that it knows not of.

    Args:
        topology: as the configuration says; where nobody says that it is the primary, that stays.
    """

    def led(shard: PhysicalShard) -> PhysicalShard:
        if not shard.replicas:
            return shard
        direct = _direct(shard)
        asked = Topology(
            topology.name, {**topology.physical, shard.name: direct}, topology.shard_map
        )
        found = asyncio.run(successor(asked, shard.name, None))
        return shard if found in {None, direct.primary} else shard.led_by(found.address)

    # In threads, where no event loop runs.
    with ThreadPoolExecutor(len(topology.physical)) as pool:
        shards = {shard.name: shard for shard in pool.map(led, topology.physical.values())}
    return Topology(topology.name, shards, topology.shard_map)


def _direct(shard: PhysicalShard) -> PhysicalShard:
    """Return a physical shard whose endpoints are its servers, whatever stands between."""
    if shard.pooler is None:
        return shard

    def at(endpoint: Endpoint) -> Endpoint:
        return replace(endpoint, url=like(shard.looking_url, server_url(shard, endpoint)))

    return replace(shard, primary=at(shard.primary), replicas=tuple(map(at, shard.replicas)))


def as_placed(topology: Topology) -> Topology:
    """Return the topology with the shard map that the ownership rows make now.

    Args:
        topology: as the configuration says; its admin logins are used.
    """
    shards = [*topology.physical.values()]
    with ThreadPoolExecutor(len(shards)) as pool:
        found = [*pool.map(_answer, shards)]
    answers = {
        shard.name: answer
        for shard, answer in zip(shards, found, strict=True)
        if answer is not None
    }
    first = topology.shard_map
    shard_map = merged(first, answers, first, topology.physical)
    return Topology(topology.name, topology.physical, shard_map)


def _answer(shard: PhysicalShard) -> Answer | None:
    with (
        suppress(EndpointUnavailableError, psycopg.Error),
        connect(shard, application="shardkit map") as connection,
    ):
        row = connection.execute(_ROWS).fetchone()
        return Answer(0, 0, claims_of(row[0] or "" if row else ""))
    return None
