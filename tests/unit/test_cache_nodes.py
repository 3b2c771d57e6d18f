"""Which cache servers are read: what was missed is deleted first, and a hold is kept."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import pytest

from shardkit.caches import node as nodes_of
from shardkit.caches.backend import Place
from shardkit.caches.nodes import Nodes
from shardkit.caches.slots import SlotMap, ranges_of
from shardkit.caching.operations import UNKNOWN, Answer, Op, Outcome, Request
from shardkit.testing import FakeClock

DONE = Answer(Outcome.DONE)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def asked(nodes: Nodes, *requests: Request, place: Place = Place.USUAL) -> dict[str, list[str]]:
    """Run a call in which every server answers; return what each was asked."""
    batches, _ = nodes.plan(requests, place)
    for batch in batches:
        nodes.succeeded(batch, [DONE] * len(batch.requests))
    return {
        batch.node.name: [f"{each.op.name} {each.key}" for each in batch.requests]
        for batch in batches
    }


def fails(nodes: Nodes, name: str) -> None:
    """Have a server's breaker open."""
    while (node := nodes.named(name)).breaker.is_closed:
        for batch in nodes.plan([Request(Op.READ, "any")])[0]:
            assert batch.node is node
            nodes.failed(batch, ConnectionError("it is gone"))


def heals(nodes: Nodes, clock: FakeClock) -> None:
    """Let time pass until the breaker of the only server is closed."""
    for _ in range(100):
        if nodes.homes[0].breaker.is_closed:
            return
        clock.advance(0.1)
        asked(nodes, Request(Op.READ, "any"))
    raise AssertionError("the breaker stays open")


def test_what_was_missed_is_deleted_before_the_server_is_read(clock: FakeClock) -> None:
    told: list[str] = []
    nodes = Nodes(["a:1"], gutter=["g:1"], clock=clock, on_dirty=told.append)
    assert asked(nodes, Request(Op.LEASE, "k")) == {"a:1": ["LEASE k"]}
    fails(nodes, "a:1")
    assert asked(nodes, Request(Op.PUT, "k")) == {"g:1": ["PUT k"]}
    assert told == ["a:1"]
    assert nodes.dirty == {"a:1"}
    clock.advance(1.5)
    swept = asked(nodes, Request(Op.LEASE, "k"))
    assert swept == {"a:1": ["READ shardkit:nobody", "DELETE k"], "g:1": ["LEASE k"]}
    heals(nodes, clock)
    assert asked(nodes, Request(Op.LEASE, "k")) == {"g:1": ["LEASE k"]}, "the hold is kept"
    asked(nodes, Request(Op.STORE, "l", 1))
    clock.advance(nodes_of.RETURN_HOLD)
    asked(nodes, Request(Op.LEASE, "k"))
    assert not nodes.dirty
    assert asked(nodes, Request(Op.LEASE, "k")) == {"a:1": ["LEASE k"]}
    assert told == ["a:1"]


def test_a_server_that_was_emptied_meanwhile_is_not_held(clock: FakeClock) -> None:
    nodes = Nodes(["a:1"], clock=clock)
    nodes.homes[0].met("first life")
    fails(nodes, "a:1")
    asked(nodes, Request(Op.READ, "k"))
    nodes.homes[0].met("second life")
    heals(nodes, clock)
    asked(nodes, Request(Op.READ, "k"))
    assert asked(nodes, Request(Op.READ, "k")) == {"a:1": ["READ k"]}


def test_relays_reach_a_dirty_server_and_sweep_it_at_once(clock: FakeClock) -> None:
    nodes = Nodes(["a:1"], clock=clock)
    fails(nodes, "a:1")
    assert asked(nodes, Request(Op.DELETE, "k"), place=Place.HOME) == {}
    heals(nodes, clock)
    asked(nodes, Request(Op.DELETE, "l"))  # missed: nobody reads or writes it in the hold
    swept = asked(nodes, Request(Op.READ, "m"), place=Place.HOME)
    assert swept == {"a:1": ["READ shardkit:nobody", "DELETE l", "READ m"]}


