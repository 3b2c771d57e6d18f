"""A test process that takes all the memory says what it was doing, and ends."""

from __future__ import annotations

import subprocess
import sys

from tests.fixtures import unattended


def test_a_process_that_takes_too_much_shows_its_stacks_and_ends() -> None:
    limit = 256 << 20
    program = [sys.executable, "-m", unattended.__name__, str(limit)]
    ended = subprocess.run(program, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == unattended.ENDED
    assert "MiB in memory" in ended.stderr
    assert "Current thread" in ended.stderr
    assert "in <module>" in ended.stderr, "what it was doing"
