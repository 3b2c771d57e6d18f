"""Placement policies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import pytest
from sqlalchemy import make_url

from shardkit.clock import Clock
from shardkit.errors import ConfigurationError
from shardkit.placement import LeastLoaded, Pinned, Placement, Weighted, anywhere, bound
from shardkit.testing import FakeClock
from shardkit.topology import Endpoint, PhysicalShard, Role, ShardMap, Topology


def topology(*owners: str) -> Topology:
    url = make_url("postgresql://app@127.0.0.1/db")
    names = dict.fromkeys([*owners, "empty"])
    physical = {n: PhysicalShard(n, Endpoint(n, Role.PRIMARY, url), (), url) for n in names}
    return Topology("t", physical, ShardMap(owners, (1,) * len(owners)))


FOUR = topology("alpha", "alpha", "alpha", "beta")


def bind(policy: object, loads: Mapping[int, float] | None = None) -> Placement:
    return bound(policy, FOUR, lambda: loads or {}, clock=FakeClock())  # type: ignore[arg-type]


def test_anywhere_is_everywhere() -> None:
    assert {anywhere(4) for _ in range(200)} == {0, 1, 2, 3}


def test_a_pinned_place_gets_everything() -> None:
    assert {bind(Pinned(2))(4) for _ in range(50)} == {2}
    assert {bind(Pinned("alpha"))(4) for _ in range(200)} == {0, 1, 2}


def test_weights_are_kept_to() -> None:
    choose = bind(Weighted({"alpha": 1, "beta": 3}))
    counts = Counter(choose(4) for _ in range(8000))
    assert counts[3] == pytest.approx(6000, rel=0.1)
    assert counts[0] == pytest.approx(667, rel=0.3)
    assert set(Counter(bind(Weighted({0: 1, 3: 0, 1: 0.5}))(4) for _ in range(500))) == {0, 1}


@pytest.mark.parametrize(
    "make",
    [
        lambda: Weighted({}), lambda: Weighted({0: 0}), lambda: Weighted({0: -1}),
        lambda: Weighted({0: float("nan")}), lambda: Weighted({0: float("inf")}),
        lambda: Weighted({0: True}), lambda: Weighted({0: "1"}),  # type: ignore[dict-item]
        lambda: bind(Pinned(4)), lambda: bind(Pinned(-1)), lambda: bind(Pinned("gamma")),
        lambda: bind(Pinned(True)), lambda: bind(Pinned("empty")), lambda: bind(Weighted({7: 1})),
        lambda: bind(None), lambda: bind(5), lambda: bind(LeastLoaded),
        lambda: LeastLoaded(max_age=0), lambda: LeastLoaded(max_age=float("inf")),
        lambda: LeastLoaded(max_age=True), lambda: bind(lambda _: 4)(4), lambda: bind(lambda _: None)(4),
    ],
)  # fmt: skip
def test_policies_that_cannot_be_are_refused(make: object) -> None:
    with pytest.raises(ConfigurationError):
        make()  # type: ignore[operator]


def test_the_least_loaded_is_filled_up_to_the_others() -> None:
    choose = bind(LeastLoaded(), {0: 10, 1: 4, 2: 7, 3: 30})
    assert [choose(4) for _ in range(3)] == [1, 1, 1]
    assert Counter(choose(4) for _ in range(6)) == {1: 3, 2: 3}


def test_loads_are_measured_only_when_too_old() -> None:
    clock = FakeClock()
    measured: list[Mapping[int, float]] = [{0: 0, 1: 9}, {0: 9, 1: 0}, {}]
    calls: list[Mapping[int, float]] = []

    def loads() -> Mapping[int, float]:
        calls.append(measured[len(calls)])
        return calls[-1]

    def tick(clock: Clock) -> Placement:
        return bound(LeastLoaded(max_age=10.0), FOUR, loads, clock=clock)

    choose = tick(clock)
    assert [choose(4), choose(4)] == [0, 0]
    assert len(calls) == 1
    clock.advance(10.0)
    assert choose(4) == 1
    clock.advance(10.0)
    assert choose(4) == 1, "a measurement that fails keeps the last one"
    assert len(calls) == 3


def test_before_the_first_measurement_rows_go_anywhere() -> None:
    choose = bind(LeastLoaded(), {})
    assert {choose(4) for _ in range(200)} == {0, 1, 2, 3}
