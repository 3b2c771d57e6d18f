"""Moves whose mover or servers break at a step: a sample of `make move-grid`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fault.movegrid import CELLS, Cell, Grid, grid
from tests.fixtures.folders import in_reach

pytestmark = [pytest.mark.integration, pytest.mark.fault, pytest.mark.slow]

SAMPLE = [
    cell
    for cell in CELLS
    if (cell.step, cell.victim, cell.fault)
    in {
        ("copy done", "source", "kill"),
        ("verify begun", "mover", "freeze"),
        ("fence done", "mover", "kill"),
        ("drain done", "target", "kill"),  # given up after the decision: it goes on
        ("decide done", "target", "kill"),
    }
]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory, postgres_version: str) -> Iterator[Grid]:  # noqa: ARG001
    with grid(in_reach(tmp_path_factory.mktemp("movegrid"))) as servers:
        yield servers


@pytest.mark.parametrize("cell", SAMPLE, ids=lambda cell: cell.name)
def test_a_broken_move_is_brought_to_a_clean_end(servers: Grid, cell: Cell) -> None:
    assert len(SAMPLE) == 5
    found = servers.run(cell)
    assert "problem" not in found, found
    assert found["acknowledged"] > 0
