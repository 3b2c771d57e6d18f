"""shardkit against one unsharded PostgreSQL: every statement is answered the same, or refused.

Worlds are made at random: a schema, rows, and a shard map over some physical shards. The same rows
lie in one plain schema. Hypothesis makes statements, and each runs on both, a share of them
through asyncio. Statements of the supported grammar must not be refused. Many of them, in new
worlds every time, with a table of what was refused: `make test-oracle`.
"""

from __future__ import annotations

import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from sqlalchemy.exc import SQLAlchemyError

from shardkit.errors import RoutingError
from shardkit.local import LocalCluster
from tests.property.comparison import (
    answer_of_one_server,
    answer_of_shardkit,
    assert_alike,
    wide,
)
from tests.property.grammar import KINDS, statement
from tests.property.parts import Dice
from tests.property.refusals import SHAPES
from tests.property.worlds import World, opened

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning"),  # cartesian products
]

CASES = int(os.environ.get("SHARDKIT_ORACLE_CASES", "0"))
"""Statements to make in all, half of them of each grammar; 0 for a few, the same every time."""

SEED = int(os.environ.get("SHARDKIT_ORACLE_SEED", "0")) or (
    secrets.randbelow(10**6) if CASES else 1
)
N_WORLDS = 6
ROUNDS = max(1, CASES // 10_000)
IN_EACH = CASES // ROUNDS // 2 or 800


@pytest.fixture(scope="module", params=range(ROUNDS))
def worlds(local_cluster: LocalCluster, request: pytest.FixtureRequest) -> Iterator[list[World]]:
    """A handful of worlds, others in every round."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(opened(local_cluster, SEED, request.param * N_WORLDS + i))
            for i in range(N_WORLDS)
        ]


@pytest.fixture(scope="module")
def tallies() -> Iterator[dict[str, Tally]]:
    """The counts of all rounds, by grammar; shown at the end."""
    made = {"free grammar": Tally(), "supported grammar": Tally()}
    yield made
    for title, tally in made.items():
        tally.show(f"{title}, seed {SEED}")


class Tally:
    """How many statements of each kind were answered, refused, or no SQL."""

    def __init__(self) -> None:
        self.answered: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.invalid: Counter[str] = Counter()

    def show(self, title: str) -> None:
        """Print it."""
        counts = (self.answered, self.refused, self.invalid)
        print(f"\n{title:52}{'answered':>10}{'refused':>10}{'invalid':>10}{'share refused':>15}")
        for kind in [*sorted(set().union(*counts)), "all"]:
            yes, no, none = (count.total() if kind == "all" else count[kind] for count in counts)
            print(f"{kind:52}{yes:10}{no:10}{none:10}{no / max(1, yes + no):15.1%}")


def examples(check: Callable[[Any], None]) -> None:
    """Run a check on many draws."""

    @settings(
        max_examples=IN_EACH,
        derandomize=not CASES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(st.data())
    def run(data: Any) -> None:
        check(data)

    run()


def test_every_statement_is_answered_as_by_one_server_or_refused(
    worlds: list[World], tallies: dict[str, Tally]
) -> None:
    tally = tallies["free grammar"]

    def check(data: Any) -> None:
        world = worlds[data.draw(st.integers(0, N_WORLDS - 1))]
        dice = Dice(world, data.draw)
        awaited = dice.chance(25)
        yield_per = 1 + dice.upto(4) if dice.chance(30) else None
        kind, made, is_ordered = statement(dice)
        try:
            expected = answer_of_one_server(world, made)
        except SQLAlchemyError:
            tally.invalid[kind] += 1  # no SQL: PostgreSQL or SQLAlchemy says so
            return
        note(f"{world} {made}")
        try:
            found = answer_of_shardkit(world, wide(made), awaited=awaited, yield_per=yield_per)
        except RoutingError:
            tally.refused[kind] += 1
            return
        tally.answered[kind] += 1
        assert_alike(found, expected, is_ordered=is_ordered)

    examples(check)
    assert all(tally.answered[kind] for kind in KINDS), tally.answered


def test_what_is_promised_is_never_refused(worlds: list[World], tallies: dict[str, Tally]) -> None:
    promised = [(shape, several) for shape in SHAPES for several in (False, True)
                if (shape.several if several else shape.one)]  # fmt: skip
    promised += 2 * [pair for pair in promised if pair[1]]  # there is more to go wrong
    tally = tallies["supported grammar"]

    def check(data: Any) -> None:
        world = worlds[data.draw(st.integers(0, N_WORLDS - 1))]
        dice = Dice(world, data.draw)
        awaited = dice.chance(25)
        yield_per = 1 + dice.upto(4) if dice.chance(30) else None
        shape, several = promised[dice.upto(len(promised) - 1)]
        made, is_ordered = shape.make(dice, several)
        note(f"{world} {shape.name} {several=} {made}")
        expected = answer_of_one_server(world, made)
        name = f"{shape.name[:40]}, {'several' if several else 'one'}"
        try:
            found = answer_of_shardkit(world, made, awaited=awaited, yield_per=yield_per)
        except RoutingError:
            tally.refused[name] += 1
            raise
        tally.answered[name] += 1
        assert_alike(found, expected, is_ordered=is_ordered)

    examples(check)
