"""The cache while everything fails at once: `make test-chaos-cache`, for seconds."""

from __future__ import annotations

import shutil

import pytest

from benchmarks.cachechaos import run
from shardkit.config import load
from shardkit.local import LocalCluster

pytestmark = pytest.mark.integration


@pytest.mark.skipif(shutil.which("memcached") is None, reason="Memcached is not installed")
def test_nothing_older_than_the_bound_is_shown(local_cluster: LocalCluster) -> None:
    """Plain cache-aside, beside it, is caught: its writers die before they delete."""
    _, topology = load(local_cluster.config_path)
    shard = next(iter(topology.physical.values()))
    url = shard.admin_url.set(drivername="postgresql")
    outcome = run(
        url.render_as_string(hide_password=False), checked=40_000, timeout=120.0, bound=2.0
    )
    counts = outcome.counts
    assert counts["checked"] >= 40_000, outcome
    assert counts["late"] == counts["mixed"] == 0, outcome
    assert counts["aside_late"] > 0, outcome
    assert outcome.evictions > 0, outcome
    assert outcome.link_faults + outcome.restarts > 0, outcome
