"""How long a process believes what a server said of its logical shards, and what it does then."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import pytest

from shardkit import deadline
from shardkit.errors import ShardFencedError
from shardkit.heldmap import HeldMap
from shardkit.owners import FENCE_PATIENCE, Owners
from shardkit.ownership import Answer, claims_of
from shardkit.testing import FakeClock
from shardkit.topology import Hold, ShardMap

FIRST = ShardMap(("alpha", "alpha", "beta"), (1, 1, 1))


@dataclass
class Servers:
    """Stands in for the watch: servers that say what they are told to say, or nothing."""

    held: HeldMap
    clock: FakeClock
    says: dict[str, str | None] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def refresh(self, physical: object) -> None:
        assert isinstance(physical, list | set)
        for name in sorted(physical):
            self.asked.append(name)
            question, at = self.held.asking(name), self.clock.monotonic()
            text = self.says.get(name)
            if text is None:
                self.held.silent(name, question)
            else:
                self.held.told(name, question, at, Answer(1, 1, claims_of(text)))

    def wait(self, logical_shards: Collection[int], seconds: float, *, writes: bool) -> bool:
        """Ask again and again, as the watch does for all that wait."""
        opened: list[bool] = []
        until = self.clock.monotonic() + seconds
        self.held.when_open(logical_shards, lambda: opened.append(True), writes=writes)
        while not opened and self.clock.monotonic() < until:
            self.clock.sleep(0.02)
            self.refresh(self.held.awaited())
        return True

    def hurry(self, physical: object) -> None:
        """Nobody waits for that."""


class World:
    """One process, its clock, and the servers."""

    def __init__(self, **says: str | None) -> None:
        self.clock = FakeClock()
        self.told: list[ShardMap] = []
        self.held = HeldMap(
            FIRST, ("alpha", "beta"), max_age=5.0, on_change=self.told.append, clock=self.clock
        )
        self.servers = Servers(self.held, self.clock, says)
        self.owners = Owners(
            self.held,
            self.servers,  # type: ignore[arg-type]  # what it needs of a watch
            clock=self.clock,
        )

    def owner(self, shard: int) -> str:
        return self.owners.current((shard,)).owner(shard)


HERE = {"alpha": "0 1 active,1 1 active", "beta": "2 1 active"}


def test_everybody_is_asked_before_the_first_use_and_the_owner_after_that() -> None:
    world = World(**HERE)
    assert world.owner(0) == "alpha"
    assert world.servers.asked == ["alpha", "beta"]
    world.clock.advance(4.9)
    assert world.owner(0) == "alpha"
    assert world.owner(2) == "beta"
    assert len(world.servers.asked) == 2
    assert world.held.good_until == pytest.approx(5.0)
    world.clock.advance(0.2)
    assert not world.held.is_current("alpha")
    assert world.held.good_until < world.clock.monotonic()
    assert world.owner(0) == "alpha"
    assert world.servers.asked[2:] == ["alpha"]


def test_a_move_is_noticed_as_soon_as_the_old_owner_has_to_be_asked() -> None:
    world = World(**HERE)
    world.owner(0)
    world.servers.says = {"alpha": "0 2 retired beta,1 1 active", "beta": "0 2 active,2 1 active"}
    assert world.owner(0) == "alpha", "for as long as an answer counts"
    world.clock.advance(5.0)
    assert world.owner(0) == "beta"
    assert world.told[-1].epochs == (2, 1, 1)


def test_an_error_has_the_server_asked_at_once() -> None:
    world = World(**HERE)
    world.owner(0)
    world.servers.says["alpha"] = "0 2 retired beta,1 1 active"
    world.servers.says["beta"] = "0 2 active,2 1 active"
    world.owners.distrust("alpha")
    assert world.owners.whereabouts(0) == ("beta", Hold.HANDED_OVER)
    world.owners.distrust("beta")
    assert world.owners.whereabouts(0) == ("beta", None)


def test_an_answer_to_an_older_question_does_not_end_the_distrust() -> None:
    world = World(**HERE)
    world.owner(0)
    question = world.held.asking("alpha")
    world.owners.distrust("alpha")
    world.held.told(
        "alpha", question, world.clock.monotonic(), Answer(1, 1, claims_of("0 1 active"))
    )
    assert not world.held.is_current("alpha")


def test_silence_changes_no_owner_and_holds_nobody_up_twice() -> None:
    world = World(**HERE)
    world.owner(0)
    world.servers.says["alpha"] = None
    world.clock.advance(5.0)
    assert world.owner(0) == "alpha"
    n_asked = len(world.servers.asked)
    assert world.owner(0) == "alpha"
    assert len(world.servers.asked) == n_asked, "it was asked just now"


def test_whoever_writes_waits_for_a_fence_and_readers_do_not() -> None:
    world = World(alpha="0 1 fenced beta,1 1 active", beta="2 1 active")
    found = world.owners.opened((0,), writes=False)
    assert found.held == {0: Hold.FENCED}
    assert world.held.good_until < 0, "every use looks at it"
    before = world.clock.monotonic()
    with pytest.raises(ShardFencedError, match="fenced") as closed:
        world.owners.opened((0,), writes=True)
    assert closed.value.logical_shard == 0
    assert world.clock.monotonic() - before == pytest.approx(FENCE_PATIENCE, abs=0.1)
    before = world.clock.monotonic()
    with deadline(0.5, clock=world.clock), pytest.raises(ShardFencedError):
        world.owners.opened((0,), writes=True)
    assert world.clock.monotonic() - before == pytest.approx(0.5, abs=0.1)
    assert world.owners.opened((1, 2), writes=True).owner(1) == "alpha", "others are open"


def test_everybody_waits_for_what_was_handed_over_until_it_opens() -> None:
    world = World(alpha="0 2 retired beta,1 1 active", beta="2 1 active")
    ask = world.servers.refresh

    def refresh(physical: object) -> None:
        if world.clock.monotonic() > 1.0:
            world.servers.says["beta"] = "0 2 active,2 1 active"
        ask(physical)

    world.servers.refresh = refresh  # type: ignore[method-assign]
    assert world.owners.opened((0,), writes=False).owner(0) == "beta"
    assert 1.0 < world.clock.monotonic() < 1.5


def test_who_waits_is_told_when_the_answer_is_in_and_not_by_an_older_one() -> None:
    world = World(**HERE)
    told: list[str] = []
    older = world.held.asking("alpha")
    wanted = world.held.wanted(["alpha"])
    world.held.when_answered(wanted, lambda: told.append("in"))
    world.held.silent("alpha", older)
    assert not told
    world.held.silent("alpha", world.held.asking("alpha"))
    assert told == ["in"]
    world.held.when_answered(wanted, lambda: told.append("at once"))
    assert told == ["in", "at once"]


def test_who_waits_for_an_opening_is_told_once_and_its_server_is_the_one_to_be_asked() -> None:
    world = World(alpha="0 1 fenced beta,1 1 active", beta="2 1 active")
    world.owner(0)
    told: list[str] = []

    def writer() -> None:
        told.append("writer")

    def reader() -> None:
        told.append("reader")

    world.held.when_open((0,), reader, writes=False)
    assert told == ["reader"], "readers pass a fence"
    world.held.when_open((0, 1), writer, writes=True)
    assert world.held.awaited() == {"alpha"}
    world.servers.says = {"alpha": "0 2 retired beta,1 1 active", "beta": "2 1 active"}
    world.servers.refresh(["alpha"])
    assert world.held.awaited() == {"beta"}, "where it was handed over to"
    world.servers.says["beta"] = "0 2 active,2 1 active"
    world.servers.refresh(["beta"])
    assert told == ["reader", "writer"]
    assert not world.held.awaited()
    world.held.when_open((0,), writer, writes=True)
    assert told == ["reader", "writer", "writer"], "at once, where it is open"


def test_what_is_on_its_way_is_known_from_either_end() -> None:
    world = World(**HERE)
    world.owner(0)
    assert not world.held.arriving
    world.servers.says["beta"] = "0 0 importing,2 1 active"
    world.servers.refresh(["beta"])
    assert world.held.arriving == {("alpha", "beta"): frozenset({0})}
    world.servers.says = {"alpha": "0 1 active,1 1 fenced beta", "beta": "2 1 active"}
    world.servers.refresh(["alpha", "beta"])
    assert world.held.arriving == {("alpha", "beta"): frozenset({1})}
    world.servers.says = {"alpha": "0 1 active,1 2 retired beta", "beta": "1 2 active,2 1 active"}
    world.servers.refresh(["alpha", "beta"])
    assert not world.held.arriving
