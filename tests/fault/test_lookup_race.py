"""`make lookup-race` in small: clients killed at any step, and every name is taken exactly once."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.lookup import Base, Race, race
from benchmarks.measure import database
from shardkit.config import load
from shardkit.local import LocalCluster

pytestmark = [pytest.mark.integration, pytest.mark.fault, pytest.mark.slow]


def test_every_name_is_taken_once_whoever_is_killed(
    local_cluster: LocalCluster, tmp_path: Path
) -> None:
    _, topology = load(local_cluster.config_path)
    made = database(local_cluster, topology, "race", logical_shards=64, metadata=Base.metadata)
    trial = Race(made, tmp_path, 1 / 300, names=24, processes=4, threads=2, changes=10)
    taken, changed = race(trial)
    assert taken.taken == trial.names
    for outcome in (taken, changed):
        assert (outcome.doubled, outcome.missing, outcome.lost) == (0, 0, 0)
        assert outcome.unavailable == 0
        assert sum(outcome.kills.values()) >= 3


def test_looking_and_then_inserting_takes_names_twice(
    local_cluster: LocalCluster, tmp_path: Path
) -> None:
    """The control arm: the harness finds doubles where there are some."""
    _, topology = load(local_cluster.config_path)
    made = database(local_cluster, topology, "naive", logical_shards=64, metadata=Base.metadata)
    trial = Race(made, tmp_path, 0.0, names=60, processes=4, threads=2, naive=True)
    assert race(trial)[0].doubled > 0
