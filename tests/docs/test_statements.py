"""The support matrix of docs/statements.md is the grammar's, and says what happens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import shardkit
from shardkit.errors import RoutingError
from shardkit.local import LocalCluster
from tests.property.comparison import answer_of_one_server, answer_of_shardkit, assert_alike
from tests.property.parts import Dice
from tests.property.refusals import SHAPES
from tests.property.supported import Shape
from tests.property.worlds import World, opened

DOCUMENT = Path(shardkit.__file__).parent.parent.joinpath("docs/statements.md")

pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning")  # cartesian products


def test_the_table_is_the_grammars() -> None:
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    table = [line for line in lines if line.startswith("| ")][1:]
    assert table == [shape.row for shape in SHAPES]


@pytest.fixture(scope="module")
def world(local_cluster: LocalCluster) -> Iterator[World]:
    with ExitStack() as stack:
        yield stack.enter_context(opened(local_cluster, 0, 0))


@pytest.mark.integration
@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_each_row_says_what_happens(world: World, shape: Shape, several: bool) -> None:
    is_answered = shape.several if several else shape.one

    @settings(
        max_examples=6, derandomize=True, database=None, deadline=None,
        suppress_health_check=list(HealthCheck), phases=[Phase.generate],
    )  # fmt: skip
    @given(st.data())
    def check(data: Any) -> None:
        statement, is_ordered = shape.make(Dice(world, data.draw), several)
        if is_answered:
            found = answer_of_shardkit(world, statement, awaited=False)
            assert_alike(found, answer_of_one_server(world, statement), is_ordered=is_ordered)
        else:
            with pytest.raises(RoutingError):
                answer_of_shardkit(world, statement, awaited=False)

    check()
