"""When a second replica is asked, and how often."""

from __future__ import annotations

import random

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
