"""The id layout."""

from __future__ import annotations

import datetime as dt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkit import ids
from shardkit.errors import InvalidIdError
from shardkit.ids import MAX_ID

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
    if expected == 0:
        return  # the lower bound of all ids, and itself none
    parts = ids.parse(expected)
    assert (parts.logical_shard, parts.sequence) == (shard, sequence)
    assert parts.time == dt.datetime(2026, 1, 1, tzinfo=dt.UTC) + dt.timedelta(milliseconds=ms)


@given(st.integers(1, (1 << 40) - 1), st.integers(0, 8191), st.integers(0, 1023))
def test_parse_reverses_compose(ms: int, shard: int, sequence: int) -> None:
    made = ids.compose(ms, shard, sequence)
    assert 0 <= made <= MAX_ID
    assert ids.shard_of(made) == shard
    assert ids.parse(made).sequence == sequence


@given(st.integers(0, (1 << 50) - 3000), st.integers(1, 3000), st.integers(0, 8191))
def test_a_range_of_states_is_the_ids_composed_one_by_one(first: int, n: int, shard: int) -> None:
    expected = [ids.compose(s >> 10, shard, s & 1023) for s in range(first, first + n)]
    assert ids.expand(first, n, shard) == expected


@pytest.mark.parametrize("value", [-1, 0, 1 << 63, "7", 7.0, None, True])
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
