"""Writers that end between COMMIT and the cache: `python -m benchmarks cachekills`, a few of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.cachekills import run
from tests.fixtures.caches import NewServer

pytestmark = [pytest.mark.integration, pytest.mark.fault]

KILLS = 6
"""One of each kind: by whom it is ended, and whether its marker is lost."""


def test_what_killed_writers_leave_is_repaired_at_once(
    cluster_file: Path, cache_server: NewServer
) -> None:
    found = run(cluster_file, cache_server("memcached").server, kills=KILLS, watched=0.5)
    print(found)
    assert found.never == 0
    assert len(found.windows) == KILLS
    assert found.reads > 0
    assert max(found.windows) < 30, "seconds on a machine that has other things to do; 1 otherwise"
