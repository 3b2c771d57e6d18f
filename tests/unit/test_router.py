"""Key values to logical shards."""

from __future__ import annotations

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkit.errors import ConfigurationError, InvalidShardKeyError
from shardkit.ids import compose
from shardkit.keys import KeyType
from shardkit.router import Route, Router, UnknownEntriesError
from shardkit.strategies import EMBEDDED, Directory, Hash, Range, Rule, hash_shard
from shardkit.topology import Role

UUID = uuid.UUID("12345678-1234-5678-1234-567812345678")
TEXT, NUMBER = Rule(Hash(), KeyType.TEXT), Rule(Hash(), KeyType.INTEGER)
UUIDS, BYTES = Rule(Hash(), KeyType.UUID), Rule(Hash(), KeyType.BYTES)

# Golden vectors: the shard of a hashed key is stored with the data, so it never changes.
GOLDEN = [
    (TEXT, "ana", 1024, 881),
    (TEXT, "", 1024, 734),
    (TEXT, "caf\u00e9", 8192, 5473),
    (TEXT, "1", 64, 20),
    (NUMBER, 1, 64, 10),
    (NUMBER, 42, 1024, 150),
    (NUMBER, -1, 8192, 1191),
    (UUIDS, UUID, 1024, 415),
    (UUIDS, str(UUID).upper(), 1024, 415),
    (BYTES, b"\x00", 64, 18),
]


@pytest.mark.parametrize(("rule", "value", "total", "shard"), GOLDEN)
def test_hash_golden_vectors(rule: Rule, value: object, total: int, shard: int) -> None:
    assert Router(total).shard(rule, value) == shard


@given(st.integers(1, (1 << 40) - 1), st.integers(0, 63), st.integers(0, 1023))
def test_an_id_names_the_shard_it_carries(ms: int, shard: int, sequence: int) -> None:
    assert Router(64).shard(EMBEDDED, compose(ms, shard, sequence)) == shard


@pytest.mark.parametrize("value", [None, "", "7", 7.5, True, -1, 0, 1 << 63, compose(1, 64, 0)])
def test_what_is_no_id_of_this_cluster_is_refused(value: object) -> None:
    with pytest.raises(InvalidShardKeyError):
        Router(64).shard(EMBEDDED, value)


@given(st.binary(max_size=100), st.integers(1, 8192))
def test_a_hash_is_in_range_and_always_the_same(key: bytes, total: int) -> None:
    assert 0 <= hash_shard(key, total) < total
    assert hash_shard(bytes(bytearray(key)), total) == hash_shard(key, total)


def test_hashes_spread_evenly() -> None:
    router = Router(16)
    counts = [0] * 16
    for i in range(16_000):
        counts[router.shard(TEXT, f"user{i}")] += 1
    assert min(counts) > 800


RANGES = Rule(Range([(0, 3), (100, 1), (200, 3)], rest=2), KeyType.INTEGER)


@pytest.mark.parametrize(
    ("key", "shard"),
    [(-(1 << 63), 3), (-1, 3), (0, 1), (99, 1), (100, 3), (199, 3), (200, 2), ((1 << 63) - 1, 2)],
)
def test_a_range_ends_before_its_bound(key: int, shard: int) -> None:
    assert Router(4).shard(RANGES, key) == shard


@given(st.lists(st.integers(-500, 500), min_size=1, max_size=8, unique=True), st.data())
def test_ranges_agree_with_a_linear_search(bounds: list[int], data: st.DataObject) -> None:
    pairs = [(bound, n) for n, bound in enumerate(sorted(bounds))]
    rule = Rule(Range(pairs, rest=len(pairs)), KeyType.INTEGER)
    router = Router(16)

    def slow(key: int) -> int:
        return next((shard for bound, shard in pairs if key < bound), len(pairs))

    low, high = sorted(data.draw(st.tuples(*[st.integers(-600, 600)] * 2)))
    assert router.shard(rule, low) == slow(low)
    above = router.shards_compared(rule, "ge", low)
    below = router.shards_compared(rule, "le", high)
    assert above is not None
    assert below is not None
    assert above & below >= {slow(key) for key in range(low, high + 1)}


