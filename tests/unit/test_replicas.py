"""Choice of a reader's endpoint, and tokens."""

from __future__ import annotations

import pytest
from sqlalchemy import make_url

from shardkit.replicas import ReplicaSet, physical_of_token, token_of
from shardkit.testing import FakeClock
from shardkit.topology import Endpoint, PhysicalShard, Role

EVERYTHING = frozenset({"alpha", "beta"})


def shard(n_replicas: int) -> PhysicalShard:
    urls = [make_url(f"postgresql://u:secret@h:{5000 + i}/d") for i in range(n_replicas + 1)]
    primary = Endpoint("alpha", Role.PRIMARY, urls[0])
    replicas = tuple(Endpoint("alpha", Role.REPLICA, url) for url in urls[1:])
    return PhysicalShard("alpha", primary, replicas, urls[0])


def test_reads_spread_over_the_replicas() -> None:
    members = ReplicaSet(shard(3))
    assert {members.choose() for _ in range(200)} == set(members.replicas)


def test_a_failed_replica_rests_then_is_tried_again() -> None:
    clock = FakeClock()
    members = ReplicaSet(shard(2), pause=1.0, clock=clock)
    bad, good = members.replicas
    members.failed(bad)
    assert {members.choose() for _ in range(50)} == {good}
    clock.advance(1.0)
    assert {members.choose() for _ in range(200)} == {bad, good}


def test_an_answer_ends_the_rest() -> None:
    members = ReplicaSet(shard(1), clock=FakeClock())
    members.failed(members.replicas[0])
    assert members.choose() is members.primary
    members.answered(members.replicas[0])
    assert members.choose() is members.replicas[0]


def test_with_no_replica_left_the_primary_answers() -> None:
    members = ReplicaSet(shard(2))
    assert members.choose(excluding=members.replicas) is members.primary
    assert ReplicaSet(shard(0)).choose().role is Role.PRIMARY


def test_a_token_names_what_was_written() -> None:
    assert physical_of_token(token_of({"beta"}), EVERYTHING) == {"beta"}


@pytest.mark.parametrize(
    "token", ["", "0:gamma", "1:alpha", "beta", "0:" + "x" * 10_000, "\x00", "0:alpha:", "9" * 50]
)
def test_a_token_that_cannot_be_read_asks_for_everything(token: str) -> None:
    assert physical_of_token(token, EVERYTHING) == EVERYTHING


def test_an_endpoint_never_shows_its_password() -> None:
    endpoint = shard(1).primary
    assert "secret" not in f"{endpoint} {endpoint!r} {shard(1)!r}"
