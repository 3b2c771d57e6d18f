"""A promoted server that is not registered yet, while the old primary comes and goes."""

from __future__ import annotations

from dataclasses import replace

from shardkit.ops.failover.machine import (
    CUT,
    Claim,
    Cut,
    Fence,
    Node,
    Policy,
    Refuse,
    Register,
    Repoint,
    View,
    decide,
)

POLICY = Policy(needed=2)
OLD = Node("a", answers=True, timeline=1, position=500, registered=1)
UPSTART = Node("c", answers=True, timeline=2, position=400, registered=1, began=400)
STANDBY = Node(
    "b", answers=True, in_recovery=True, timeline=1, position=400, registered=1, follows=CUT
)


def view(*nodes: Node, **more: bool) -> View:
    return View(nodes, "a", failures=9, failing_for=9.0, **more)  # type: ignore[arg-type]  # flags


def test_an_old_primary_that_comes_back_in_the_middle_is_fenced_and_the_failover_ends() -> None:
    """With the standby following it again it could confirm what the promoted one lacks."""
    assert decide(view(OLD, STANDBY, UPSTART), POLICY) == Fence("a")
    closed = replace(OLD, is_closed=True)
    assert decide(view(closed, STANDBY, UPSTART), POLICY) == Register("c")


def test_a_promotion_by_somebody_else_is_left_alone_while_the_primary_is_followed() -> None:
    following = replace(STANDBY, follows="a", streams=True)
    assert not isinstance(decide(view(OLD, following, UPSTART), POLICY), Register | Fence | Repoint)


def test_whoever_follows_the_old_primary_is_cut_before_the_promoted_one_is_registered() -> None:
    """Found by the simulation: the old primary flapped, and confirmed commits with this standby."""
    gone = Node("a")
    following = replace(STANDBY, follows="a")
    assert decide(view(gone, following, UPSTART), POLICY) == Claim(("b",))
    assert decide(view(gone, replace(following, is_claimed=True), UPSTART), POLICY) == Cut(("b",))
    assert decide(view(gone, STANDBY, UPSTART), POLICY) == Register("c")
    ahead = decide(view(gone, replace(STANDBY, position=450), UPSTART), POLICY)
    assert isinstance(ahead, Refuse)
    assert "b has more" in ahead.why


def test_the_beginning_of_a_record_is_no_reason_where_the_promoted_one_had_it_too() -> None:
    gone, promoted = Node("a"), replace(UPSTART, position=400, began=460)
    assert decide(view(gone, replace(STANDBY, position=450), promoted), POLICY) == Register("c")


def test_a_standby_of_an_older_timeline_has_nothing_that_was_acknowledged_alone() -> None:
    """A receiver that was told to begin there says that it has all before."""
    gone = Node("a", answers=True, in_recovery=True, timeline=2, registered=2, follows=CUT)
    promoted = replace(UPSTART, timeline=3, registered=2)
    assert decide(view(gone, replace(STANDBY, position=999), promoted), POLICY) == Register("c")
    ahead = replace(gone, position=401)
    assert isinstance(decide(view(ahead, STANDBY, promoted), POLICY), Refuse)


def test_too_few_servers_may_lack_what_was_confirmed_meanwhile() -> None:
    gone = Node("a"), Node("b")
    assert isinstance(decide(view(*gone, UPSTART), POLICY), Refuse)
    assert decide(view(*gone, UPSTART, accepts_loss=True), POLICY) == Register("c")


def test_no_standby_is_given_back_to_a_primary_while_another_may_have_been_promoted() -> None:
    """Found by the simulation: the promoted one was cut off, and the old one came back."""
    promoted = Node("c")
    for standby in (STANDBY, replace(STANDBY, follows="c")):
        assert isinstance(decide(view(OLD, standby, promoted), POLICY), Refuse)
        assert decide(view(OLD, standby, promoted, accepts_loss=True), POLICY) == Repoint("b", "a")
    other = replace(STANDBY, name="c", follows="a", streams=True)
    assert decide(view(OLD, STANDBY, other), POLICY) == Repoint("b", "a")
