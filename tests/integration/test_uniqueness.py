"""`make uniqueness` in small: forks, kills and clock steps, and no id twice."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import MetaData

from benchmarks.measure import database
from benchmarks.uniqueness import Trial, run
from shardkit.config import load
from shardkit.local import LocalCluster

pytestmark = pytest.mark.integration


@pytest.mark.parametrize(
    ("maker", "n_ids", "step"), [("leases", 200_000, 1.0), ("published", 200_000, 0.1)]
)
def test_ids_under_forks_kills_and_clock_steps(
    local_cluster: LocalCluster, tmp_path: Path, maker: str, n_ids: int, step: float
) -> None:
    _, topology = load(local_cluster.config_path)
    made = database(
        local_cluster, topology, f"unique_{maker}", logical_shards=64, metadata=MetaData()
    )
    outcome = run(Trial(maker, made, tmp_path, n_ids, step=step))
    assert outcome.n_ids >= n_ids
    if maker == "leases":
        assert (outcome.duplicates, outcome.disorder) == (0, 0)
    else:
        assert outcome.duplicates > 0, "the harness finds duplicates where there are some"
        assert outcome.disorder > 0
