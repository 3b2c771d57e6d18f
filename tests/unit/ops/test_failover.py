"""When a failover is made, and in which order: decisions on views, without any server."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis.strategies import booleans, builds, integers, lists, none, sampled_from

from shardkit.ops.failover.machine import (
    CUT,
    Action,
    Claim,
    Cut,
    Drain,
    Fence,
    Lead,
    Node,
    Open,
    Policy,
    Promote,
    Refuse,
    Register,
    Rejoin,
    Renew,
    Repoint,
    Rest,
    View,
    Wait,
    decide,
    needed_of,
)

OLD = Node("old", answers=True, timeline=1, position=90, registered=1)
LEFT = Node(
    "left", answers=True, in_recovery=True, timeline=1, position=90, registered=1, follows="old",
    streams=True,
)  # fmt: skip
RIGHT = replace(LEFT, name="right", position=80)
GONE = Node("old")
BOTH = Policy(needed=2)


def lost(*nodes: Node, **changes: object) -> View:
    """A view in which the primary has not answered for long."""
    return View((GONE, *nodes), "old", failures=9, failing_for=9.0, **changes)  # type: ignore[arg-type]


def cut(node: Node, **changes: object) -> Node:
    """A standby that was cut off, by this driver."""
    changed = {"follows": CUT, "streams": False, "is_lost": True, "is_claimed": True, **changes}
    return replace(node, **changed)  # type: ignore[arg-type]


def silent(node: Node, **changes: object) -> Node:
    """A standby that hears nothing of its primary."""
    return replace(node, streams=False, is_lost=True, **changes)  # type: ignore[arg-type]


def test_all_is_well() -> None:
    assert isinstance(decide(View((OLD, LEFT, RIGHT), "old"), BOTH), Rest)


def test_nothing_is_done_before_probes_have_failed_often_and_long_enough() -> None:
    view = lost(silent(LEFT), silent(RIGHT))
    assert isinstance(decide(view, BOTH), Claim)
    assert isinstance(decide(replace(view, failures=2), BOTH), Wait)
    assert isinstance(decide(replace(view, failing_for=0.9), BOTH), Wait)


def test_a_replica_has_to_agree() -> None:
    """The monitor alone may be cut off: as long as replicas hear the primary, nothing is done."""
    assert decide(lost(LEFT, RIGHT), BOTH) == Renew("left")
    renewed = [replace(n, is_renewed=True) for n in (LEFT, RIGHT)]
    assert isinstance(decide(lost(*renewed), BOTH), Wait)
    assert isinstance(decide(lost(renewed[0], silent(RIGHT)), BOTH), Claim)


def test_not_twice_within_the_time_between() -> None:
    view = lost(silent(LEFT, since=59.0), silent(RIGHT))
    assert isinstance(decide(view, BOTH), Wait)
    assert isinstance(decide(view, replace(BOTH, every=50.0)), Claim)
    assert isinstance(decide(replace(view, is_ordered=True), BOTH), Claim), "a person may"


def test_enough_standbys_have_to_be_seen() -> None:
    alone = lost(silent(LEFT))
    assert isinstance(decide(alone, BOTH), Refuse)
    assert isinstance(decide(replace(alone, is_ordered=True), BOTH), Refuse), "a person may not"
    assert isinstance(decide(replace(alone, accepts_loss=True), BOTH), Claim)
    assert isinstance(decide(alone, Policy(needed=1)), Claim)


def test_how_many_are_enough() -> None:
    assert needed_of(3, confirm=1) == 2
    assert needed_of(4, confirm=2) == 2
    assert needed_of(2, confirm=1) == 1
    assert [needed_of(n, confirm=0) for n in (2, 3, 4, 5)] == [1, 1, 2, 2]


def test_the_order_of_a_failover() -> None:
    left, right = silent(LEFT, is_claimed=True), silent(RIGHT, is_claimed=True)
    assert decide(lost(left, right), BOTH) == Fence("old")
    fenced = lost(left, right, fenced=frozenset({"old"}))
    assert decide(fenced, BOTH) == Cut(("left", "right"))
    assert decide(lost(left, right, untouchable=frozenset({"old"})), BOTH) == decide(fenced, BOTH)
    ready = lost(cut(LEFT), cut(RIGHT), fenced=frozenset({"old"}))
    assert decide(ready, BOTH) == Promote("left")
    newer = cut(RIGHT, timeline=2, position=10)
    assert decide(lost(cut(LEFT), newer, fenced=frozenset({"old"})), BOTH) == Promote("right")
    ahead = cut(RIGHT, position=91)
    assert decide(lost(cut(LEFT), ahead, fenced=frozenset({"old"})), BOTH) == Promote("right")


def test_nobody_is_promoted_who_still_receives() -> None:
    receiving = cut(RIGHT, streams=True)
    view = lost(cut(LEFT), receiving, fenced=frozenset({"old"}))
    assert decide(view, BOTH) == Cut(("right",))


def test_a_person_may_choose_who_has_as_much() -> None:
    same = cut(RIGHT, position=LEFT.position)
    view = lost(cut(LEFT), same, fenced=frozenset({"old"}), wanted="right")
    assert decide(view, BOTH) == Promote("right")
    less = lost(cut(LEFT), cut(RIGHT), fenced=frozenset({"old"}), wanted="right")
    assert isinstance(decide(less, BOTH), Refuse)


def test_what_was_promoted_is_registered_then_followed() -> None:
    new = Node("left", answers=True, timeline=2, position=95, registered=1)
    assert decide(lost(new, cut(RIGHT)), BOTH) == Register("left")
    new = replace(new, registered=2)
    view = View((GONE, new, cut(RIGHT)), "left", pooled="old", can_rejoin=frozenset({"old"}))
    assert decide(view, BOTH) == Repoint("right", "left")
    right = replace(RIGHT, follows="left", timeline=2, registered=2)
    view = replace(view, nodes=(GONE, new, right))
    assert decide(view, BOTH) == Lead("left")
    assert decide(replace(view, pooled="left"), BOTH) == Rejoin("old", "left")
    back = replace(LEFT, name="old", follows="left", timeline=2, registered=2)
    assert isinstance(decide(replace(view, nodes=(back, new, right), pooled="left"), BOTH), Rest)


def test_an_old_primary_that_comes_back_is_shut_out_and_never_followed() -> None:
    new = Node("left", answers=True, timeline=2, position=95, registered=2)
    right = replace(RIGHT, follows="left", timeline=2, registered=2)
    view = View((OLD, new, right), "left")
    assert decide(view, BOTH) == Fence("old")
    shut = replace(view, nodes=(replace(OLD, is_closed=True), new, right))
    assert isinstance(decide(shut, BOTH), Wait)
    # The new primary is away, too: the old one is none the more lawful.
    away = View((OLD, Node("left"), right), "left")
    assert decide(away, BOTH) == Fence("old")


def test_a_promotion_by_somebody_else_waits_while_the_old_primary_lives() -> None:
    new = Node("left", answers=True, timeline=2, position=95, registered=1)
    view = View((OLD, new, RIGHT), "old")
    assert isinstance(decide(view, BOTH), Wait)
    assert decide(replace(view, adopts="left"), BOTH) == Fence("old")
    told = replace(view, adopts="left", untouchable=frozenset({"old"}))
    assert decide(told, BOTH) == Register("left")
    assert decide(lost(new, RIGHT), BOTH) == Claim(("right",)), "it may confirm commits still"
    cut = replace(RIGHT, follows=CUT)
    assert decide(lost(new, cut), BOTH) == Register("left")
    assert isinstance(decide(lost(new, RIGHT), replace(BOTH, follows=False)), Wait)


def test_two_promoted_side_by_side_are_for_a_person() -> None:
    one = Node("left", answers=True, timeline=2, position=95, registered=1)
    assert isinstance(decide(lost(one, replace(one, name="right")), BOTH), Refuse)
    both = [replace(n, registered=2) for n in (one, replace(one, name="right"))]
    assert isinstance(decide(lost(*both), BOTH), Refuse)


def test_one_that_only_follows_promotes_nothing() -> None:
    policy = replace(BOTH, acts=False)
    assert isinstance(decide(lost(silent(LEFT), silent(RIGHT)), policy), Wait)
    new = Node("left", answers=True, timeline=2, position=95, registered=1)
    assert decide(lost(new, RIGHT), policy) == Register("left")
    follows = View((GONE, replace(new, registered=2), RIGHT), "left", pooled="old")
    assert decide(follows, policy) == Lead("left"), "who follows whom is not its business"


def test_the_order_of_a_switchover() -> None:
    view = View((OLD, LEFT, RIGHT), "old", wanted="right")
    assert decide(view, BOTH) == Claim(("right",))
    claimed = replace(RIGHT, is_claimed=True)
    view = replace(view, nodes=(OLD, LEFT, claimed))
    assert decide(view, BOTH) == Drain("old", "right")
    closed = replace(OLD, is_closed=True, is_drained=True, is_quiet=True)
    view = replace(view, nodes=(closed, LEFT, claimed), drained=90)
    assert isinstance(decide(view, BOTH), Wait), "the target lacks something"
    level = replace(claimed, position=90)
    view = replace(view, nodes=(closed, LEFT, level))
    assert decide(view, BOTH) == Fence("old")
    stopped = replace(view, nodes=(GONE, cut(LEFT), cut(level)), fenced=frozenset({"old"}))
    assert decide(stopped, BOTH) == Promote("right")
    assert decide(replace(view, untouchable=frozenset({"old"})), BOTH) == Promote("right")


def test_a_switchover_that_was_given_up_is_undone() -> None:
    closed = replace(OLD, is_closed=True, is_drained=True, is_quiet=True)
    assert decide(View((closed, LEFT, RIGHT), "old"), BOTH) == Open("old")
    by_hand = replace(closed, is_drained=False)
    assert isinstance(decide(View((by_hand, LEFT, RIGHT), "old"), BOTH), Rest), "not ours"


def test_standbys_that_were_cut_and_the_primary_lives() -> None:
    assert decide(View((OLD, cut(LEFT), RIGHT), "old"), BOTH) == Repoint("left", "old")


nodes = builds(
    Node,
    name=sampled_from(["old", "left", "right"]),
    answers=booleans(),
    in_recovery=booleans(),
    timeline=integers(1, 3),
    position=integers(0, 3),
    registered=none() | integers(1, 3),
    follows=sampled_from(["old", "left", "right", CUT, None]),
    streams=booleans(),
    is_lost=booleans(),
    is_renewed=booleans(),
    is_closed=booleans(),
    is_drained=booleans(),
    is_quiet=booleans(),
    is_stuck=booleans(),
    is_claimed=booleans(),
)
views = builds(
    View,
    nodes=lists(nodes, min_size=1, max_size=3, unique_by=lambda n: n.name).map(tuple),
    leader=sampled_from(["old", "left", "right"]),
    failures=integers(0, 5),
    failing_for=sampled_from([0.0, 5.0]),
    is_ordered=booleans(),
    fenced=sampled_from([frozenset(), frozenset({"old"}), frozenset({"old", "left", "right"})]),
)


@given(views)
def test_whatever_is_seen_a_promotion_is_safe(view: View) -> None:
    action: Action = decide(view, BOTH)
    if not isinstance(action, Promote):
        return
    standbys = [n for n in view.nodes if n.is_standby]
    chosen = view.node(action.node)
    assert len(standbys) >= BOTH.needed
    assert all(n.is_claimed and n.follows == CUT and not n.streams for n in standbys)
    assert chosen.has == max(n.has for n in standbys)
    assert view.is_ordered or (view.failures >= BOTH.failures and view.failing_for >= 1.0)
    newest = max((n.registered or 0 for n in view.nodes if n.answers), default=0)
    assert not any(n.takes_writes and n.timeline == n.registered == newest for n in view.nodes)
