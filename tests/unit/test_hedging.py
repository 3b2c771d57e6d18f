"""When a second replica is asked, and how often."""

from __future__ import annotations

import random

import pytest

from shardkit.hedging import FLOOR, SHARE, Hedges


def test_nothing_is_hedged_before_the_tail_is_known() -> None:
    hedges = Hedges()
    for _ in range(39):
        hedges.answered(0.010)
    assert hedges.delay is None
    hedges.answered(0.010)
    assert hedges.delay == 0.010


def test_the_delay_is_what_97_of_100_reads_take() -> None:
    hedges = Hedges()
    for number in range(400):
        hedges.answered(0.010 if number % 20 else 1.0)
    assert hedges.delay == 1.0
    for number in range(400):
        hedges.answered(0.010 if number % 50 else 1.0)
    assert hedges.delay == 0.010


def test_quick_reads_are_given_a_floor() -> None:
    hedges = Hedges()
    for _ in range(400):
        hedges.answered(0.0001)
    assert hedges.delay == FLOOR


def test_at_most_five_reads_of_a_hundred_are_hedged() -> None:
    hedges, chance = Hedges(), random.Random(7)
    asked = granted = 0
    for _ in range(20_000):
        if chance.random() < 0.5:
            asked += 1
            granted += hedges.spend()
        hedges.answered(0.010)
    assert asked > 9_000
    assert granted <= 20_000 * SHARE
    assert granted > 20_000 * SHARE - 10, "and no fewer than it may be"


@pytest.mark.parametrize("stumbles", [0.003, 0.005, 0.01])
@pytest.mark.parametrize("noise", [0.0, 0.01, 0.03])
def test_the_tail_of_reads_that_stumble_at_random_is_cut(stumbles: float, noise: float) -> None:
    """A model: reads of 0.9 ms, some 12 ms late since the machine is busy, few 150 ms late."""
    chance = random.Random(1)

    def read() -> float:
        seconds = chance.lognormvariate(-7.0, 0.35)
        if chance.random() < noise:
            seconds += chance.expovariate(1 / 0.012)
        return seconds + (0.15 if chance.random() < stumbles else 0.0)

    hedges, plain, hedged, n_second = Hedges(), [], [], 0
    for _ in range(40_000):
        plain.append(read())
        seconds, delay = read(), hedges.delay
        if delay is not None and seconds > delay and hedges.spend():
            n_second += 1
            seconds = min(seconds, delay + read())
        hedges.answered(seconds)
        hedged.append(seconds)
    gain = sorted(plain)[39_960] / sorted(hedged)[39_960]
    assert gain >= 10, f"p99.9 is {gain:.1f} times better"
    assert n_second <= SHARE * len(hedged)
