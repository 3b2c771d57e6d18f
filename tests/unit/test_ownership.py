"""The shard map that the rows of all physical shards make, and which answers are believed."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkit.ownership import Answer, Claimed, State, accepted, claims_of, merged
from shardkit.topology import Hold, ShardMap

NAMES = ("alpha", "beta", "gamma")
FIRST = ShardMap(("alpha", "beta"), (1, 1))


def map_of(rows: Mapping[str, Claimed], before: ShardMap = FIRST) -> ShardMap:
    """Return the map when each physical shard says one thing of logical shard 0."""
    answers = {name: Answer(1, 1, {0: row}) for name, row in rows.items()}
    return merged(FIRST, answers, before, NAMES)


def row(epoch: int, state: str, to: str | None = None) -> Claimed:
    return Claimed(epoch, State(state), to)


@pytest.mark.parametrize(("rows", "owner", "epoch", "hold"), [
    ({}, "alpha", 1, None),
    ({"alpha": row(1, "active")}, "alpha", 1, None),
    ({"beta": row(1, "active")}, "beta", 1, None),
    ({"alpha": row(1, "active"), "beta": row(0, "importing")}, "alpha", 1, None),
    ({"alpha": row(1, "fenced", "beta"), "beta": row(0, "importing")}, "alpha", 1, Hold.FENCED),
    ({"alpha": row(2, "retired", "beta"), "beta": row(0, "importing")}, "beta", 2, Hold.HANDED_OVER),
    ({"alpha": row(2, "retired", "beta"), "beta": row(2, "active")}, "beta", 2, None),
    ({"beta": row(2, "active")}, "beta", 2, None),
    ({"alpha": row(3, "active"), "beta": row(2, "active")}, "alpha", 3, None),
    ({"alpha": row(2, "active"), "beta": row(2, "active")}, "alpha", 2, Hold.DISPUTED),
    ({"beta": row(2, "active"), "gamma": row(2, "active")}, "beta", 2, Hold.DISPUTED),
    ({"alpha": row(2, "fenced"), "beta": row(2, "active")}, "beta", 2, None),
    ({"alpha": row(2, "retired", "delta")}, "alpha", 2, Hold.HANDED_OVER),
])  # fmt: skip
def test_who_owns_it(
    rows: Mapping[str, Claimed], owner: str, epoch: int, hold: Hold | None
) -> None:
    found = map_of(rows)
    assert (found.owner(0), found.epochs[0], found.held.get(0)) == (owner, epoch, hold)
    assert (found.owner(1), found.epochs[1]) == ("beta", 1), "nobody spoke of it"


def test_of_two_owners_the_one_that_was_known_stays() -> None:
    before = ShardMap(("gamma", "beta"), (1, 1))
    found = map_of({"beta": row(2, "active"), "gamma": row(2, "active")}, before)
    assert (found.owner(0), found.held[0]) == ("gamma", Hold.DISPUTED)


def test_rows_are_read_as_they_are_asked_for() -> None:
    assert claims_of("0 1 active,1 2 retired beta") == {
        0: row(1, "active"), 1: row(2, "retired", "beta"),
    }  # fmt: skip
    assert claims_of("") == {}
    with pytest.raises(ValueError, match="unheard"):
        claims_of("0 1 unheard")


def test_another_server_and_one_that_missed_a_promotion_are_not_believed() -> None:
    known = Answer(7, 2, {0: row(2, "active")})
    assert accepted(known, Answer(8, 2, {})) is None
    assert accepted(known, Answer(7, 1, {})) is None
    assert accepted(known, Answer(7, 3, {}, registered=2)) is None, "promoted behind our back"
    newer = Answer(7, 3, {0: row(3, "active")}, registered=3)
    assert accepted(known, newer) == newer


def test_what_was_seen_once_does_not_go_back() -> None:
    known = Answer(7, 1, {0: row(3, "active"), 1: row(2, "retired", "beta"), 2: row(1, "active")})
    found = accepted(known, Answer(7, 1, {0: row(2, "active"), 2: row(1, "fenced", "beta")}))
    assert found is not None
    assert found.rows == {0: row(3, "active"), 2: row(1, "fenced", "beta")}


claims = st.builds(
    Claimed, st.integers(0, 4), st.sampled_from(State), st.sampled_from([None, *NAMES, "delta"])
)
worlds = st.dictionaries(st.sampled_from(NAMES), claims)


@settings(max_examples=400, deadline=None)
@given(worlds)
def test_the_map_says_what_the_rules_say(world: Mapping[str, Claimed]) -> None:
    found = map_of(world)
    counted = {n: r for n, r in world.items() if r.epoch >= 1}
    if not counted:
        assert (found.owner(0), found.epochs[0], found.held) == ("alpha", 1, {})
        return
    top = max(r.epoch for r in counted.values())
    assert found.epochs[0] == top, "the highest epoch wins"
    states = {n: r.state for n, r in counted.items() if r.epoch == top}
    active = [n for n, s in states.items() if s is State.ACTIVE]
    hold = found.held.get(0)
    assert (hold is None) == (len(active) == 1), "open only where exactly one says so"
    if len(active) == 1:
        assert found.owner(0) == active[0]
    elif len(active) > 1:
        assert hold is Hold.DISPUTED
        assert found.owner(0) in active
    if hold is Hold.FENCED:
        assert states[found.owner(0)] is State.FENCED
    if hold is Hold.HANDED_OVER:
        assert set(states.values()) <= {State.RETIRED, State.IMPORTING}


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(NAMES), claims), max_size=12))
def test_epochs_of_the_map_never_fall(said: list[tuple[str, Claimed]]) -> None:
    """Whatever servers say in whatever order, silent ones keeping their last word."""
    answers: dict[str, Answer] = {}
    found = FIRST
    for name, claim in said:
        believed = accepted(answers.get(name), Answer(1, 1, {0: claim}))
        if believed is not None:
            answers[name] = believed
        before, found = found, merged(FIRST, answers, found, NAMES)
        assert found.epochs[0] >= before.epochs[0]
