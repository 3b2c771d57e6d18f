"""What a server has loaded is set aside from the collector's work."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import gc
import app.main
from shardkit import set_aside
before = len(gc.get_objects())
set_aside()
left = len(gc.get_objects())
cycle = []
cycle.append(cycle)
del cycle
assert gc.collect() >= 1, "new garbage is found"
print(before, left)
"""


def test_a_collection_looks_at_what_came_later_only() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE], check=True, capture_output=True, text=True, timeout=300
    )
    before, left = map(int, done.stdout.split())
    assert before > 50_000
    assert left < before / 100
