"""Nothing is found where nothing is wrong, over thousands of seeds of failovers and breakers."""

from __future__ import annotations

import pytest

from tests.simulation.seeds import EXPECTED, SEEDS, counted


@pytest.mark.parametrize("world", ["failover", "breaker"])
def test_nothing_is_found_where_nothing_is_wrong(world: str) -> None:
    counts = counted(world, range(SEEDS[world]))
    rare = {name: counts[name] for name in EXPECTED[world] if counts[name] < SEEDS[world] / 10}
    assert not rare, counts


def test_ten_thousand_seeds_are_run() -> None:
    assert sum(SEEDS.values()) >= 10_000