def test_keys_beyond_the_last_range_are_refused_unless_it_is_open() -> None:
    rule = Rule(Range([("m", 0), ("z", 1)]), KeyType.TEXT)
    assert Router(4).shard(rule, "") == 0
    with pytest.raises(InvalidShardKeyError, match="beyond the last range"):
        Router(4).shard(rule, "z")
    assert Router(4).shards_compared(rule, "lt", "c") is None, "collations order differently"


def test_a_comparison_beyond_the_last_range_finds_nothing_there() -> None:
    rule = Rule(Range([(10, 0), (20, 1)]), KeyType.INTEGER)
    assert Router(4).shards_compared(rule, "gt", 50) == frozenset()
    assert Router(4).shards_compared(rule, "lt", 50) == frozenset({0, 1})
    assert Router(4).shards_compared(rule, "lt", 10) == frozenset({0})
    assert Router(4).shards_compared(rule, "le", 10) == frozenset({0, 1})
    assert Router(4).shards_compared(NUMBER, "lt", 50) is None


def test_a_range_on_a_logical_shard_that_does_not_exist_is_refused() -> None:
    rule = Rule(Range([(10, 5)]), KeyType.INTEGER)
    with pytest.raises(ConfigurationError, match="logical shard 5"):
        Router(4).shard(rule, 1)


@pytest.mark.parametrize(
    "bounds",
    [
        [], [(1, 0), (1, 1)], [(2, 0), (1, 1)], [(1, 0), ("b", 1)], [(True, 0)], [(1.5, 0)], [1],
        [(1, -1)], [(1, 8192)], [(1, True)], [(1, "0")], [("e\u0301", 0)], [("a\0", 0)], None,
        [(None, 0)], [(1 << 64, 0)], "ab",
    ],
)  # fmt: skip
def test_ranges_that_cannot_be_are_refused(bounds: object) -> None:
    with pytest.raises(ConfigurationError):
        Range(bounds)  # type: ignore[arg-type]


def test_bounds_must_be_of_the_columns_type() -> None:
    with pytest.raises(ConfigurationError, match="places integer keys"):
        Rule(Range([(1, 0)]), KeyType.TEXT)
    with pytest.raises(ConfigurationError, match="places integer keys"):
        Rule(EMBEDDED.strategy, KeyType.UUID)


def test_directory_keys_are_looked_up_first() -> None:
    directory = Directory("tenants")
    rule = Rule(directory, KeyType.TEXT)
    router = Router(64, {(directory, "a"): 7})
    assert router.shard(rule, "a") == 7
    with pytest.raises(UnknownEntriesError) as caught:
        router.shards(rule, ["a", "b", "c", "b"])
    assert caught.value.entries == ((directory, "b"), (directory, "c"))
    with pytest.raises(InvalidShardKeyError):
        router.shard(rule, 1)


@pytest.mark.parametrize("name", ["", "Tenants", "1a", "a" * 64, "a-b", 'a"', "a\0", "é"])
def test_names_of_directories_are_plain(name: str) -> None:
    with pytest.raises(ConfigurationError):
        Directory(name)


@pytest.mark.parametrize(
    "rule",
    [
        EMBEDDED, TEXT, UUIDS, RANGES, Rule(Directory("a" * 63), KeyType.INTEGER),
        Rule(Range([(UUID, 1)]), KeyType.UUID), Rule(Range([(b"\xff", 1)], rest=0), KeyType.BYTES),
        Rule(Range([("é", 1)]), KeyType.TEXT),
    ],
)  # fmt: skip
def test_the_text_of_a_rule_reads_back(rule: Rule) -> None:
    assert Rule.read(rule.text("key")) == rule


@pytest.mark.parametrize("text", ["", "{}", '{"strategy": "hash", "type": "text", "version": 9}'])
def test_rules_of_a_newer_version_are_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="newer"):
        Rule.read(text)


@pytest.mark.parametrize(
    ("shards", "kind"), [((3,), "one"), ((1, 2), "some"), ((0, 1, 2, 3), "all")]
)
def test_a_route_is_one_some_or_all(shards: tuple[int, ...], kind: str) -> None:
    assert Route(shards, 4, Role.REPLICA).kind == kind
