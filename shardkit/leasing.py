"""Leases blocks of ids from the databases of their logical shards.

One statement per physical shard, in a transaction of its own. `shardkit.minting` makes ids of
what it returns. Source: docs/ids.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import psycopg
from sqlalchemy.exc import DBAPIError

from shardkit.directories import Servers as Group
from shardkit.errors import (
    ClockMovedBackError,
    ConfigurationError,
    IdRequestError,
    ShardFencedError,
    UnavailableError,
)
from shardkit.fences import Owners, moved
from shardkit.ids import MAX_LEASE
from shardkit.minting import CLOCK_BEHIND, NOT_ACTIVE, NOT_HERE

__all__ = ["lease_ids"]


class Servers(Group, Protocol):
    """What a lease needs of the cluster."""

    @property
    def owners(self) -> Owners:
        """Who owns what."""


_LEASE = """
SELECT logical_shard, first_state
FROM shardkit.lease_ids(%(shards)s::int[], %(counts)s::int[])
"""


def lease_ids(servers: Servers, counts: Mapping[int, int], total: int) -> dict[int, int]:
    """Reserve ranges of ids; return the first generator state by logical shard.

    Each physical shard's ranges are committed before it answers, so an answer that is lost
    wastes ids and the next call repeats none.

    Args:
        servers: the cluster.
        counts: length of each range, 1 to `MAX_LEASE`, by logical shard.
        total: number of logical shards.

    Raises:
        IdRequestError: a logical shard or a length is out of range.
        ClockMovedBackError: the server's clock is far behind its last id (retryable).
        UnavailableError: the server or the logical shard is unavailable (retryable).
        ConfigurationError: the server does not hold the logical shard.
    """
    for shard, n in counts.items():
        if not (0 <= shard < total and 1 <= n <= MAX_LEASE):
            raise IdRequestError(
                f"cannot lease {n} ids on logical shard {shard}: give 1 to {MAX_LEASE}, "
                f"and a shard from 0 to {total - 1}"
            )
    firsts: dict[int, int] = {}
    for physical, shards in servers.group(sorted(counts)).items():
        parameters = {"shards": list(shards), "counts": [counts[s] for s in shards]}
        try:
            rows = servers.ask(physical, _LEASE, parameters, primary=True)
        except DBAPIError as error:
            raise _lease_error(servers, error, physical, shards) from error
        firsts.update((row[0], row[1]) for row in rows)
    return firsts


def _lease_error(
    servers: Servers, error: DBAPIError, physical: str, shards: Sequence[int]
) -> Exception:
    """Return the shardkit error for a lease that failed, or the driver's when there is none."""
    cause, where = error.orig, f"{physical}/primary"
    if not isinstance(cause, psycopg.Error):
        return error
    reason = str(cause).strip().partition("\n")[0]
    if cause.sqlstate == CLOCK_BEHIND:
        return ClockMovedBackError(reason, endpoint=where)
    if cause.sqlstate in {NOT_HERE, NOT_ACTIVE}:
        servers.owners.distrust(physical)
        for shard in shards:
            owner, hold = servers.owners.whereabouts(shard)
            if owner != physical:
                return moved(shard, owner)
            if hold is not None:
                return ShardFencedError(f"it is {hold}: {reason}", logical_shard=shard)
    if cause.sqlstate == NOT_HERE:
        hint = "correct its place in shardkit.toml, or run shardkit migrate apply"
        return ConfigurationError(reason, endpoint=where, hint=hint)
    if cause.sqlstate == NOT_ACTIVE:
        return ShardFencedError(reason, endpoint=where, hint="a move is under way; try again")
    if isinstance(cause, psycopg.errors.LockNotAvailable):
        hint = "an open transaction that called shardkit.next_id holds them; keep it short"
        return UnavailableError("ids are locked", endpoint=where, hint=hint)
    return error
