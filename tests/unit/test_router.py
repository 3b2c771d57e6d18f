"""Key values to logical shards."""

from __future__ import annotations

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkit.errors import InvalidShardKeyError
from shardkit.ids import compose
from shardkit.router import Route, Router, Strategy, anywhere, canonical
from shardkit.topology import Role

UUID = uuid.UUID("12345678-1234-5678-1234-567812345678")

# Golden vectors: the shard of a hashed key is stored with the data, so it never changes.
GOLDEN = [
    ("ana", 1024, 881),
    ("", 1024, 734),
    (42, 1024, 150),
    (UUID, 1024, 415),
    (b"\x00", 64, 18),
]


@pytest.mark.parametrize(("value", "total", "shard"), GOLDEN)
def test_hash_golden_vectors(value: object, total: int, shard: int) -> None:
    assert Router(total).shard(Strategy.HASH, value) == shard


@given(st.integers(0, (1 << 40) - 1), st.integers(0, 63), st.integers(0, 1023))
def test_an_id_names_the_shard_it_carries(ms: int, shard: int, sequence: int) -> None:
    assert Router(64).shard(Strategy.EMBEDDED, compose(ms, shard, sequence)) == shard


@pytest.mark.parametrize("value", [None, "7", 7.5, True, -1, 1 << 63, compose(1, 64, 0)])
def test_what_cannot_place_a_row_is_refused(value: object) -> None:
    with pytest.raises(InvalidShardKeyError):
        Router(64).shard(Strategy.EMBEDDED, value)


@pytest.mark.parametrize("value", [None, True, 1.5, ["a"], object()])
def test_what_cannot_be_hashed_is_refused(value: object) -> None:
    with pytest.raises(InvalidShardKeyError):
        Router(64).shard(Strategy.HASH, value)


def test_spellings_of_one_value_have_one_canonical_form() -> None:
    assert canonical("caf\u00e9") == canonical("cafe\u0301")
    assert canonical(uuid.UUID(str(UUID).upper())) == canonical(UUID)
    assert canonical(1) != canonical("1")


def test_hashes_and_placement_spread_evenly() -> None:
    router = Router(16)
    counts = [0] * 16
    for i in range(16_000):
        counts[router.shard(Strategy.HASH, f"user{i}")] += 1
    assert min(counts) > 800
    assert {anywhere(4) for _ in range(200)} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("shards", "kind"), [((3,), "one"), ((1, 2), "some"), ((0, 1, 2, 3), "all")]
)
def test_a_route_is_one_some_or_all(shards: tuple[int, ...], kind: str) -> None:
    assert Route(shards, 4, Role.REPLICA).kind == kind
