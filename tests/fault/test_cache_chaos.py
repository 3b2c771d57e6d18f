"""The cache while everything fails at once: `make test-chaos-cache`, for seconds."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.cachechaos import run
from benchmarks.cachestages import Machines, Sessions

pytestmark = [
    pytest.mark.integration,
    pytest.mark.fault,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("memcached") is None, reason="Memcached is not installed"),
]

ARMS: dict[str, tuple[Callable[[Path], Machines | Sessions], int]] = {
    "machines": (Machines, 30_000),
    "sessions in memcached": (lambda config: Sessions(config, "memcached"), 2_000),
    "sessions in redis": (lambda config: Sessions(config, "redis"), 2_000),
}


@pytest.mark.parametrize("arm", ARMS)
def test_nothing_older_than_the_bound_is_shown(cluster_file: Path, arm: str) -> None:
    """Plain cache-aside, beside it, is caught: its writers die before they delete."""
    stage, checked = ARMS[arm]
    outcome = run(stage(cluster_file), checked=checked, timeout=120.0, bound=2.0, readers=3)
    counts = outcome.counts
    assert counts["checked"] >= checked, outcome
    assert counts["late"] == counts["mixed"] == 0, outcome
    assert counts["aside_late"] > 0, outcome
    assert outcome.evictions > 0, outcome
    assert outcome.link_faults + outcome.restarts > 0, outcome
