"""Which logical shards a roll-out reaches when."""

from __future__ import annotations

import pytest

from shardkit.errors import ConfigurationError
from shardkit.ops.waves import parse, waves


def sizes(n: int) -> dict[str, int]:
    return {wave.name: len(wave.logical_shards) for wave in waves([range(n)])}


def test_a_roll_out_meets_one_then_a_hundredth_a_tenth_half_and_all() -> None:
    assert sizes(1000) == {"canary": 1, "1 %": 9, "10 %": 90, "50 %": 400, "100 %": 500}


@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 64, 101, 4096])
def test_every_logical_shard_is_in_exactly_one_wave(n: int) -> None:
    found = waves([range(n)])
    reached = [number for wave in found for number in wave.logical_shards]
    assert sorted(reached) == [*range(n)]
    assert all(wave.logical_shards for wave in found)


def test_a_wave_meets_every_physical_shard_as_soon_as_it_can() -> None:
    [canary, first, *_] = waves([range(100), range(100, 200)], (0.0, 1.0, 100.0))
    assert canary.logical_shards == {0}
    assert first.logical_shards == {100}


def test_what_the_option_names() -> None:
    assert parse("all") == (100.0,)
    assert parse("canary,1,10%,50,100") == (0.0, 1.0, 10.0, 50.0, 100.0)


@pytest.mark.parametrize("text", ["", "x", "10,5", "canary,canary", "101", "-1", "nan"])
def test_what_is_no_roll_out_is_said(text: str) -> None:
    with pytest.raises(ConfigurationError, match="roll-out"):
        parse(text)
