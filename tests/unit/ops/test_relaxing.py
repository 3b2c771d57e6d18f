"""When commits go unconfirmed, and what that may cost: decisions on views, without any server."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis.strategies import booleans, builds, integers, lists, sampled_from

from shardkit.ops.failover.relaxing import (
    Confirm,
    Follower,
    Relax,
    Restore,
    Rules,
    Seen,
    decide,
    is_short,
)
from shardkit.ops.intervals import RELAXED, RESTORED, Interval, Loss, Note, intervals, loss
from shardkit.ops.standbynames import lowered, named_standbys

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
BOTH = "ANY 1 (left, right)"
TWO = "ANY 2 (left, right)"
LEFT, RIGHT = Follower("left"), Follower("right")
WELL = Seen("old", BOTH, followers=(LEFT, RIGHT))
LONG = Rules(1, is_relaxed=True, patience=10.0)
OPEN = Interval("old", NOON, 90, BOTH, lowered=("",))
ALONE = Seen("old", BOTH, short_for=11.0)
LOWERED = Seen("old", "", is_own=True, open=OPEN, is_lowered=True)


def test_enough_standbys_are_left_alone() -> None:
    assert decide(WELL, LONG) is None
    assert decide(replace(WELL, followers=(LEFT,)), LONG) is None
    assert not is_short(WELL)


def test_commits_go_unconfirmed_after_patience() -> None:
    assert is_short(ALONE)
    assert decide(replace(ALONE, short_for=9.9), LONG) is None
    assert decide(ALONE, LONG) == Relax("old", 0, ("left", "right"))


def test_strict_waits_for_ever() -> None:
    assert decide(replace(ALONE, short_for=1e9), Rules(1)) is None


def test_as_many_as_are_there_have_to_confirm() -> None:
    seen = Seen("old", TWO, followers=(LEFT,), short_for=11.0)
    assert decide(seen, replace(LONG, confirm=2)) == Relax("old", 1, ("right",))


def test_nobody_is_relaxed_while_a_failover_may_have_taken_the_standbys() -> None:
    assert decide(replace(ALONE, may_relax=False), LONG) is None


@pytest.mark.parametrize(
    "follower",
    [
        Follower("left", streams=False),
        Follower("left", behind=8, silence=2.5),  # frozen: it lacks log and says nothing
        Follower("mover"),
    ],
)
def test_who_cannot_confirm_does_not_count(follower: Follower) -> None:
    assert is_short(replace(ALONE, followers=(follower,)))


def test_a_standby_that_lacks_nothing_may_be_silent() -> None:
    assert not is_short(replace(WELL, followers=(Follower("left", silence=99.0),)))


def test_it_is_restored_when_a_standby_has_caught_up() -> None:
    behind = Follower("left", behind=2 << 20)
    assert decide(replace(LOWERED, followers=(behind,)), LONG) is None
    assert decide(replace(LOWERED, followers=(LEFT,)), LONG) == Restore("old")


def test_what_alter_system_had_set_is_set_again() -> None:
    seen = replace(LOWERED, open=replace(OPEN, is_own=True), followers=(LEFT,))
    assert decide(seen, LONG) == Restore("old", BOTH)


def test_an_interval_ends_when_standbys_confirm() -> None:
    seen = replace(WELL, open=OPEN)
    assert decide(seen, LONG) == Confirm("old")
    assert decide(replace(seen, followers=()), LONG) is None


def test_a_watcher_killed_between_line_and_setting_is_followed_by_one_that_goes_on() -> None:
    assert decide(replace(ALONE, open=OPEN), LONG) == Relax("old", 0, ("left", "right"))


def test_one_of_two_is_better_than_none() -> None:
    rules, wide = replace(LONG, confirm=2), replace(OPEN, setting=TWO)
    seen = replace(LOWERED, open=wide, followers=(LEFT,))
    assert decide(seen, rules) == Relax("old", 1, ("right",))
    one = replace(seen, setting=lowered(TWO, 1))
    assert decide(one, rules) is None
    assert decide(replace(one, followers=(), short_for=11.0), rules) == Relax(
        "old", 0, ("left", "right")
    )


def test_strict_again_restores_at_once() -> None:
    assert decide(LOWERED, Rules(1)) == Restore("old")


def test_a_server_copied_from_a_relaxed_one_gives_way_to_its_file() -> None:
    elsewhere = replace(OPEN, server="other")
    assert decide(replace(LOWERED, open=elsewhere), LONG) == Restore("old")
    assert decide(replace(LOWERED, open=None), LONG) == Restore("old")


def test_what_a_person_has_set_too_low_is_left_to_the_doctor() -> None:
    seen = replace(WELL, is_own=True)
    assert decide(seen, replace(LONG, confirm=2)) is None
    assert decide(replace(seen, setting=""), LONG) is None


def test_a_wildcard_tells_nothing() -> None:
    assert decide(replace(ALONE, setting="ANY 1 (*)"), LONG) is None


FOLLOWERS = lists(
    builds(Follower, sampled_from(["left", "right"]), booleans(), integers(0, 2 << 20)), max_size=2
)


@given(FOLLOWERS, FOLLOWERS, booleans(), booleans())
def test_done_what_it_says_it_comes_to_rest(
    before: list[Follower], after: list[Follower], relaxed: bool, crash: bool
) -> None:
    """Whatever standbys do, the line is there before the setting, and all ends well."""
    rules = Rules(1, is_relaxed=relaxed)
    seen = Seen("old", BOTH)
    for followers in (before, after, [LEFT, RIGHT]):
        for _ in range(4):
            now = replace(seen, followers=tuple(followers))
            short = 99.0 if is_short(now) else 0.0
            step = decide(replace(now, short_for=short), rules)
            seen = _done(seen, step, crash=crash)
            crash = False
            assert named_standbys(seen.setting)[0] or seen.open is not None
            assert seen.open is None or relaxed
    assert (seen.setting, seen.open) == (BOTH, None)


def _done(seen: Seen, step: Any, *, crash: bool) -> Seen:
    match step:
        case Relax(_, number, missing):
            begun = seen.open or Interval("old", NOON, 1, seen.setting, missing=missing)
            lower = seen.setting if crash else lowered(begun.setting, number)
            return replace(seen, open=begun, setting=lower, is_own=not crash, is_lowered=True)
        case Restore():
            return replace(seen, setting=BOTH, is_own=False)
        case Confirm():
            return replace(seen, open=None)
    return seen


def test_lines_become_intervals() -> None:
    notes = [
        Note(RESTORED, "old", NOON, 1),
        Note(RELAXED, "old", NOON, 2, {"setting": TWO, "is_own": True, "to": "x", "missing": ["left"]}),
        Note(RELAXED, "old", NOON, 3, {"setting": "x", "to": ""}),
        Note(RESTORED, "old", NOON + timedelta(seconds=9), 4),
        Note(RELAXED, "new", NOON, 5, {"setting": BOTH, "to": ""}),
    ]  # fmt: skip
    first, second = intervals(notes)
    assert first == Interval(
        "old", NOON, 2, TWO, is_own=True, missing=("left",), lowered=("x", ""),
        until=NOON + timedelta(seconds=9), until_position=4,
    )  # fmt: skip
    assert second.is_open
    assert second.server == "new"
    assert first.plain()["until_position"] == "0/4"


def test_what_a_failover_may_lose() -> None:
    ended = replace(OPEN, until=NOON, until_position=120)
    assert loss([], saw=True, position=100) is None
    assert loss([ended], saw=True, position=120) is None
    assert loss([ended], saw=True, position=119) == Loss(119, NOON)
    assert loss([OPEN], saw=True, position=500) == Loss(500, NOON)
    assert loss([], saw=False, position=256) == Loss(256, None)
    assert "0/100" in str(Loss(256, None))
    assert "2026-01-01 12:00:00 UTC" in str(Loss(256, NOON))


@pytest.mark.parametrize(
    ("text", "number", "expected"),
    [
        (BOTH, 0, ""),
        (TWO, 1, 'ANY 1 ("left", "right")'),
        ('first 2 (a, "B c", "d""e")', 1, 'FIRST 1 ("a", "B c", "d""e")'),
        ("a, b", 1, 'FIRST 1 ("a", "b")'),
    ],
)
def test_a_setting_is_lowered(text: str, number: int, expected: str) -> None:
    assert lowered(text, number) == expected
    assert named_standbys(expected)[1] == (named_standbys(text)[1] if number else ())
