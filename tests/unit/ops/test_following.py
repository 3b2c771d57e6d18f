"""Whether a standby follows: by what it has, however it connects."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shardkit.ops.failover.following import PATIENCE, Following
from shardkit.ops.failover.machine import Node, Policy, Rejoin, Rest, View, Wait, decide

PRIMARY = Node("a", answers=True, timeline=2, position=100, registered=2)
# What a receiver that has just begun says that it has, is where it was told to begin.
TORN = Node(
    "b", answers=True, in_recovery=True, timeline=2, position=160, reached=(1, 90), registered=1,
    follows="a", streams=True,
)  # fmt: skip
GOOD = replace(TORN, name="c", position=100, reached=(2, 100), registered=2)


class Watch:
    """Looks once a second, at a primary that writes ten bytes meanwhile."""

    def __init__(self) -> None:
        self.following = Following()
        self.now = 0.0
        self.primary = PRIMARY

    def look(self, *nodes: Node, seconds: int = 1) -> View:
        for _ in range(seconds):
            self.now += 1.0
            self.primary = replace(self.primary, position=self.primary.position + 10)
            self.following.note((self.primary, *nodes), self.primary, self.now)
        seen = [self.following.seen(n) for n in nodes]
        return View((self.primary, *seen), "a", can_rejoin=frozenset({"b", "c"}))

    def good(self) -> Node:
        return replace(GOOD, reached=(2, self.primary.position))


def test_one_that_connects_over_and_over_is_rewound_and_then_copied() -> None:
    watch = Watch()
    flickers = [TORN, replace(TORN, streams=False)]
    for n in range(5):
        view = watch.look(flickers[n % 2], watch.good())
        assert isinstance(decide(view, Policy()), Wait), "connected, and has nothing: not well"
    view = watch.look(TORN, watch.good(), seconds=2)
    assert decide(view, Policy()) == Rejoin("b", "a")
    watch.following.rejoined("b", anew=False)
    assert isinstance(decide(watch.look(TORN, watch.good(), seconds=5), Policy()), Wait)
    assert decide(watch.look(TORN, watch.good(), seconds=2), Policy()) == Rejoin(
        "b", "a", anew=True
    )
    watch.following.rejoined("b", anew=True)
    assert isinstance(decide(watch.look(TORN, watch.good(), seconds=5), Policy()), Wait)
    view = watch.look(watch.good(), replace(watch.good(), name="b"), seconds=2)
    assert isinstance(decide(view, Policy()), Rest)


def test_one_that_has_followed_since_is_rewound_again_first() -> None:
    watch = Watch()
    watch.following.rejoined("b", anew=False)
    watch.look(TORN)
    assert watch.following.seen(TORN).is_rewound
    watch.look(replace(watch.good(), name="b"))
    watch.look(replace(watch.good(), name="b"))
    view = watch.look(replace(TORN, reached=(2, 120)), seconds=9)
    assert decide(view, Policy()) == Rejoin("b", "a")


def test_one_that_gets_nearer_has_time() -> None:
    watch = Watch()
    for n in range(60):
        assert not watch.look(replace(TORN, reached=(1, 20 + n))).node("b").is_stuck
    assert watch.look(replace(TORN, reached=(1, 79)), seconds=9).node("b").is_stuck


@pytest.mark.parametrize(
    "other", [replace(TORN, follows="cut"), replace(TORN, follows=None), Node("b")]
)
def test_who_does_not_follow_this_primary_is_not_judged(other: Node) -> None:
    watch = Watch()
    watch.look(TORN, seconds=4)
    assert not watch.look(other, seconds=9).node("b").is_stuck
    assert not watch.look(TORN, seconds=4).node("b").is_stuck, "it begins anew"


def test_a_time_that_nobody_looked_does_not_count() -> None:
    """A watcher that was frozen, or a primary that was, has not seen that a standby stood still."""
    watch = Watch()
    watch.look(GOOD)
    watch.now += 600.0
    assert not watch.look(GOOD).node("c").is_stuck
    for _ in range(100):
        watch.now += 1.0
        watch.following.note((Node("a"), GOOD), None, watch.now)
    assert not watch.look(GOOD).node("c").is_stuck
    assert watch.look(GOOD, seconds=1 + int(PATIENCE)).node("c").is_stuck


def test_an_idle_standby_that_has_all_follows() -> None:
    following, idle = Following(), replace(GOOD, reached=(2, 100))
    for now in range(60):
        following.note((PRIMARY, idle), PRIMARY, float(now))
    assert following.seen(idle) == idle
