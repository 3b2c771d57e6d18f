"""The breakers of one physical shard: who may open, and who is told."""

from __future__ import annotations

import pytest
from sqlalchemy import make_url

from shardkit.breaker import Breaker
from shardkit.breakers import Breakers, may_eject
from shardkit.events import BreakerChanged, Event, Listeners
from shardkit.testing import FakeClock
from shardkit.topology import Endpoint, PhysicalShard, Role
from shardkit.windows import BreakerRules, Cause


def shard(n_replicas: int) -> PhysicalShard:
    urls = [make_url(f"postgresql://u:secret@h:{5000 + i}/d") for i in range(n_replicas + 1)]
    primary = Endpoint("alpha", Role.PRIMARY, urls[0])
    replicas = tuple(Endpoint("alpha", Role.REPLICA, url) for url in urls[1:])
    return PhysicalShard("alpha", primary, replicas, urls[0])


def fail(breaker: Breaker, times: int = 5) -> None:
    for _ in range(times):
        breaker.failed(ConnectionRefusedError(), 0.0)


@pytest.mark.parametrize(("n_replicas", "most"), [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (8, 4)])
def test_at_most_half_of_the_replicas_are_left_alone(n_replicas: int, most: int) -> None:
    breakers = Breakers(shard(n_replicas), clock=FakeClock())
    for endpoint, breaker in breakers.items():
        if endpoint.role is Role.REPLICA:
            fail(breaker, 20)
    assert sum(not breaker.is_closed for breaker in breakers.values()) == most


def test_a_replica_that_recovers_makes_room_for_another() -> None:
    clock = FakeClock()
    members = shard(2)
    breakers = Breakers(members, clock=clock)
    first, second = (breakers[replica] for replica in members.replicas)
    fail(first)
    fail(second)
    clock.advance(1.3)
    probe = first.admit()
    fail(second)
    assert second.is_closed, "half-open is not back yet"
    for _ in range(3):
        first.succeeded(0.01, probe)
        probe = first.admit()
    fail(second)
    assert first.is_closed
    assert not second.is_closed


def test_the_only_primary_fails_fast_when_it_fails_but_is_never_given_up_for_slowness() -> None:
    members = shard(2)
    breakers = Breakers(members, clock=FakeClock())
    primary = breakers[members.primary]
    for _ in range(100):
        primary.succeeded(30.0)
    assert primary.is_closed
    for replica in members.replicas:
        fail(breakers[replica])
    fail(primary)
    assert not primary.is_closed, "whatever its replicas do"


@pytest.mark.parametrize("cause", list(Cause))
def test_the_rule(cause: Cause) -> None:
    assert may_eject(Role.REPLICA, cause, n_replicas=4, n_ejected=1)
    assert not may_eject(Role.REPLICA, cause, n_replicas=4, n_ejected=2)
    primary = may_eject(Role.PRIMARY, cause, n_replicas=0, n_ejected=0)
    assert primary is (cause is not Cause.SLOW)


def test_listeners_of_the_cluster_hear_of_every_change() -> None:
    clock = FakeClock()
    listeners = Listeners()
    heard: list[Event] = []
    listeners.add(heard.append)
    members = shard(1)
    breakers = Breakers(
        members, listeners=listeners, clock=clock, uniform=lambda low, high: (low + high) / 2,
        rules=BreakerRules(successes=1),
    )  # fmt: skip
    breaker = breakers[members.replicas[0]]
    fail(breaker)
    clock.advance(1.0)
    breaker.succeeded(0.01, breaker.admit())
    where = ("alpha", "replica", "alpha/replica@h:5001/d")
    assert heard == [
        BreakerChanged(*where, "closed", "open", "consecutive failures", 1.0),
        BreakerChanged(*where, "open", "half-open", None, None),
        BreakerChanged(*where, "half-open", "closed", None, None),
    ]
    assert "secret" not in repr(heard)


def test_each_endpoint_has_its_own() -> None:
    members = shard(3)
    breakers = Breakers(members)
    assert list(breakers) == list(members.endpoints)
    assert len({id(breaker) for breaker in breakers.values()}) == len(breakers) == 4
