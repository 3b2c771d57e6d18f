"""The id layout and the minter that hands ids out of leased blocks."""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkit import ids
from shardkit.errors import InvalidIdError
from shardkit.ids import MAX_ID, IdMinter
from shardkit.testing import FakeClock

# Golden vectors: (milliseconds, logical shard, sequence, id). They never change: ids are stored.
GOLDEN = [
    (0, 0, 0, 0),
    (0, 0, 1, 1),
    (0, 1, 0, 1 << 10),
    (1, 0, 0, 1 << 23),
    (1_000, 42, 7, 8_388_651_015),
    ((1 << 40) - 1, 8191, 1023, (1 << 63) - 1),
]


@pytest.mark.parametrize(("ms", "shard", "sequence", "expected"), GOLDEN)
def test_golden_vectors(ms: int, shard: int, sequence: int, expected: int) -> None:
    assert ids.compose(ms, shard, sequence) == expected
    parts = ids.parse(expected)
    assert (parts.logical_shard, parts.sequence) == (shard, sequence)
    assert parts.time == dt.datetime(2026, 1, 1, tzinfo=dt.UTC) + dt.timedelta(milliseconds=ms)


@given(st.integers(0, (1 << 40) - 1), st.integers(0, 8191), st.integers(0, 1023))
def test_parse_reverses_compose(ms: int, shard: int, sequence: int) -> None:
    made = ids.compose(ms, shard, sequence)
    assert 0 <= made <= MAX_ID
    assert ids.shard_of(made) == shard
    assert ids.parse(made).sequence == sequence


@pytest.mark.parametrize("value", [-1, 1 << 63, "7", 7.0, None, True])
def test_what_is_not_an_id_is_refused(value: object) -> None:
    with pytest.raises(InvalidIdError, match="is not an id"):
        ids.shard_of(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "parts", [(-1, 0, 0), (1 << 40, 0, 0), (0, 8192, 0), (0, -1, 0), (0, 0, 1024)]
)
def test_parts_out_of_range_are_refused(parts: tuple[int, int, int]) -> None:
    with pytest.raises(InvalidIdError):
        ids.compose(*parts)


def test_the_ids_of_a_moment_lie_between_its_bounds() -> None:
    moment = dt.datetime(2026, 11, 20, 12, 0, 0, 5_000, tzinfo=dt.UTC)
    ms = (moment - dt.datetime(2026, 1, 1, tzinfo=dt.UTC)) // dt.timedelta(milliseconds=1)
    inside = ids.compose(ms, 17, 3)
    assert ids.min_id_at(moment) <= inside <= ids.max_id_at(moment)
    assert ids.max_id_at(moment) + 1 == ids.min_id_at(moment + dt.timedelta(milliseconds=1))


def test_a_moment_without_time_zone_is_refused() -> None:
    with pytest.raises(InvalidIdError, match="time zone"):
        ids.min_id_at(dt.datetime(2026, 11, 20))  # noqa: DTZ001  the case under test


class Leases:
    """A database's side of leasing: ranges that never overlap."""

    def __init__(self) -> None:
        self.state: dict[int, int] = {}
        self.calls: list[dict[int, int]] = []

    def __call__(self, counts: Mapping[int, int]) -> dict[int, int]:
        self.calls.append(dict(counts))
        firsts = {}
        for shard, n in counts.items():
            firsts[shard] = self.state.get(shard, 0) + 1
            self.state[shard] = firsts[shard] + n - 1
        return firsts


def test_minted_ids_are_distinct_ascending_and_carry_their_shard() -> None:
    minter = IdMinter(Leases(), block_size=8, clock=FakeClock())
    made = [new for _ in range(50) for new in minter.mint({5: 3})[5]]
    assert made == sorted(set(made))
    assert {ids.shard_of(new) for new in made} == {5}


def test_one_lease_serves_a_block_and_several_shards_share_a_call() -> None:
    leases = Leases()
    minter = IdMinter(leases, block_size=8, clock=FakeClock())
    minter.mint({1: 1, 2: 1})
    for _ in range(7):
        minter.mint({1: 1, 2: 1})
    assert leases.calls == [{1: 8, 2: 8}]
    minter.mint({1: 20})
    assert leases.calls[1:] == [{1: 20}]


def test_what_is_left_of_an_old_block_is_dropped() -> None:
    leases, clock = Leases(), FakeClock()
    minter = IdMinter(leases, block_size=8, block_ttl=0.2, clock=clock)
    first = minter.mint({1: 1})[1][0]
    clock.advance(0.2)
    second = minter.mint({1: 1})[1][0]
    assert len(leases.calls) == 2
    assert second == first + 8


def test_a_slow_lease_still_mints_what_was_asked_for() -> None:
    clock = FakeClock()
    leases = Leases()

    def slow(counts: Mapping[int, int]) -> dict[int, int]:
        clock.advance(5.0)
        return leases(counts)

    minter = IdMinter(slow, block_size=8, block_ttl=0.2, clock=clock)
    assert len(minter.mint({1: 3})[1]) == 3
    minter.mint({1: 1})
    assert len(leases.calls) == 2, "the rest of a block that arrived late is not used"


def test_a_child_process_does_not_mint_its_parents_ids() -> None:
    minter = IdMinter(Leases(), block_size=64, clock=FakeClock())
    minter.mint({1: 1})
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover - the child's coverage is not collected
        os.write(writer, b"%d" % len(minter._blocks))
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 10) == b"0"
    assert len(minter._blocks) == 1
