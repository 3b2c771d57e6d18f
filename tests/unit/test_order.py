"""The files that begin first are there, each once."""

from __future__ import annotations

from pathlib import Path

from tests.fixtures.order import LONGEST

ROOT = Path(__file__).parents[2]


def test_the_longest_files_are_files_of_tests() -> None:
    assert [name for name in LONGEST if not (ROOT / name).is_file()] == []
    assert len(set(LONGEST)) == len(LONGEST)
