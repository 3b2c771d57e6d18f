"""INSERT, UPDATE and DELETE over many logical shards in one statement, on real servers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import (
    ARRAY,
    BigInteger,
    String,
    any_,
    bindparam,
    cast,
    delete,
    func,
    insert,
    literal,
    select,
    tuple_,
    update,
)
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.exc import DBAPIError, IntegrityError, InvalidRequestError
from sqlalchemy.orm.exc import StaleDataError

from shardkit import AsyncCluster, Cluster, all_shards, ids
from shardkit.config import PoolConfig, load
from shardkit.errors import (
    CrossShardWriteError,
    GatherError,
    InvalidShardKeyError,
    NoShardKeyError,
    ReadOnlySessionError,
    ScatterNotAllowedError,
    ShardKeyChangeError,
    StatementTimeoutError,
    UnsupportedStatementError,
)
from shardkit.events import StatementRouted
from shardkit.testing import create_tables
from shardkit.topology import Topology
from shardkit.writer import WriteSession
from tests.fixtures.servers import NewCluster
from tests.models import Base, Country, Handle, Like, Photo, Tenant, User

pytestmark = pytest.mark.integration

USERS: Any = User.__table__
PHOTOS: Any = Photo.__table__


@pytest.fixture
def turn() -> Iterator[int]:
    """The logical shards that new users go to: alpha has 0 to 31."""
    return itertools.cycle((1, 2, 3))


@pytest.fixture
def alpha(topology: Topology, turn: Iterator[int]) -> Iterator[Cluster]:
    """A cluster whose new rows go to three logical shards of one physical shard."""
    with Cluster(
        topology, pool=PoolConfig(size=1, overflow=0, timeout=1.0), placement=lambda _: next(turn)
    ) as cluster:
        yield cluster


@pytest.fixture
def session(alpha: Cluster) -> Iterator[WriteSession]:
    with alpha.writer() as session:
        yield session


def photos_of(session: WriteSession, n: int = 3) -> list[Photo]:
    """Add one photo for each of `n` users on logical shards in turn; they stay in the session."""
    session.add_all(
        User(name=f"user {i}", photos=[Photo(caption=f"photo {i}", rank=i)]) for i in range(n)
    )
    session.commit()
    loaded = list(session.scalars(select(Photo).order_by(Photo.rank).options(all_shards())))
    assert len({ids.shard_of(photo.id) for photo in loaded}) == min(n, 3)
    return loaded


def stored(session: WriteSession, column: Any) -> list[Any]:
    """Return a column of all photos, in the order they were made, as the servers have it."""
    rows = session.execute(select(Photo.id, column).options(all_shards())).all()
    return [row[1] for row in sorted(rows)]


# -- UPDATE and DELETE


@pytest.mark.parametrize("sync", ["auto", "evaluate", "fetch"])
def test_an_update_goes_to_each_shard_once_and_objects_follow(
    session: WriteSession, sync: str
) -> None:
    photos = photos_of(session, 5)
    statement = (
        update(Photo)
        .where(Photo.owner_id.in_([photo.owner_id for photo in photos[:4]]))
        .values(rank=Photo.rank + 10)
        .execution_options(synchronize_session=sync)
    )
    result: Any = session.execute(statement)
    assert result.rowcount == 4
    assert [photo.rank for photo in photos] == [10, 11, 12, 13, 4]
    session.commit()
    assert sorted(stored(session, Photo.rank)) == [4, 10, 11, 12, 13]
    everything = update(Photo).values(rank=Photo.rank + 100).options(all_shards())
    with pytest.raises(CrossShardWriteError):
        session.execute(everything)


@pytest.mark.parametrize("sync", ["auto", "evaluate", "fetch", False])
def test_a_delete_goes_to_each_shard_once_and_objects_leave(
    session: WriteSession, sync: Any
) -> None:
    photos = photos_of(session)
    statement = delete(Photo).where(Photo.id.in_([photo.id for photo in photos[:2]]))
    result: Any = session.execute(statement, execution_options={"synchronize_session": sync})
    assert result.rowcount == 2
    assert [photo in session for photo in photos] == [sync is False] * 2 + [True]
    session.commit()
    assert len(stored(session, Photo.id)) == 1


def test_objects_are_left_alone_when_told(session: WriteSession) -> None:
    photos = photos_of(session)
    keys = [photo.owner_id for photo in photos]
    session.execute(
        update(Photo).where(Photo.owner_id.in_(keys)).values(rank=7),
        execution_options={"synchronize_session": False},
    )
    assert [photo.rank for photo in photos] == [0, 1, 2]
    assert stored(session, Photo.rank) == [7, 7, 7]


def test_a_condition_that_python_cannot_evaluate(session: WriteSession) -> None:
    photos = photos_of(session)
    keys = [photo.owner_id for photo in photos]
    statement = (
        update(Photo)
        .where(Photo.owner_id.in_(keys), func.length(Photo.caption) > 1)
        .values(rank=func.coalesce(Photo.rank, 0) + 5)
    )
    session.execute(statement)
    assert [photo.rank for photo in photos] == [5, 6, 7]
    with pytest.raises(InvalidRequestError, match="Could not evaluate"):
        session.execute(statement, execution_options={"synchronize_session": "evaluate"})


@pytest.mark.parametrize("sync", ["auto", "fetch", False])
def test_returning_merges_rows_and_objects(session: WriteSession, sync: Any) -> None:
    photos = photos_of(session)
    keys = [photo.owner_id for photo in photos]
    options = {"synchronize_session": sync}
    changed = update(Photo).where(Photo.owner_id.in_(keys)).values(caption="new")
    found = session.scalars(changed.returning(Photo), execution_options=options).all()
    assert {id(photo) for photo in found} == {id(photo) for photo in photos}
    assert {photo.caption for photo in found} == (
        {"new"} if sync else {"photo 0", "photo 1", "photo 2"}
    )
    rows = session.execute(changed.returning(Photo.rank, Photo.id), execution_options=options)
    assert sorted(tuple(row) for row in rows) == [(i, p.id) for i, p in enumerate(photos)]
    core = update(PHOTOS).where(PHOTOS.c.owner_id.in_(keys)).values(rank=None)
    answer: Any = session.execute(core.returning(PHOTOS.c.id, PHOTOS.c.caption))
    assert answer.rowcount == 3
    assert {(row.id, row.caption) for row in answer} == {(p.id, "new") for p in photos}
    gone = delete(Photo).where(Photo.owner_id.in_(keys)).returning(Photo.id)
    assert set(session.scalars(gone, execution_options=options)) == {p.id for p in photos}


@pytest.mark.parametrize("sync", ["auto", "evaluate", "fetch"])
def test_a_shard_given_by_number_leaves_objects_of_others_alone(
    session: WriteSession, sync: str
) -> None:
    photos = photos_of(session)
    shard = ids.shard_of(photos[1].id)
    result: Any = session.execute(
        update(Photo).values(rank=Photo.rank + 10).execution_options(synchronize_session=sync),
        bind_arguments={"logical_shard": shard},
    )
    assert result.rowcount == 1
    assert [photo.rank for photo in photos] == [0, 11, 2]
    session.execute(
        delete(Photo).execution_options(synchronize_session=sync),
        bind_arguments={"logical_shard": shard},
    )
    assert [photo in session for photo in photos] == [True, False, True]


def test_pending_changes_are_written_first(session: WriteSession) -> None:
    photos = photos_of(session)
    photos[0].rank = 50
    keys = [photo.owner_id for photo in photos]
    session.execute(
        update(Photo).where(Photo.owner_id.in_(keys), Photo.rank < 50).values(caption="low")
    )
    assert [photo.caption for photo in photos] == ["photo 0", "low", "low"]
    assert [photo.rank for photo in photos] == [50, 1, 2]


def test_keys_on_two_physical_shards_write_nothing(cluster: Cluster) -> None:
    left, right = (ids.compose(1, shard, 0) for shard in (1, 40))
    for key in (left, right):
        with cluster.writer() as session:
            session.add(User(id=key, name="old"))
            session.commit()
    with cluster.writer() as session:
        for statement in (
            update(User).where(User.id.in_([left, right])).values(name="new"),
            delete(User).where(User.id.in_([left, right])),
        ):
            with pytest.raises(CrossShardWriteError):
                session.execute(statement)
        for statement in (update(User).values(name="new"), delete(User)):
            with pytest.raises(ScatterNotAllowedError):
                session.execute(statement)
            with pytest.raises(CrossShardWriteError):
                session.execute(statement.options(all_shards()))
        for rows in ([{"id": left, "name": "a"}, {"id": right, "name": "b"}],):
            with pytest.raises(CrossShardWriteError):
                session.execute(update(User), rows)
            with pytest.raises(CrossShardWriteError):
                session.execute(insert(User), rows)
            with pytest.raises(CrossShardWriteError):
                session.execute(insert(User).values(rows))
        session.commit()
        names = session.scalars(select(User.name).options(all_shards())).all()
        assert names == ["old", "old"]


def test_a_failed_part_undoes_the_others(session: WriteSession) -> None:
    photos_of(session)
    users = session.scalars(select(User).order_by(User.id).options(all_shards())).all()
    with session.begin_nested() as savepoint:
        session.execute(update(User).where(User.id == users[0].id).values(name="in between"))
        with pytest.raises(IntegrityError):
            # The photo of the last user refers to it.
            session.execute(delete(User).where(User.id.in_([user.id for user in users])))
        savepoint.rollback()
    session.commit()
    names = session.scalars(select(User.name).options(all_shards())).all()
    assert sorted(names) == ["user 0", "user 1", "user 2"]


def test_reference_tables_are_not_written_on_one_server_only(session: WriteSession) -> None:
    for statement in (
        update(Country).values(name="x"),
        delete(Country),
        insert(Country).values(code="es", name="Spain"),
    ):
        with pytest.raises(UnsupportedStatementError, match="reference"):
            session.execute(statement)


def test_an_error_on_one_logical_shard_undoes_those_of_the_others(session: WriteSession) -> None:
    photos = photos_of(session)
    for photo in photos[:2]:  # the second shard is another view of the connection
        session.execute(update(Photo).where(Photo.id == photo.id).values(caption="half"))
    with pytest.raises(IntegrityError):
        session.execute(delete(User).where(User.id == photos[1].owner_id))
    with pytest.raises(DBAPIError, match="aborted"):
        session.execute(update(Photo).where(Photo.id == photos[2].id).values(caption="half"))
    session.rollback()
    assert sorted(stored(session, Photo.caption)) == ["photo 0", "photo 1", "photo 2"]


def test_composite_keys_and_lists_are_split(session: WriteSession) -> None:
    photos = photos_of(session)
    keys = [photo.id for photo in photos]
    session.execute(insert(Like), [{"photo_id": k, "user_id": u} for k in keys for u in (1, 2)])
    likes = session.scalars(select(Like).options(all_shards())).all()
    assert len(likes) == 6
    pairs = [(keys[0], 1), (keys[1], 2), (keys[2], 3)]
    result: Any = session.execute(
        delete(Like).where(tuple_(Like.photo_id, Like.user_id).in_(pairs))
    )
    assert result.rowcount == 2
    assert {(like.photo_id, like.user_id) for like in likes if like not in session} == {*pairs[:2]}
    listed = any_(literal(keys[:2], ARRAY(BigInteger)))
    result = session.execute(update(Photo).where(Photo.id == listed).values(rank=9))
    assert result.rowcount == 2
    assert [photo.rank for photo in photos] == [9, 9, 2]


def test_other_tables_in_the_condition(session: WriteSession) -> None:
    photos = photos_of(session)
    keys = [photo.owner_id for photo in photos]
    session.execute(
        update(Photo)
        .where(Photo.owner_id == User.id, User.id.in_(keys), User.name != "user 1")
        .values(caption=User.name)
    )
    assert [photo.caption for photo in photos] == ["user 0", "photo 1", "user 2"]
    named = select(User.id).where(User.name == "user 2", User.id == Photo.owner_id).exists()
    gone = session.scalars(
        delete(Photo).where(Photo.owner_id.in_(keys), named).returning(Photo.id)
    ).all()
    assert gone == [photos[2].id]


def test_values_passed_beside_the_statement(session: WriteSession) -> None:
    photos = photos_of(session)
    keys = [photo.owner_id for photo in photos]
    statement = update(Photo).values(taken_at=func.now(), rank=bindparam("given"))
    result: Any = session.execute(
        statement.where(Photo.owner_id.in_(bindparam("keys", expanding=True))),
        {"given": 4, "keys": keys[:2]},
        execution_options={"synchronize_session": False},
    )
    assert result.rowcount == 2
    assert sorted(stored(session, Photo.rank)) == [2, 4, 4]
    assert len({*stored(session, Photo.taken_at)[:2]}) == 1, "one transaction has one time"


def test_limits_of_a_write(session: WriteSession) -> None:
    photos = photos_of(session)
    keys = [photo.owner_id for photo in photos]
    statement = update(Photo).where(Photo.owner_id.in_(keys))
    photos[0].caption = "flushed"
    slow = statement.values(caption=cast(func.pg_sleep(60), String))
    with pytest.raises(StatementTimeoutError):
        session.execute(slow.options(all_shards(timeout=0.1)))
    session.execute(statement.values(rank=7).options(all_shards(timeout=60.0)))
    session.commit()
    assert sorted(stored(session, Photo.caption)) == ["flushed", "photo 1", "photo 2"]
    assert stored(session, Photo.rank) == [7, 7, 7]
    for option in (all_shards(partial=True), all_shards(max_rows=3)):
        with pytest.raises(UnsupportedStatementError, match="whole or not at all"):
            session.execute(statement.values(rank=8).options(option))


@pytest.mark.parametrize("wide", [False, True])
def test_what_a_limited_read_flushes_stays_written(session: WriteSession, wide: bool) -> None:
    [key] = _new_users(session, 1)
    session.commit()
    session.add(Photo(owner_id=key, caption="kept"))
    slow = select(Photo.id).where(cast(func.pg_sleep(60), String) == "")
    statement = slow if wide else slow.where(Photo.owner_id == key)
    with pytest.raises((GatherError, StatementTimeoutError)):
        session.execute(statement.options(all_shards(timeout=0.1)))
    session.commit()
    assert stored(session, Photo.caption) == ["kept"]


def test_listeners_hear_of_writes(session: WriteSession, alpha: Cluster) -> None:
    heard: list[tuple[str, str, tuple[int, ...]]] = []

    def note(record: object) -> None:
        if isinstance(record, StatementRouted):
            heard.append((record.operation, record.subject, record.shards))

    alpha.listen(note)
    keys = _new_users(session, 3)
    session.execute(update(User).where(User.id.in_(keys[:2])).values(name="x"))
    session.execute(delete(User).where(User.id == keys[2]))
    assert heard == [
        ("insert", "User", (1, 2, 3)), ("update", "User", (1, 2)), ("delete", "User", (3,)),
    ]  # fmt: skip


# -- INSERT


def test_rows_are_minted_ids_and_returned_in_order(session: WriteSession) -> None:
    users = [{"name": f"user {i}"} for i in range(7)]
    made = session.scalars(insert(User).returning(User, sort_by_parameter_order=True), users).all()
    assert users == [{"name": f"user {i}"} for i in range(7)], "the caller's rows are his"
    assert [user.name for user in made] == [f"user {i}" for i in range(7)]
    assert [ids.shard_of(user.id) for user in made] == [1, 2, 3, 1, 2, 3, 1]
    rows = [{"owner_id": user.id, "caption": user.name, "rank": i} for i, user in enumerate(made)]
    keys = session.execute(
        insert(Photo).returning(Photo.id, Photo.rank, sort_by_parameter_order=True), rows
    ).all()
    assert [key.rank for key in keys] == list(range(7))
    assert [ids.shard_of(key.id) for key in keys] == [ids.shard_of(user.id) for user in made]
    session.commit()
    assert sorted(stored(session, Photo.caption)) == [f"user {i}" for i in range(7)]


def test_values_with_several_rows(session: WriteSession) -> None:
    users = [{"name": f"user {i}"} for i in range(4)]
    found = session.scalars(insert(User).values(users).returning(User)).all()
    assert [user.name for user in found] == [f"user {i}" for i in range(4)]
    assert users == [{"name": f"user {i}"} for i in range(4)]
    core = insert(PHOTOS).values(
        [{PHOTOS.c.owner_id: user.id, PHOTOS.c.caption: user.name} for user in found]
    )
    session.execute(core)
    session.execute(insert(User).values(name="one"))
    session.commit()
    assert len(stored(session, Photo.id)) == 4


def test_core_rows(session: WriteSession) -> None:
    session.execute(insert(USERS), [{"name": "a"}, {"name": "b"}])
    session.execute(insert(USERS), {"name": "c"})
    session.execute(insert(User), {"name": "d"})
    rows = session.execute(
        insert(USERS).returning(USERS.c.name, sort_by_parameter_order=True),
        [{"name": f"r{i}"} for i in range(6)],
    )
    assert [row.name for row in rows] == [f"r{i}" for i in range(6)]
    session.commit()
    names = session.scalars(select(User.name).options(all_shards())).all()
    assert sorted(names) == ["a", "b", "c", "d", *(f"r{i}" for i in range(6))]


def test_rows_with_different_columns_and_an_id_of_their_own(session: WriteSession) -> None:
    user = ids.compose(1, 5, 0)
    session.execute(insert(User), [{"id": user, "name": "a"}, {"id": None, "name": "b"}])
    session.execute(
        insert(Photo),
        [
            {"owner_id": user, "caption": "x"},
            {"owner_id": user, "rank": 3},
            {"owner_id": user, "id": ids.compose(1, 5, 1), "rank": None},
        ],
    )
    session.commit()
    found = session.execute(select(Photo.caption, Photo.rank).where(Photo.owner_id == user)).all()
    assert {tuple(row) for row in found} == {("x", None), ("", 3), ("", None)}


def test_rows_with_different_columns_are_returned_in_order(session: WriteSession) -> None:
    keys = [ids.compose(1, shard, 0) for shard in (1, 2)]
    session.execute(insert(User), [{"id": key, "name": "x"} for key in keys])
    rows: list[dict[str, Any]] = [
        {"owner_id": keys[0], "caption": "a"},
        {"owner_id": keys[1], "rank": 1},
        {"owner_id": keys[0], "rank": 2},
        {"owner_id": keys[1], "caption": "d"},
    ]
    made = session.scalars(insert(Photo).returning(Photo, sort_by_parameter_order=True), rows)
    found = [(photo.owner_id, photo.caption, photo.rank) for photo in made]
    assert found == [
        (keys[0], "a", None), (keys[1], "", 1), (keys[0], "", 2), (keys[1], "d", None),
    ]  # fmt: skip
    count = select(func.count(User.id)).scalar_subquery()
    with pytest.raises(UnsupportedStatementError, match="different logical shards"):
        session.execute(update(Photo).values(rank=count), [{"id": keys[0], "caption": "x"}])


def test_values_that_python_makes_are_those_of_each_shard(session: WriteSession) -> None:
    made = session.scalars(
        insert(Photo).values(caption="all", taken_at=None).returning(Photo),
        [{"owner_id": key} for key in _new_users(session, 3)],
    ).all()
    assert [(photo.caption, photo.taken_at) for photo in made] == [("all", None)] * 3


def _new_users(session: WriteSession, n: int) -> list[int]:
    rows = [{"name": f"user {i}"} for i in range(n)]
    return list(session.scalars(insert(User).returning(User.id), rows))


def test_upserts_split_too(session: WriteSession) -> None:
    keys = [ids.compose(1, shard, 0) for shard in (1, 2)]
    rows = [{"id": key, "name": "old"} for key in keys]
    session.execute(insert(User), rows)
    statement = upsert(User)
    statement = statement.on_conflict_do_update(
        index_elements=[User.id], set_={"name": statement.excluded.name}
    )
    again: list[dict[str, Any]] = [*({"id": key, "name": "new"} for key in keys), {"name": "third"}]
    made = session.scalars(statement.returning(User.name), again).all()
    assert sorted(made) == ["new", "new", "third"]
    ignored = upsert(User).on_conflict_do_nothing().returning(User.id)
    assert len(session.scalars(ignored, [rows[0], {"name": "fourth"}]).all()) == 1


def test_rows_that_a_directory_or_a_hash_places(cluster: Cluster) -> None:
    with cluster.writer() as session:
        session.execute(insert(Tenant), [{"name": "acme"}])
        session.commit()
        assert session.get_one(Tenant, "acme").plan == "free"
        session.execute(insert(Handle), {"name": "ana", "user_id": 1})
        session.commit()
        assert session.get_one(Handle, "ana").user_id == 1


def test_what_an_insert_refuses(session: WriteSession) -> None:
    here, there = (ids.compose(1, shard, 0) for shard in (1, 2))
    for rows, error in (
        ([{"caption": "no key"}], NoShardKeyError),
        ([{"owner_id": here}, {"id": here}], NoShardKeyError),
        ([{"owner_id": None}], InvalidShardKeyError),
        ([{"owner_id": "7"}], InvalidShardKeyError),
        ([{"owner_id": here, "id": there}], InvalidShardKeyError),
        ([{"owner_id": here, "id": "x"}], InvalidShardKeyError),
        ([], UnsupportedStatementError),
    ):
        with pytest.raises(error):
            session.execute(insert(Photo), rows)
        with pytest.raises(error):
            session.execute(insert(PHOTOS), rows)
        if rows:
            with pytest.raises(error):
                session.execute(insert(Photo).values(rows))
    with pytest.raises(UnsupportedStatementError, match="bind_arguments"):
        session.execute(insert(Photo), [{"owner_id": here}], bind_arguments={"logical_shard": 1})


# -- many sets of values


def test_bulk_updates_by_primary_key(session: WriteSession) -> None:
    photos = photos_of(session, 4)
    rows = [{"id": photo.id, "caption": f"new {i}"} for i, photo in enumerate(photos)]
    session.execute(update(Photo), rows)
    assert [photo.caption for photo in photos] == [f"new {i}" for i in range(4)]
    session.commit()
    assert sorted(stored(session, Photo.caption)) == [f"new {i}" for i in range(4)]
    likes = [{"photo_id": photo.id, "user_id": 1} for photo in photos]
    session.execute(insert(Like), likes)
    with pytest.raises(StaleDataError):
        session.execute(update(Photo), [{"id": ids.compose(9, 1, 1), "caption": "none"}])
    session.rollback()
    for row, error in (
        ({"caption": "x"}, NoShardKeyError),
        ({"id": "x", "caption": "x"}, InvalidShardKeyError),
        ({"id": photos[0].id, "owner_id": photos[1].owner_id}, ShardKeyChangeError),
    ):
        with pytest.raises(error):
            session.execute(update(Photo), [row])
    with pytest.raises(UnsupportedStatementError):
        session.execute(update(Photo), [])
    with pytest.raises(UnsupportedStatementError, match="delete"):
        session.execute(delete(Photo), [{"id": photos[0].id}])
    with pytest.raises(UnsupportedStatementError, match="synchronize_session"):
        session.execute(update(Photo).where(Photo.rank > 0), rows)


def test_core_runs_once_for_each_set_of_values(session: WriteSession) -> None:
    photos = photos_of(session)
    rows = [{"key": photo.id, "rank": 10 + i} for i, photo in enumerate(photos)]
    answer: Any = session.execute(update(PHOTOS).where(PHOTOS.c.id == bindparam("key")), rows)
    assert answer.rowcount == 3
    assert stored(session, Photo.rank) == [10, 11, 12]
    session.execute(delete(PHOTOS).where(PHOTOS.c.id == bindparam("key")), rows[:2])
    assert stored(session, Photo.rank) == [12]


def test_the_bulk_methods_of_sqlalchemy(session: WriteSession, alpha: Cluster) -> None:
    session.bulk_insert_mappings(User, [])
    session.bulk_insert_mappings(User, [{"name": "a"}, {"name": "b"}])
    users = session.scalars(select(User).options(all_shards())).all()
    changed = [{"id": user.id, "name": "c"} for user in users]
    session.bulk_update_mappings(User, changed)
    assert session.scalars(select(User.name).options(all_shards())).all() == ["c", "c"]
    with pytest.raises(UnsupportedStatementError, match="add_all"):
        session.bulk_save_objects([User(name="x")])
    with pytest.raises(UnsupportedStatementError, match="returning"):
        session.bulk_insert_mappings(User, [{"name": "x"}], return_defaults=True)
    with alpha.reader() as reader, pytest.raises(ReadOnlySessionError):
        reader.bulk_insert_mappings(User, [{"name": "x"}])


def test_an_unkeyed_write_where_all_shards_are_on_one_server(new_cluster: NewCluster) -> None:
    with new_cluster(
        physical=1, replicas=0, redis=False, memcached=False, pgbouncer=False
    ) as local:
        _, topology = load(local.config_path)
        create_tables(topology, Base.metadata)
        turn = itertools.cycle((0, 20, 63))
        with Cluster(topology, placement=lambda _: next(turn)) as cluster:
            session = cluster.writer()
            photos = photos_of(session, 4)
            with pytest.raises(ScatterNotAllowedError):
                session.execute(update(Photo).values(rank=Photo.rank + 1))
            for sync, ranks in (("auto", [1, 2, 3, 4]), ("fetch", [2, 3, 4, 5])):
                result: Any = session.execute(
                    update(Photo).values(rank=Photo.rank + 1).options(all_shards()),
                    execution_options={"synchronize_session": sync},
                )
                assert result.rowcount == 4
                assert [photo.rank for photo in photos] == ranks, "once each"
            assert sorted(stored(session, Photo.rank)) == [2, 3, 4, 5]
            session.close()


@pytest.mark.anyio
@pytest.mark.usefixtures("topology")
async def test_the_async_twin_writes_alike(cluster_file: Path) -> None:
    async with AsyncCluster.from_file(cluster_file) as cluster, cluster.writer() as session:
        keys = [ids.compose(1, shard, 0) for shard in (1, 2)]
        rows = [{"id": key, "name": "old"} for key in keys]
        users = (await session.scalars(insert(User).returning(User), rows)).all()
        changed: Any = await session.execute(
            update(User).where(User.id.in_(keys)).values(name="new")
        )
        assert changed.rowcount == 2
        assert [user.name for user in users] == ["new", "new"]
        photos = [{"owner_id": key} for key in keys]
        made = await session.scalars(insert(Photo).returning(Photo.id), photos)
        assert [ids.shard_of(key) for key in made] == [1, 2]
        await session.execute(delete(Photo).where(Photo.owner_id.in_(keys)))
        await session.commit()
        assert (await session.scalars(select(Photo).options(all_shards()))).all() == []
