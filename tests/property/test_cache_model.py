"""Every interleaving of the cache protocol, in its smaller forms; `make model-check` has the rest."""

from __future__ import annotations

import pytest

from tests.property.cachemodel import Configuration
from tests.property.cachesearch import search
from tests.property.modelcheck import (
    COLUMNS,
    EXPECTED,
    LISTS,
    LISTS_WITHOUT,
    QUICK,
    QUICK_LISTS,
    WITHOUT,
    configuration,
    lists,
)

BROKEN = [
    (protocol, column, wanted)
    for protocol, cells in EXPECTED.items()
    for column, wanted in zip(COLUMNS, cells, strict=True)
    if protocol not in {"P8", "P9"}
]


@pytest.mark.parametrize(("protocol", "column", "wanted"), BROKEN)
def test_well_known_protocols_fail_where_they_are_known_to(
    protocol: str, column: str, wanted: str
) -> None:
    result = search(configuration(column, protocol=protocol), wanted="AB")
    assert result.verdict == wanted, result.found


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("protocol", [*LISTS][:-2])
def test_they_fail_for_lists_and_counts_too(protocol: str, column: str) -> None:
    result = search(lists(column, protocol=protocol), wanted="AB")
    assert result.verdict == LISTS[protocol][COLUMNS.index(column)], result.found


LARGE = frozenset(
    {
        "P9 2W 1R none, 2 keys",
        "P9 2W 1R late",
        "P9 1W 2R 3lost, own writes",
        "P9 2W 1R evict+crash, early markers",
        "P9 2W 1R lost, early markers",
    }
)
"""Those of over 80,000 states, which take seconds each."""


@pytest.mark.parametrize(
    "each",
    [
        pytest.param(each, id=str(each), marks=pytest.mark.slow if str(each) in LARGE else ())
        for each in (*QUICK, *QUICK_LISTS)
    ],
)
def test_nothing_old_is_ever_shown(each: Configuration) -> None:
    result = search(each)
    assert result.is_whole
    assert result.states > 2000
    if result.found:
        pytest.fail("\n".join(next(iter(search(each, traced=True).found.values()))))


@pytest.mark.parametrize(("each", "wanted"), [*WITHOUT, *LISTS_WITHOUT], ids=str)
def test_every_part_is_needed(each: Configuration, wanted: str) -> None:
    assert search(each, wanted=wanted).verdict == wanted


def test_a_violation_is_shown_as_the_steps_that_lead_to_it() -> None:
    steps = search(configuration("crash", protocol="P5"), wanted="A", traced=True).found["A"]
    assert steps[-1] == "and so it stays"
    (crashed,) = [step for step in steps if step.endswith("crashes")]
    assert steps.index(crashed.replace("crashes", "commits")) < steps.index(crashed)
