"""What is left of a batch of logical shards in which something went wrong, as their ledgers say.

Called by `shardkit.ops.physical`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import psycopg

from shardkit.ops.ledger import OWN, read_shards
from shardkit.ops.plan import ShardWork

__all__ = ["unfinished"]


def unfinished(
    connection: psycopg.Connection[Any], batch: Sequence[ShardWork], digest: str
) -> list[ShardWork]:
    """Return the work that is still to be done, in order.

    Args:
        connection: outside a transaction.
        batch: what was to be done.
        digest: of the objects shardkit keeps in a logical shard.
    """
    rows = connection.execute(
        "SELECT n FROM unnest(%s::integer[]) AS n WHERE to_regclass(format("
        "'shard_%%s.shardkit_version', lpad(n::text, 4, '0'))) IS NOT NULL",
        ([work.logical_shard for work in batch],),
    )
    applied, partial = read_shards(connection, [number for (number,) in rows])
    left = []
    for work in batch:
        if not applied.get(work.logical_shard) and work.logical_shard not in partial:
            left.append(work)  # its one transaction has not committed
            continue
        done, half = applied[work.logical_shard], partial.get(work.logical_shard, {})
        rest = tuple(
            r
            for r in work.revisions
            if ((r.id in done or r.id in half) if r.is_undone else r.id not in done)
        )
        n_done = half[rest[0].id][0] if rest and rest[0].id in half else 0
        own = work.own and done.get(OWN) != digest
        if own or rest:
            left.append(replace(work, own=own, is_new=False, revisions=rest, done=n_done))
    return left
