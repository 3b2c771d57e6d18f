"""How many connections are opened beforehand to where a logical shard goes."""

from __future__ import annotations

import pytest

from shardkit.warming import PoolState, n_missing

EMPTY = PoolState(0, 0, 10)


@pytest.mark.parametrize(
    ("source", "target", "n_moving", "n_owned", "missing"),
    [
        (PoolState(6, 2, 10), EMPTY, 1, 1, 8),
        (PoolState(6, 2, 10), EMPTY, 1, 3, 3),
        (PoolState(0, 1, 10), EMPTY, 1, 500, 1),
        (PoolState(0, 0, 10), EMPTY, 1, 4, 0),
        (PoolState(6, 2, 10), PoolState(5, 1, 10), 1, 1, 3),
        (PoolState(6, 2, 10), PoolState(2, 7, 10), 1, 1, 1),
        (PoolState(6, 2, 10), PoolState(0, 12, 10), 1, 1, 0),
        (PoolState(6, 2, 10), PoolState(9, 1, 10), 1, 1, 0),
        # What the map says of the source may be older than what is on its way.
        (PoolState(6, 2, 10), EMPTY, 2, 0, 8),
    ],
)
def test_a_share_of_the_connections_rounded_up_and_never_beyond_the_pool(
    source: PoolState, target: PoolState, n_moving: int, n_owned: int, missing: int
) -> None:
    assert n_missing(source, target, n_moving=n_moving, n_owned=n_owned) == missing
