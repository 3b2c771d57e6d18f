"""Many rows by primary key, on real servers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, event, select, tuple_, update
from sqlalchemy.orm import selectinload

from shardkit import AsyncCluster, Cluster, ids
from shardkit.errors import InvalidShardKeyError
from shardkit.session import ReadSession
from shardkit.tokens import ASK_PRIMARIES
from tests.fixtures.sharded import Settled
from tests.models import Country, Handle, Like, Photo, Tenant, User

pytestmark = pytest.mark.integration

SHARDS = (1, 2, 40, 41)


@pytest.fixture
def users(cluster: Cluster) -> list[int]:
    """Ids of users on four logical shards of two physical shards, each with a photo and likes."""
    keys = []
    for shard, n in itertools.product(SHARDS, range(3)):
        key = ids.compose(1, shard, n)
        with cluster.writer() as session:
            photo = Photo(id=key, caption=f"{shard} {n}")
            session.add(User(id=key, name=f"user {shard} {n}", photos=[photo]))
            session.flush()
            session.add_all(Like(photo_id=key, user_id=fan) for fan in (7, 8))
            session.commit()
        keys.append(key)
    return keys


@pytest.fixture
def reader(cluster: Cluster) -> Iterator[ReadSession]:
    """A session on the primaries, which have what was just written."""
    with cluster.reader(after=ASK_PRIMARIES) as session:
        yield session


def test_rows_come_in_order_with_none_for_the_missing(
    users: list[int], reader: ReadSession
) -> None:
    missing = ids.compose(9, 3, 9)
    wanted = [users[5], missing, users[0], users[11], users[5]]
    found = reader.get_many(User, wanted)
    assert [user and user.id for user in found] == [users[5], None, users[0], users[11], users[5]]
    assert found[0] is found[4]
    assert reader.get_many(User, []) == []
    assert reader.get_many(User, [missing]) == [None]
    assert [user.id for user in reader.get_many(User, (key for key in users))] == users
    assert [user.id for user in reader.get_many(User, [{"id": users[3]}])] == [users[3]]


@pytest.fixture
def sent() -> Iterator[list[str]]:
    """The statements about users that are sent to any server."""
    texts: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if "users" in statement:
            texts.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    yield texts
    event.remove(Engine, "before_cursor_execute", note)


def test_a_statement_per_server_and_none_for_what_is_held(
    users: list[int], reader: ReadSession, sent: list[str]
) -> None:
    held = reader.get(User, users[0])
    del sent[:]
    found = reader.get_many(User, users)
    assert found[0] is held
    assert len(sent) == 2
    assert reader.get_many(User, users) == found
    assert len(sent) == 2, "all were held"


def test_composite_keys(users: list[int], reader: ReadSession) -> None:
    wanted = [(users[4], 8), (users[4], 9), (users[9], 7), {"user_id": 7, "photo_id": users[0]}]
    found = reader.get_many(Like, wanted)
    assert [like and (like.photo_id, like.user_id) for like in found] == [
        (users[4], 8), None, (users[9], 7), (users[0], 7),
    ]  # fmt: skip
    assert reader.get_many(Like, [(users[1], None)]) == [None]
    pairs = select(Like).where(
        tuple_(Like.user_id, Like.photo_id).in_([(8, users[0]), (7, users[7]), (9, users[1])])
    )
    assert {(like.user_id, like.photo_id) for like in reader.scalars(pairs)} == {
        (8, users[0]), (7, users[7]),
    }  # fmt: skip
    assert reader.route(pairs).shards == (1, 40)
    one = tuple_(Like.photo_id, Like.user_id).in_([(users[0], 8)])
    assert reader.scalars(select(Like.user_id).where(one)).all() == [8]


def test_bad_ids(users: list[int], reader: ReadSession) -> None:
    for entity, idents in (
        (User, ["7"]), (User, [None]), (User, [users[0], 1.5]), (User, [(users[0], 1)]),
        (User, [{"name": "x"}]), (User, [ids.compose(1, 64, 0)]), (User, [True]), (User, "text"),
        (User, {"id": users[0]}), (Like, [users[0]]), (Like, [("x", 7)]), (Like, [(None, 7)]),
        (Handle, [7]), (Handle, ["e\u0301"]),
    ):  # fmt: skip
        with pytest.raises(InvalidShardKeyError):
            reader.get_many(entity, idents)


def test_thousands_of_ids(users: list[int], reader: ReadSession) -> None:
    many = [ids.compose(5, n % 64, n) if n >= 1000 else users[n % 12] for n in range(1020)]
    many += [ids.compose(6 + n, 1, 0) for n in range(70_000)]
    found = reader.get_many(User, many)
    assert [user.id for user in found[:1000]] == many[:1000]
    assert found[1020:] == [None] * 70_000
    on_one = reader.get_many(Photo, many[1020:])
    assert on_one == [None] * 70_000


def test_other_strategies_and_reference_tables(cluster: Cluster) -> None:
    names = [f"tenant {i}" for i in range(5)]
    for name in names:
        with cluster.writer() as session:
            session.add(Tenant(name=name))
            session.commit()
    with cluster.reader(after=ASK_PRIMARIES) as reader:
        found = reader.get_many(Tenant, [*names, "nobody"])
        assert [tenant and tenant.name for tenant in found] == [*names, None]
        assert [c and c.name for c in reader.get_many(Country, ["pt", "xx"])] == ["Portugal", None]


def test_a_writer_sees_its_own_changes_and_refreshes_the_expired(
    cluster: Cluster, users: list[int]
) -> None:
    with cluster.writer() as session:
        first = session.get_one(User, users[0])
        session.execute(
            update(User).where(User.id == users[0]).values(name="new"),
            execution_options={"synchronize_session": False},
        )
        session.expire(first)
        found = session.get_many(User, users[:2], options=[selectinload(User.photos)])
        assert found[0] is first
        assert found[0].name == "new"
        assert "photos" in vars(found[1])


@pytest.mark.anyio
async def test_the_async_twin(cluster_file: Path, users: list[int], settled: Settled) -> None:
    settled()
    async with AsyncCluster.from_file(cluster_file) as cluster, cluster.reader() as session:
        found = await session.get_many(User, [users[11], users[0]])
        assert [user.id for user in found] == [users[11], users[0]]
