"""Choice of a reader's endpoint: load, failures, log positions."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable

from sqlalchemy import make_url

from shardkit.replicas import ReplicaSet, Sample
from shardkit.testing import FakeClock
from shardkit.tokens import ONLY_PRIMARY, Need
from shardkit.topology import Endpoint, PhysicalShard, Role

SYSTEM = 7


def shard(n_replicas: int, *, regions: str = "", standby: str = "") -> PhysicalShard:
    urls = [make_url(f"postgresql://u:secret@h:{5000 + i}/d") for i in range(n_replicas + 1)]
    primary = Endpoint("alpha", Role.PRIMARY, urls[0])
    replicas = tuple(
        Endpoint("alpha", Role.REPLICA, url, region=region, standby=standby if i == 0 else "")
        for i, (url, region) in enumerate(itertools.zip_longest(urls[1:], regions, fillvalue=""))
        if isinstance(url, type(urls[0]))
    )
    return PhysicalShard("alpha", primary, replicas, urls[0])


def replica_set(
    n: int = 2, clock: FakeClock | None = None, *, patience: float = 0.0, **options: str
) -> ReplicaSet:
    region = options.pop("region", "")
    numbers = random.Random(4)
    return ReplicaSet(
        shard(n, **options),
        region=region,
        patience=patience,
        clock=clock or FakeClock(),
        chance=numbers.random,
    )


def read(members: ReplicaSet, clock: FakeClock, seconds: Callable[[Endpoint], float]) -> Endpoint:
    chosen = members.choose()
    began = members.members[chosen].began()
    clock.advance(seconds(chosen))
    members.members[chosen].ended(began)
    return chosen


def sample(lsn: int, received: int | None = None, *, at: float = 0.0, timeline: int = 1) -> Sample:
    return Sample(at, SYSTEM, timeline, lsn, lsn if received is None else received, True)


def primary_sample(lsn: int, *, at: float, timeline: int = 1) -> Sample:
    return Sample(at, SYSTEM, timeline, lsn, lsn, False)


def test_reads_spread_over_the_replicas() -> None:
    members = replica_set(3)
    assert {members.choose() for _ in range(200)} == set(members.replicas)


def test_a_replica_that_nobody_knows_yet_is_tried_while_the_time_goes_on() -> None:
    class Going(FakeClock):
        def monotonic(self) -> float:
            self.advance(1e-7)
            return super().monotonic()

    clock = Going()
    members = replica_set(2, clock)
    reads = Counter(read(members, clock, lambda _: 0.001) for _ in range(100))
    assert set(reads) == set(members.replicas)


def test_a_slow_replica_is_read_seldom_and_not_forgotten() -> None:
    clock = FakeClock()
    members = replica_set(2, clock)
    slow = members.replicas[0]
    reads = Counter(
        read(members, clock, lambda e: 0.01 if e is slow else 0.001) for _ in range(20_000)
    )
    assert 0 < reads[slow] / 20_000 < 0.02
    reads = Counter(read(members, clock, lambda _: 0.001) for _ in range(20_000))
    assert reads[slow] / 20_000 > 0.2


def test_a_burst_goes_where_fewer_statements_are_under_way() -> None:
    clock = FakeClock()
    members = replica_set(2, clock)
    for _ in range(200):
        read(members, clock, lambda _: 0.001)
    for _ in range(100):
        members.members[members.choose()].began()
    under_way = [m.under_way for m in members.members.values()]
    assert max(under_way) - min(under_way) <= 2


def test_a_failed_statement_weighs_as_a_second() -> None:
    clock = FakeClock()
    members = replica_set(2, clock)
    for _ in range(50):
        read(members, clock, lambda _: 0.001)
    bad, good = members.replicas
    members.members[bad].ended(members.members[bad].began(), failed=True)
    assert {members.choose() for _ in range(100)} == {good}


def test_a_failed_replica_rests_then_one_reader_tries_it() -> None:
    clock = FakeClock()
    members = replica_set(2, clock)
    bad, good = members.replicas
    members.failed(bad)
    assert {members.choose() for _ in range(50)} == {good}
    clock.advance(1.0)
    assert Counter(members.choose() for _ in range(200))[bad] == 1
    members.failed(bad)
    clock.advance(1.9)
    assert {members.choose() for _ in range(50)} == {good}


def test_a_returning_replica_ramps_up() -> None:
    clock = FakeClock()
    members = replica_set(2, clock)
    back = members.replicas[0]
    members.failed(back)
    clock.advance(1.0)
    members.answered(back)
    early = Counter(members.choose() for _ in range(1_000))[back]
    clock.advance(5.0)
    late = Counter(members.choose() for _ in range(1_000))[back]
    assert 0 < early < 100
    assert late > 400


def test_a_lone_replica_that_failed_leaves_the_primary() -> None:
    members = replica_set(1)
    members.failed(members.replicas[0])
    assert members.choose() is members.primary
    members.answered(members.replicas[0])
    assert members.choose() is members.replicas[0]


def test_no_more_than_half_rest_for_long() -> None:
    clock = FakeClock()
    members = replica_set(4, clock)
    for _ in range(6):
        for endpoint in members.replicas:
            members.failed(endpoint)
    clock.advance(1.0)
    assert sum(not members.is_down(e) for e in members.replicas) == 2
    clock.advance(30.0)
    assert not any(members.is_down(e) for e in members.replicas)


def test_with_no_replica_left_the_primary_answers() -> None:
    members = replica_set(2)
    assert members.choose(excluding=members.replicas) is members.primary
    assert replica_set(0).choose().role is Role.PRIMARY
    assert members.choose(ONLY_PRIMARY) is members.primary


def test_near_replicas_go_first() -> None:
    members = replica_set(3, regions="abb", region="b")
    near = set(members.replicas[1:])
    assert {members.choose() for _ in range(100)} == near
    assert members.choose(excluding=near) is members.replicas[0]


def test_a_replica_known_to_have_replayed_goes_first() -> None:
    members = replica_set(3)
    members.observed(members.replicas[1], sample(100))
    assert {members.choose(Need(SYSTEM, 1, 100)) for _ in range(50)} == {members.replicas[1]}
    assert {members.choose(Need(SYSTEM, 1, 101)) for _ in range(200)} == set(members.replicas)


def test_with_none_known_to_have_replayed_the_synchronous_one_goes_first() -> None:
    members = replica_set(2, standby="r1")
    assert {members.choose(Need(SYSTEM, 1, 101)) for _ in range(50)} == {members.replicas[0]}


def test_a_replica_that_stands_still_behind_is_passed_over() -> None:
    clock = FakeClock()
    members = replica_set(1, clock)
    (stuck,) = members.replicas
    for at in (0.0, 0.1):
        clock.advance(0.1)
        members.observed(stuck, sample(100, 900, at=at))
    assert members.choose(Need(SYSTEM, 1, 100)) is stuck
    assert members.choose(Need(SYSTEM, 1, 101)) is members.primary
    clock.advance(2.0)  # the probe is old: try, and the server says
    assert members.choose(Need(SYSTEM, 1, 101)) is stuck


def test_a_halt_shorter_than_the_patience_proves_nothing() -> None:
    clock = FakeClock()
    members = replica_set(1, clock, patience=1.0)
    (stuck,) = members.replicas
    need = Need(SYSTEM, 1, 101)
    for n in range(10):
        members.observed(stuck, sample(100, 900, at=n / 10))
        clock.advance(0.1)
        assert members.choose(need) is stuck
    members.observed(stuck, sample(100, 100, at=1.0))  # it had replayed all, so it counts anew
    for n in range(11, 21):
        members.observed(stuck, sample(100, 900, at=n / 10))
        clock.advance(0.1)
        assert members.choose(need) is stuck
    members.observed(stuck, sample(100, 900, at=2.1))
    assert members.choose(need) is members.primary


def test_a_replica_that_would_get_there_in_the_time_is_waited_for() -> None:
    clock = FakeClock()
    members = replica_set(1, clock, patience=1.0)
    (slow,) = members.replicas
    for at in (0.0, 1.0):
        members.observed(slow, sample(100 + int(100 * at), 9000, at=at))
    clock.advance(1.0)
    assert members.choose(Need(SYSTEM, 1, 1000)) is slow  # 100 a second, fourfold, for 2 seconds
    assert members.choose(Need(SYSTEM, 1, 1001)) is members.primary


def test_a_replica_that_does_not_answer_probes_is_silent() -> None:
    clock = FakeClock()
    members = replica_set(2, clock)
    dead, alive = members.replicas
    for endpoint in (dead, alive):
        members.observed(endpoint, sample(100, at=0.0))
    assert not members.is_silent(dead)
    clock.advance(1.5)
    assert not members.is_silent(dead)  # nobody asks
    members.observed(alive, sample(100, at=1.5))
    for n_answers in range(1, 6):
        assert not members.is_silent(dead)  # as after a pause of all: somebody answers first
        members.observed(members.primary, primary_sample(100, at=1.4 + n_answers / 50))
    assert members.is_silent(dead)
    assert not members.is_silent(alive)
    assert {members.choose() for _ in range(50)} == {alive}


def test_while_probes_run_no_reader_tries_what_failed() -> None:
    clock = FakeClock()
    members = replica_set(1, clock)
    members.failed(members.replicas[0])
    clock.advance(5.0)
    members.observed(members.primary, primary_sample(100, at=5.0))
    assert members.choose() is members.primary
    members.answered(members.replicas[0])
    assert members.choose() is members.replicas[0]


def test_another_lineage_is_passed_over() -> None:
    members = replica_set(1)
    members.observed(members.replicas[0], sample(900, timeline=2))
    assert members.choose(Need(SYSTEM, 1, 100)) is members.primary
    assert members.choose(Need(SYSTEM + 1, 2, 100)) is members.primary
    assert members.choose(Need(SYSTEM, 2, 100)) is members.replicas[0]


def test_a_lag_in_seconds_is_a_position_of_the_primary() -> None:
    clock = FakeClock()
    members = replica_set(1, clock)
    assert members.need_of_lag(1.0) == ONLY_PRIMARY
    for at in range(10):
        clock.advance(float(at) - clock.monotonic())
        members.observed(members.primary, primary_sample(100 * at, at=float(at)))
    assert members.need_of_lag(2.5) == Need(SYSTEM, 1, 700)
    assert members.need_of_lag(100.0) == Need(SYSTEM, 1, 0)
    clock.advance(3.0)
    assert members.need_of_lag(2.5) == ONLY_PRIMARY


def test_lag_is_known_in_bytes_and_seconds() -> None:
    clock = FakeClock()
    members = replica_set(1, clock)
    (replica,) = members.replicas
    assert members.lag(replica) is None
    for at in range(10):
        clock.advance(float(at) - clock.monotonic())
        members.observed(members.primary, primary_sample(100 * at, at=float(at)))
    members.observed(replica, sample(650, 900, at=9.0))
    assert members.lag(replica) == (250, 3.0)
    members.observed(replica, sample(900, at=9.0))
    assert members.lag(replica) == (0, 0.0)
    members.observed(replica, sample(900, at=9.0, timeline=2))
    assert members.lag(replica) is None


def test_an_endpoint_never_shows_its_password() -> None:
    endpoint = shard(1).primary
    assert "secret" not in f"{endpoint} {endpoint!r} {shard(1)!r}"
