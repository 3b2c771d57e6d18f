"""Kills at every step of atomic commits, with traffic and a resolver: `make halves` in small."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.halves import Base, Trial, run
from shardkit.config import load
from shardkit.testing import create_tables
from tests.fixtures.servers import NewCluster

pytestmark = [pytest.mark.integration, pytest.mark.fault, pytest.mark.slow]


def test_no_commit_is_half_done_whatever_is_killed(new_cluster: NewCluster, tmp_path: Path) -> None:
    local = new_cluster(
        replicas=0, logical_shards=16, redis=False, memcached=False, pgbouncer=False
    )
    local.start()
    _, topology = load(local.config_path)
    create_tables(topology, Base.metadata)
    control = tmp_path / "control"
    for folder in (control, tmp_path / "atomic"):
        folder.mkdir()
    found = run(Trial(local, topology, tmp_path / "atomic", kills=21, primaries=2))
    assert found.is_sound, found
    assert found.kills == 23
    assert found.acknowledged > 50, "under traffic"
    plain = run(Trial(local, topology, control, kills=8, primaries=0, is_atomic=False))
    assert plain.half, "the same kills between two plain commits are seen"
