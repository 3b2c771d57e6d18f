"""Plans of rebalances: the fewest bytes, constraints kept, never worse, nothing left to plan after."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from shardkit.errors import ConfigurationError, RefusedError, TryAgainError
from shardkit.ops.rebalance import exact
from shardkit.ops.rebalance.bounds import least_bytes
from shardkit.ops.rebalance.facts import LEAST_ROWS, Constraints, LogicalShard, Plan, Situation
from shardkit.ops.rebalance.planner import excess_with, moved, plan
from shardkit.ops.rebalance.problem import Problem, Worth, problem_of
from shardkit.ops.rebalance.search import search

NAMES = ("alpha", "beta", "gamma", "delta")


def cluster(
    *owners: str, sizes: list[int] | None = None, places: int = 2, **every: Any
) -> Situation:
    """Return a cluster with a logical shard for each owner, of 100 bytes unless `sizes` says more."""
    shards = tuple(
        LogicalShard(n, owner, 1, sizes[n] if sizes else 100, **every)
        for n, owner in enumerate(owners)
    )
    return Situation("test", NAMES[:places], shards)


@st.composite
def situations(draw: st.DrawFn, most: int = 6, places: int = 3) -> Situation:
    names = NAMES[: draw(st.integers(2, places))]
    held = st.sampled_from(["", "", "", "it is being moved"])
    shard = st.tuples(st.sampled_from(names), st.integers(0, 1000), st.integers(0, 9000), held)
    found = draw(st.lists(shard, min_size=1, max_size=most))
    seconds = draw(st.sampled_from([0.0, 10.0]))
    return Situation("test", names, tuple(
        LogicalShard(n, owner, 1, size, reads=reads, held=why)
        for n, (owner, size, reads, why) in enumerate(found)
    ), seconds)  # fmt: skip


@st.composite
def constraints(draw: st.DrawFn, situation: Situation) -> Constraints:
    some = st.sampled_from(situation.physical)
    weights = st.dictionaries(some, st.sampled_from([Fraction(1, 2), Fraction(1), Fraction(3)]))
    pins = st.dictionaries(st.sampled_from([s.number for s in situation.shards]), some, max_size=2)
    return Constraints(
        weights=draw(weights),
        drained=frozenset(draw(st.sets(some, max_size=1))),
        pins=draw(pins),
        tolerance=draw(st.sampled_from([Fraction(0), Fraction(1, 10), Fraction(1, 2)])),
        load_tolerance=draw(st.sampled_from([None, Fraction(1, 4)])),
        max_moves=draw(st.sampled_from([None, None, 0, 1, 3])),
    )


def asked(data: st.DataObject, **shape: int) -> tuple[Situation, Constraints]:
    """Draw a question that has an answer."""
    situation = data.draw(situations(**shape))
    wanted = data.draw(constraints(situation))
    try:
        problem_of(situation, wanted)
    except (RefusedError, TryAgainError):
        assume(False)
    return situation, wanted


def brute_force(problem: Problem) -> Worth:
    """Return what the best of all placements is worth."""
    every: itertools.product[Any] = itertools.product(*problem.allowed)
    worths = [problem.worth(placement) for placement in every]
    return min(worth for worth in worths if worth[2] <= problem.max_moves)


QUICK = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.filter_too_much]
)


@pytest.fixture(scope="module", autouse=True)
def impatience() -> Iterator[None]:
    """Have the exhaustive search give up early, so that examples reach what is behind it."""
    with patch.object(exact, "MAX_STEPS", 3000):
        yield


@QUICK
@given(st.data())
def test_few_logical_shards_are_placed_as_brute_force_would(data: st.DataObject) -> None:
    problem, _ = problem_of(*asked(data))
    found, proven = search(problem)
    assert proven
    assert problem.worth(found) == brute_force(problem)


@QUICK
@given(st.data())
def test_no_placement_is_below_the_bound(data: st.DataObject) -> None:
    problem, _ = problem_of(*asked(data))
    excess, size_bytes, _ = brute_force(replace(problem, max_moves=len(problem.home)))
    assert excess or least_bytes(problem) <= size_bytes


@QUICK
@given(st.data())
def test_a_plan_keeps_to_its_constraints_and_makes_nothing_worse(data: st.DataObject) -> None:
    situation, wanted = asked(data, most=60, places=4)
    found = plan(situation, wanted)
    after = moved(situation, found.moves)
    for before, shard in zip(situation.shards, after.shards, strict=True):
        assert not before.held or shard.owner == before.owner
        assert shard.owner not in wanted.drained
        assert shard.owner == wanted.pins.get(shard.number, shard.owner) or before.held
    assert wanted.max_moves is None or len(found.moves) <= wanted.max_moves
    assert len({move.logical_shard for move in found.moves}) == len(found.moves)
    if all(move.why == "balance" for move in found.moves):
        assert found.excess_after < found.excess_before or not found.moves
    assert (found.excess_before, found.excess_after) == excess_with(situation, wanted, found.moves)
    assert found.least_bytes is None or found.least_bytes <= found.size_bytes


@QUICK
@given(st.data())
def test_nothing_is_left_to_plan_after_a_plan(data: st.DataObject) -> None:
    situation, wanted = asked(data, most=60, places=4)
    assume(wanted.max_moves is None)
    found = plan(situation, wanted)
    assert plan(moved(situation, found.moves), wanted).moves == ()


@QUICK
@given(st.data())
def test_bounded_plans_reach_a_state_where_nothing_is_left(data: st.DataObject) -> None:
    situation, wanted = asked(data, most=20)
    assume(wanted.max_moves is not None)
    for _ in range(200):
        found = plan(situation, wanted)
        if not found.moves:
            return
        situation = moved(situation, found.moves)
    raise AssertionError("it moves for ever")


def test_a_new_server_gets_its_share_and_nothing_moves_between_the_others() -> None:
    found = plan(cluster(*["alpha"] * 32, *["beta"] * 32, places=3), Constraints())
    assert {move.target for move in found.moves} == {"gamma"}
    # A tenth less than the share of 21 1/3 is 20 whole ones.
    assert [fill.shards for fill in found.after] == [22, 22, 20]
    assert found.size_bytes == found.least_bytes == 2000
    assert found.is_optimal
    assert found.excess_after == 0 < found.excess_before


def test_growth_from_two_servers_to_twenty_with_a_thousand_logical_shards() -> None:
    names = tuple(f"s{n:02d}" for n in range(20))
    sizes = [500 + (n * 7919) % 1000 for n in range(1024)]
    shards = tuple(LogicalShard(n, names[n % 2], 1, sizes[n]) for n in range(1024))
    found = plan(Situation("test", names, shards), Constraints())
    assert found.excess_after == 0
    assert found.least_bytes is not None
    assert found.size_bytes <= 1.02 * found.least_bytes


def test_a_drained_server_is_empty_and_the_others_stay_even() -> None:
    found = plan(
        cluster(*["alpha"] * 8, *["beta"] * 8, *["gamma"] * 8, places=3),
        Constraints(drained=frozenset({"beta"})),
    )
    assert [(fill.physical, fill.shards) for fill in found.after] == [
        ("alpha", 12),
        ("beta", 0),
        ("gamma", 12),
    ]
    assert {move.why for move in found.moves} == {"drain"}
    assert found.is_optimal


def test_a_server_with_twice_the_weight_gets_twice_the_bytes() -> None:
    found = plan(
        cluster(*["alpha"] * 30, places=2),
        Constraints(weights={"beta": Fraction(2)}, tolerance=Fraction(0)),
    )
    assert [fill.shards for fill in found.after] == [10, 20]


def test_load_is_evened_out_where_sizes_are_even() -> None:
    shards = tuple(
        LogicalShard(n, "alpha" if n < 4 else "beta", 1, 100, reads=LEAST_ROWS if n < 4 else 0)
        for n in range(8)
    )
    situation = Situation("test", NAMES[:2], shards, seconds=10.0)
    found = plan(situation, Constraints())
    assert [(fill.size_bytes, fill.load) for fill in found.after] == [(400, 2 * LEAST_ROWS)] * 2
    assert plan(situation, Constraints(load_tolerance=None)).moves == ()
    quiet = replace(situation, shards=tuple(replace(s, reads=min(1, s.reads)) for s in shards))
    assert plan(quiet, Constraints()).moves == ()
    assert any("say nothing" in note for note in plan(quiet, Constraints()).notes)


def test_what_is_pinned_comes_home_and_stays() -> None:
    found = plan(
        cluster("alpha", "alpha", "beta", "beta"), Constraints(pins={0: "beta", 1: "alpha"})
    )
    pinned = next(m for m in found.moves if m.logical_shard == 0)
    assert (pinned.target, pinned.why) == ("beta", "pin")
    assert {m.logical_shard for m in found.moves}.isdisjoint({1})
    assert [fill.shards for fill in found.after] == [2, 2]


def test_moves_are_ordered_so_that_no_server_is_fuller_on_the_way_than_it_has_to() -> None:
    situation = cluster(*["alpha"] * 9, *["beta"] * 9, places=3)
    wanted = Constraints(drained=frozenset({"alpha"}))
    found: Plan = plan(situation, wanted)
    limit = max(fill.size_bytes for fill in found.after)
    for n in range(len(found.moves) + 1):
        halfway = moved(situation, found.moves[:n])
        for name in ("beta", "gamma"):
            assert sum(s.size_bytes for s in halfway.shards if s.owner == name) <= limit


def refused(kind: type[Exception], situation: Situation, **wanted: Any) -> str:
    with pytest.raises(kind) as caught:
        plan(situation, Constraints(**wanted))
    return str(caught.value)


def test_constraints_that_cannot_be_met_are_named() -> None:
    two = cluster("alpha", "alpha", "beta")
    assert "every physical shard is to be drained" in refused(
        RefusedError, two, drained=frozenset({"alpha", "beta"})
    )
    assert "no physical shard is called 'omega'" in refused(
        ConfigurationError, two, drained=frozenset({"omega"})
    )
    assert "there is no logical shard 9" in refused(ConfigurationError, two, pins={9: "beta"})
    text = refused(RefusedError, two, pins={1: "alpha"}, drained=frozenset({"alpha"}))
    assert "logical shard 1 is pinned to 'alpha', which is to be drained" in text
    text = refused(RefusedError, two, drained=frozenset({"alpha"}), max_moves=1)
    assert "need 2 moves, and --max-moves is 1" in text
    held = cluster("alpha", "beta", held="move 7 has claimed it")
    text = refused(TryAgainError, held, drained=frozenset({"alpha"}))
    assert "logical shard 0 has to leave 'alpha', and move 7 has claimed it" in text


def test_what_cannot_be_even_is_left_alone() -> None:
    """One logical shard is larger than all others together: moving it helps nobody."""
    found = plan(cluster("alpha", "beta", "beta", sizes=[1000, 10, 10]), Constraints())
    assert found.moves == ()
    assert found.excess_after == found.excess_before > 0
    assert found.is_optimal


def test_a_plan_of_the_same_question_is_the_same() -> None:
    situation = cluster(*["alpha"] * 50, sizes=[n * 37 % 101 for n in range(50)], places=4)
    assert plan(situation, Constraints()) == plan(situation, Constraints())


def test_an_empty_cluster_has_nothing_to_move() -> None:
    found = plan(cluster("alpha", "beta", sizes=[0, 0]), Constraints())
    assert (found.moves, found.excess_before) == ((), 0)
