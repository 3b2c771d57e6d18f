"""Names of entries, their bytes, rows and floors; and Memcached's replies, bit by bit."""

from __future__ import annotations

import sys
from collections import Counter
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from itertools import combinations, pairwise
from typing import Any
from uuid import UUID

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkit.caches.meta import Life, ProtocolViolation, Replies, answers_of, quick_answer
from shardkit.caches.ring import Ring
from shardkit.caching.entries import decode, encode
from shardkit.caching.floors import SessionFloor
from shardkit.caching.keys import LONGEST_KEY, cache_key, schema_hash
from shardkit.caching.operations import Kind, Op, Request
from shardkit.caching.rows import decode_row, encode_row
from shardkit.testing import FakeClock


def key(*values: Any, table: str = "t") -> str:
    return cache_key(1, 2, 3, table, values)


def test_a_key_reads_as_what_it_is() -> None:
    assert cache_key(1, 2, 42, "photos", (12345,)) == "1:2:42:photos:12345"


def test_keys_of_different_rows_differ() -> None:
    rows: list[tuple[Any, ...]] = [
        (1,), ("1",), (b"1",), (True,), (None,), ("None",), (1, 2), ("1,2",), ("1", "2"), (12,), ("",),
        (Decimal(1),), (UUID(int=1),), (date(2026, 1, 1),), ("2026-01-01",), ("a:b",), ("a%3Ab",),
        ("x" * 300,), ("x" * 301,), ("é",), ("e",), ("\n",), (" ",), (b"\n",), ("s1",), ("#",),
        (datetime(2026, 1, 1),), (datetime(2026, 1, 1, tzinfo=UTC),),  # noqa: DTZ001  the naive one
    ]  # fmt: skip
    keys = [key(*row) for row in rows]
    for (a, one), (b, other) in combinations(zip(rows, keys, strict=True), 2):
        assert one != other, (a, b)
    assert key(1, table="a:1") != key(1, table="a")


@given(st.lists(st.text() | st.integers() | st.binary(), max_size=3))
def test_a_key_is_harmless(values: list[Any]) -> None:
    text = key(*values)
    assert len(text) <= LONGEST_KEY
    assert text.isascii()
    assert all(32 < ord(letter) < 127 for letter in text)


def test_the_schema_hash_differs_with_names_types_and_order() -> None:
    columns = [("id", "BIGINT"), ("name", "TEXT")]
    others = [columns[::-1], columns[:1], [("id", "BIGINT"), ("name", "VARCHAR")]]
    assert schema_hash(columns) not in {schema_hash(other) for other in others}


@given(
    st.sampled_from([Kind.VALUE, Kind.ABSENCE, Kind.MARKER]),
    st.integers(-(2**63), 2**63 - 1),
    st.binary(),
)
def test_entries_round_trip(kind: Kind, version: int, payload: bytes) -> None:
    assert decode(encode(kind, version, payload), 9)[1:] == (9, kind, version, payload)


@given(st.binary(min_size=1))
def test_other_bytes_are_garbage(data: bytes) -> None:
    assert decode(data, 1).kind is Kind.GARBAGE


@given(st.binary(max_size=40), st.data())
def test_a_flipped_bit_is_garbage(payload: bytes, data: st.DataObject) -> None:
    entry = bytearray(encode(Kind.VALUE, 77, payload))
    bit = data.draw(st.integers(0, len(entry) * 8 - 1))
    entry[bit // 8] ^= 1 << bit % 8
    assert decode(bytes(entry), 1).kind is Kind.GARBAGE


def test_rows_round_trip_with_their_types() -> None:
    row = [
        1, -(2**63), 2**64 - 1, 2**200, True, None, 1.5, float("inf"), "text", "", b"bytes", b"",
        Decimal("1.10"), Decimal("0.000"), UUID(int=7),
        datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC), date(2026, 1, 2), time(1, 2, 3, 4),
        timedelta(days=-1, microseconds=3), [1, [2, "x"]], {"a": [1, None], "b": {}},
    ]  # fmt: skip
    packed = encode_row(row)
    assert packed is not None
    back = decode_row(packed, len(row))
    assert back == row
    assert [type(value) for value in back or []] == [type(value) for value in row]


class Colour(Enum):
    RED = 1


@pytest.mark.parametrize("value", [Colour.RED, object(), "\ud800", 3 + 4j, "x" * 2_000_000, {1, 2}])
def test_what_cannot_be_written_is_not_cached(value: Any) -> None:
    assert encode_row([value]) is None