def test_a_delete_without_an_answer_is_done_again(clock: FakeClock) -> None:
    nodes = Nodes(["a:1"], clock=clock)
    (batch,), _ = nodes.plan([Request(Op.DELETE, "k")])
    nodes.failed(batch, TimeoutError("late"))
    assert nodes.dirty
    sweep = ["READ shardkit:nobody", "DELETE k"]
    assert asked(nodes, Request(Op.LEASE, "k")) == {"a:1": sweep}
    assert not nodes.dirty, "no hold: it was not left alone"


def test_a_sweep_that_fails_is_done_again(clock: FakeClock) -> None:
    nodes = Nodes(["a:1"], clock=clock)
    nodes.missed(nodes.homes[0], "k")
    (batch,), answers = nodes.plan([Request(Op.LEASE, "k")])
    assert len(answers) == 2
    assert nodes.plan([Request(Op.LEASE, "k")])[0] == [], "one sweeps at a time"
    nodes.failed(batch, TimeoutError("late"))
    (batch,), _ = nodes.plan([Request(Op.LEASE, "k")])
    nodes.succeeded(batch, [DONE, UNKNOWN])
    assert nodes.dirty
    asked(nodes, Request(Op.LEASE, "k"))
    assert not nodes.dirty


def test_more_than_is_remembered_has_to_be_flushed(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes_of, "MOST_MISSED", 3)
    nodes = Nodes(["a:1"], clock=clock)
    for n in range(4):
        nodes.missed(nodes.homes[0], f"k{n}")
    assert nodes.must_flush == nodes.dirty == {"a:1"}
    assert asked(nodes, Request(Op.LEASE, "k")) == {}
    assert not nodes.readmit("a:1")
    nodes.flushed("a:1")
    assert asked(nodes, Request(Op.LEASE, "k")) == {"a:1": ["LEASE k"]}


def test_reading_makes_nothing_dirty(clock: FakeClock) -> None:
    nodes = Nodes(["a:1"], clock=clock)
    (batch,), _ = nodes.plan([Request(Op.LEASE, "k")])
    nodes.failed(batch, TimeoutError("late"))
    assert not nodes.dirty
    nodes = Nodes(["a:1"], gutter=["g:1"], clock=clock)
    (batch,), _ = nodes.plan([Request(Op.DELETE, "k")], Place.GUTTER)
    nodes.failed(batch, TimeoutError("late"))
    assert not nodes.dirty, "a gutter forgets by itself"


def ranges(*owners: str) -> Iterable[tuple[int, int, str]]:
    edges = [round(16384 * n / len(owners)) for n in range(len(owners) + 1)]
    return [
        (first, last - 1, name)
        for (first, last), name in zip(itertools.pairwise(edges), owners, strict=True)
    ]


def test_slots_are_where_the_servers_say() -> None:
    slots = SlotMap("p:")
    nodes = Nodes(["a:1"], owners=slots)
    assert {slots.owner(str(n)) for n in range(100)} == {0}
    slots.learn(ranges("b:1", "a:1", "c:1"), nodes)
    assert {nodes.home(str(n)).name for n in range(1000)} == {"a:1", "b:1", "c:1"}
    for node in nodes.homes:
        key = slots.life_key(node, nodes)
        assert key is not None
        assert nodes.home(key.removeprefix(b"p:").decode()) is node
    a = nodes.named("a:1")
    term = a.term
    nodes.missed(a, next(str(n) for n in range(100) if nodes.home(str(n)) is a))
    slots.learn(ranges("b:1", "d:1", "c:1"), nodes)
    assert a.term > term
    assert nodes.dirty == {"d:1"}, "the heir has missed it"
    assert slots.life_key(a, nodes) is None


@pytest.mark.parametrize(
    "reply", [b"OK", [], None, 5, [1], [[1]], [[1, 2, [b"h"]]], [[1, b"x", [b"h", 1]]], Exception()]
)
def test_what_no_cluster_would_say_is_not_learnt(reply: object) -> None:
    assert ranges_of(reply, "h") is None


def test_a_server_without_a_name_is_who_was_asked() -> None:
    reply: Sequence[object] = [[0, 16383, [b"", 7000, b"id", []], [b"r", 7001, b"id"]]]
    assert ranges_of(reply, "10.0.0.1") == [(0, 16383, "10.0.0.1:7000")]
