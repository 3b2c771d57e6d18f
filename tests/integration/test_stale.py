"""`make stale` in small: writes that are read at once, from replicas of different age."""

from __future__ import annotations

import pytest

from benchmarks.stale import Base, delay, run
from shardkit.config import load
from shardkit.testing import create_tables
from tests.fixtures.servers import NewCluster

pytestmark = pytest.mark.integration

PAIRS = 1_000


@pytest.mark.slow
def test_no_read_is_stale_and_replicas_serve_them(new_cluster: NewCluster) -> None:
    with new_cluster(
        physical=1, replicas=2, logical_shards=8, redis=False, memcached=False, pgbouncer=False
    ) as local:
        _, topology = load(local.config_path)
        create_tables(topology, Base.metadata)
        delay(local)
        counts = run(local.config_path, PAIRS)
    assert counts.pairs == PAIRS
    assert (counts.stale, counts.regressions) == (0, 0)
    assert counts.from_replica >= 0.9 * PAIRS
    assert counts.monotonic >= PAIRS // 10
    assert counts.naive_stale > 0, "the harness finds stale reads where there are some"
