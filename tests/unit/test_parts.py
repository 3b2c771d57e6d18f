"""What each logical shard runs of one write."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
from sqlalchemy import bindparam, delete, insert, inspect, update

from shardkit.errors import (
    InvalidShardKeyError,
    NoShardKeyError,
    ShardKeyChangeError,
    UnsupportedStatementError,
)
from shardkit.ids import compose, shard_of
from shardkit.parts import Part, changes, changes_of_rows, inserts, placed_rows, refuse_unwritable
from shardkit.router import Router
from tests.models import Country, Like, Photo, User

ROUTER = Router(64)
A, B, C = (compose(5, shard, 0) for shard in (1, 2, 3))
PHOTOS: Any = Photo.__table__


class Minter:
    """Mints ids and notes how often it was asked."""

    def __init__(self) -> None:
        self.asked: list[Mapping[int, int]] = []

    def __call__(self, counts: Mapping[int, int]) -> dict[int, list[int]]:
        self.asked.append(dict(counts))
        return {shard: [compose(9, shard, i) for i in range(n)] for shard, n in counts.items()}


def inserted(statement: Any, params: Any = None) -> tuple[list[Part], Minter]:
    turn, mint = itertools.cycle((1, 2)), Minter()
    shards = placed_rows(statement, params, ROUTER, lambda _: next(turn))
    return inserts(statement, params, shards, mint), mint


def test_rows_go_to_their_shards_with_ids_of_one_call() -> None:
    rows: list[dict[str, Any]] = [
        {"owner_id": A},
        {"owner_id": B, "id": B + 1},
        {"owner_id": A, "id": None},
    ]
    given = [dict(row) for row in rows]
    parts, mint = inserted(insert(Photo), rows)
    assert rows == given
    assert mint.asked == [{1: 2}]
    assert [(part.shard, part.positions) for part in parts] == [(1, (0, 2)), (2, (1,))]
    for part in parts:
        assert isinstance(part.params, list)
        assert {shard_of(row["id"]) for row in part.params} == {part.shard}


def test_rows_without_a_shard_key_of_their_own_are_placed() -> None:
    parts, mint = inserted(insert(User), [{"name": "a"}, {"name": "b"}, {"name": "c"}])
    assert [(part.shard, part.positions) for part in parts] == [(1, (0, 2)), (2, (1,))]
    assert mint.asked == [{1: 2, 2: 1}]


@pytest.mark.parametrize("key", ["owner_id", PHOTOS.c.owner_id])
def test_values_are_split_as_rows_are(key: Any) -> None:
    parts, _ = inserted(insert(Photo).values([{key: A}, {key: B}, {key: A}]))
    assert [(part.shard, part.positions, part.params) for part in parts] == [
        (1, (0, 2), None),
        (2, (1,), None),
    ]
    assert [len(part.statement._multi_values[0]) for part in parts] == [2, 1]


def test_one_row() -> None:
    for statement, params in (
        (insert(Photo).values(owner_id=A), None),
        (insert(Photo), {"owner_id": A}),
        (insert(Photo).values(caption="x"), {"owner_id": A}),
    ):
        [part], mint = inserted(statement, params)
        assert part.shard == 1
        assert mint.asked == [{1: 1}]
    whole: list[tuple[Any, Any]] = [
        (insert(Photo).values(owner_id=A, id=A), None),
        (insert(Photo).values(id=A), [{"owner_id": A}]),
        (insert(Photo).values(owner_id=A), {"id": A}),
        (insert(Like).values(photo_id=A, user_id=1), None),
    ]
    for statement, params in whole:
        [part], mint = inserted(statement, params)
        assert mint.asked == []


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({}, NoShardKeyError),
        ({"id": A}, NoShardKeyError),
        ({"owner_id": None}, InvalidShardKeyError),
        ({"owner_id": "x"}, InvalidShardKeyError),
        ({"owner_id": A, "id": B}, InvalidShardKeyError),
        ({"owner_id": A, "id": "x"}, InvalidShardKeyError),
    ],
)
def test_rows_that_go_nowhere(row: dict[str, Any], error: type[Exception]) -> None:
    for statement, params in (
        (insert(Photo), [{"owner_id": A}, row]),
        (insert(PHOTOS), row),
        (insert(Photo).values([{"owner_id": A}, row]), None),
    ):
        if row or params:
            with pytest.raises(error):
                inserted(statement, params)


def test_keys_go_to_their_own_shard() -> None:
    statement = update(Photo).where(Photo.owner_id.in_([A, B, A + 1])).values(rank=1)
    parts = changes(statement, None, ROUTER, (1, 2))
    assert [part.params for part in parts] == [
        {"shardkit_keys_0": [A, A + 1]},
        {"shardkit_keys_0": [B]},
    ]
    unkeyed = changes(delete(Photo), None, ROUTER, (1, 2))
    assert [part.params for part in unkeyed] == [{}, {}]


def test_sets_of_values_go_to_their_own_shard() -> None:
    mapper = inspect(Photo)
    rows = [{"id": A, "rank": 1}, {"id": B, "rank": 2}, {"id": A + 1, "rank": 3}]
    parts = changes_of_rows(update(Photo), rows, ROUTER, mapper)
    assert [(part.shard, part.params) for part in parts] == [
        (1, [rows[0], rows[2]]),
        (2, [rows[1]]),
    ]
    core = update(PHOTOS).where(PHOTOS.c.id == bindparam("key"))
    keyed = [{"key": A, "rank": 1}, {"key": B, "rank": 2}]
    assert [part.shard for part in changes_of_rows(core, keyed, ROUTER, None)] == [1, 2]
    for row, error in (
        ({"rank": 1}, NoShardKeyError),
        ({"id": "x"}, InvalidShardKeyError),
        ({"id": None}, InvalidShardKeyError),
        ({"id": A, "owner_id": A}, ShardKeyChangeError),
    ):
        with pytest.raises(error):
            changes_of_rows(update(Photo), [rows[0], row], ROUTER, mapper)
    with pytest.raises(UnsupportedStatementError, match="several logical shards"):
        changes_of_rows(update(PHOTOS).values(rank=1), [{}], ROUTER, None)
    with pytest.raises(UnsupportedStatementError, match="delete"):
        changes_of_rows(delete(Photo), rows, ROUTER, mapper)


def test_what_cannot_be_written() -> None:
    refuse_unwritable(update(Photo), None)
    for statement, params in ((update(Country), None), (insert(Photo), []), (update(Photo), [])):
        with pytest.raises(UnsupportedStatementError):
            refuse_unwritable(statement, params)
