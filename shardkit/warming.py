"""Connections to where logical shards are about to be, opened before anybody needs them.

A logical shard that opens at a new server would have everybody connect there at the same moment,
and wait for that: ten times as long as for the move itself. `shardkit.mapwatch` tells
`shardkit.connections` what is on its way; how many connections that is worth is said here. Pure.
Source: docs/moves.md.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PoolState", "n_missing"]


@dataclass(frozen=True, slots=True)
class PoolState:
    """Connections of one pool.

    Attributes:
        idle: that wait for a session.
        in_use: that sessions have.
        size: how many it keeps.
    """

    idle: int
    in_use: int
    size: int


def n_missing(source: PoolState, target: PoolState, *, n_moving: int, n_owned: int) -> int:
    """Return how many connections a pool lacks for logical shards that are on their way.

    They take with them the share of the connections that they have of the logical shards of their
    server, rounded up; idle ones count, and no pool grows beyond its size.

    Args:
        source: the pool of the server that they leave.
        target: that of the server where they go.
        n_moving: how many logical shards are on that way.
        n_owned: how many the server has that they leave.
    """
    wanted = -(-(source.idle + source.in_use) * n_moving // max(n_owned, n_moving, 1))
    return max(0, min(wanted - target.idle, target.size - target.idle - target.in_use))