def test_a_row_that_contains_itself_is_not_cached() -> None:
    row: list[Any] = []
    row.append(row)
    assert encode_row(row) is None


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\xc1", b"\x93\x01", b"\x91" * 10_000 + b"\x01", b"\xdd\xff\xff\xff\xff", b"\x80\x04\x95.",
        msgpack.packb([1, 2]), msgpack.packb({"a": 1}), msgpack.packb([msgpack.ExtType(99, b"x")]),
        msgpack.packb([msgpack.ExtType(2, b"short")]), msgpack.packb([msgpack.ExtType(3, b"x")]),
        msgpack.packb([msgpack.ExtType(4, b"\xff")]), msgpack.packb([1]) + b"\x00",
    ],
)  # fmt: skip
def test_bytes_that_are_no_row_are_none(data: bytes) -> None:
    assert decode_row(data, 1) is None


@given(st.binary())
def test_no_bytes_raise(data: bytes) -> None:
    decode_row(data, 3)


def test_a_floor_holds_for_a_minute() -> None:
    clock = FakeClock()
    floor = SessionFloor(clock=clock)
    floor.raise_to("k", 5)
    floor.raise_to("k", 3)
    assert floor.of("k") == 5
    assert floor.of("other") == 0
    clock.advance(60.0)
    assert floor.of("k") == 0


def test_a_session_that_writes_too_much_is_shown_nothing_for_a_while() -> None:
    clock = FakeClock()
    floor = SessionFloor(clock=clock, most=10)
    for n in range(11):
        floor.raise_to(f"k{n}", n + 1)
    assert len(floor) == 10
    assert floor.of("k0") == sys.maxsize
    clock.advance(60.0)
    floor.raise_to("new", 1)
    assert floor.of("k0") == 0
    assert len(floor) == 1


def test_a_ring_shares_evenly_and_moves_little() -> None:
    names = [f"10.0.0.{n}:11211" for n in range(6)]
    keys = [key(n, table="photos") for n in range(30_000)]
    ring = Ring(names)
    shares = Counter(ring.owner(each) for each in keys)
    assert min(shares.values()) > 0.7 * 5000
    assert max(shares.values()) < 1.3 * 5000
    larger = Ring([*names, "10.0.0.6:11211"])
    moved = [each for each in keys if larger.owner(each) != ring.owner(each)]
    assert all(larger.owner(each) == 6 for each in moved)
    assert 0.05 < len(moved) / len(keys) < 0.25


STREAM = (
    b"VA 5 c17 W\r\nVA \r\n\r\nHD c18\r\nEN\r\nNF\r\nEX\r\nSERVER_ERROR out of memory c1\r\nHD\r\n"
)


PIECES = st.sampled_from(
    [b"VA ", b"5", b"0", b"14", b" c17", b" c", b" W", b" Z", b"\r\n", b"EN", b"hello", b"x",
     encode(Kind.ABSENCE, 0, b""), b"9" * 30, b" ", b"VA 5 c17\r\nhello\r\n",
     b"VA 14 c3\r\n" + encode(Kind.ABSENCE, 0, b"") + b"\r\n"]
)  # fmt: skip


@given(st.lists(PIECES, max_size=7).map(b"".join))
def test_the_quick_way_says_what_the_long_way_says(data: bytes) -> None:
    life = Life("a:1", b"life")
    quick = quick_answer(data, life)
    if quick is not None:
        replies = Replies(1)
        replies.feed(data)
        assert [quick] == answers_of([Request(Op.LEASE, "k")], [0], replies.replies, life)


def test_a_hit_goes_the_quick_way() -> None:
    data = encode(Kind.VALUE, 7, b"row")
    found = quick_answer(b"VA %d c17\r\n%b\r\n" % (len(data), data), Life("a:1", b"life"))
    assert found is not None
    assert (found.version, found.payload, found.cas) == (7, b"row", (("a:1", b"life"), 17))


@given(st.lists(st.integers(0, len(STREAM)), max_size=6))
def test_replies_may_arrive_in_any_pieces(cuts: list[int]) -> None:
    replies = Replies(7)
    edges = [0, *sorted(cuts), len(STREAM)]
    for start, end in pairwise(edges):
        replies.feed(STREAM[start:end])
    assert replies.is_complete
    codes = [reply.code for reply in replies.replies]
    assert codes == [b"VA", b"HD", b"EN", b"NF", b"EX", b"SERVER_ERROR", b"HD"]
    assert replies.replies[0][1:] == (17, True, b"VA \r\n")
    assert [reply.cas for reply in replies.replies[1:]] == [18, None, None, None, None, None]


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 400 Bad Request\r\n", b"ERROR\r\n", b"CLIENT_ERROR bad data chunk\r\n", b"\r\n",
        b"VA\r\n", b"VA x\r\n", b"VA -1\r\n", b"VA 99999999999\r\n\r\n", b"VA 1\r\nabc", b"HD cx\r\n",
        b"HD c\r\n", b"x" * 9000, b"HD\r\nHD\r\n", b"+PONG\r\n", b"\0\r\n", b"HD c" + b"9" * 30 + b"\r\n",
    ],
)  # fmt: skip
def test_what_memcached_would_not_say_is_a_violation(data: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        Replies(1).feed(data)
