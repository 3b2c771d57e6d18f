"""Sessions on real servers: where rows go, what one transaction holds, what is refused."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import String, cast, delete, func, insert, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError, InternalError, PendingRollbackError
from sqlalchemy.orm import Session, aliased, joinedload, selectinload

from shardkit import AsyncCluster, Cluster, all_shards, gather, ids
from shardkit.config import PoolConfig, load
from shardkit.errors import (
    CrossShardWriteError,
    InvalidShardKeyError,
    NoShardKeyError,
    PoolTimeoutError,
    ReadOnlySessionError,
    ScatterNotAllowedError,
    ShardKeyChangeError,
    UnsupportedStatementError,
)
from shardkit.keys import canonical
from shardkit.router import Router
from shardkit.session import ReadSession
from shardkit.statements import AllShards
from shardkit.strategies import hash_shard
from shardkit.testing import create_tables, wait_until
from shardkit.tokens import ASK_PRIMARIES
from shardkit.topology import PhysicalShard, Role, ShardMap, Topology, schema_name
from tests.fixtures.servers import NewCluster
from tests.fixtures.sharded import Settled, admin, one_server
from tests.models import Base, Country, Handle, Like, Photo, User

pytestmark = pytest.mark.integration


def on_shards(*shards: int) -> itertools.cycle[int]:
    return itertools.cycle(shards)


def placed(topology: Topology, *shards: int, size: int = 3) -> Cluster:
    """A cluster whose new rows go to the given logical shards in turn."""
    turn = on_shards(*shards)
    pool = PoolConfig(size=size, overflow=0, timeout=1.0)
    return Cluster(topology, pool=pool, placement=lambda _: next(turn))


def add_user(cluster: Cluster, name: str, n_photos: int = 0) -> User:
    with cluster.writer() as session:
        user = User(name=name, photos=[Photo(caption=f"{name} {i}") for i in range(n_photos)])
        session.add(user)
        session.commit()
        return user


def test_128_objects_over_64_logical_shards_commit_over_one_connection(
    new_cluster: NewCluster,
) -> None:
    with new_cluster(
        physical=1, replicas=0, redis=False, memcached=False, pgbouncer=False
    ) as local:
        _, topology = load(local.config_path)
        physical = topology.physical["alpha"]
        create_tables(topology, Base.metadata)
        with placed(topology, *range(64), size=1) as cluster, cluster.writer() as session:
            users = [User(name=f"user {i}") for i in range(128)]
            session.add_all(users)
            session.commit()
        assert Counter(ids.shard_of(user.id) for user in users) == dict.fromkeys(range(64), 2)
        with admin(physical) as connection:
            stored = [
                row
                for n in range(64)
                for row in connection.execute(
                    f"SELECT xmin::text FROM {schema_name(n)}.users".encode()
                )
            ]
        assert len(stored) == 128
        assert len(set(stored)) == 1, "one transaction wrote all rows"


def test_a_bare_id_touches_one_logical_shard(
    cluster: Cluster, settled: Settled, topology: Topology
) -> None:
    user = add_user(cluster, "ana", n_photos=2)
    settled()
    with cluster.reader() as session:
        route = session.route(select(User).where(User.id == user.id))
        assert route.shards == (ids.shard_of(user.id),)
        assert route.kind == "one"
        assert route.role is Role.REPLICA
        found = session.get(User, user.id)
        assert found is not None
        assert found.name == "ana"
        assert session.get(User, user.id) is found
        assert session.get(User, ids.compose(1, ids.shard_of(user.id), 5)) is None
        physical = topology.shard_map.owner(ids.shard_of(user.id))
        assert list(session._roots) == [physical], "one connection, to the owner"


def test_rows_live_with_their_shard_key(cluster: Cluster) -> None:
    user = add_user(cluster, "ana", n_photos=3)
    shards = {ids.shard_of(photo.id) for photo in user.photos}
    assert shards == {ids.shard_of(user.id)}
    with cluster.writer() as session:
        like = Like(photo_id=user.photos[0].id, user_id=user.id)
        session.add_all([like, Handle(name="ana", user_id=user.id)])
        handle_shard = hash_shard(canonical("ana"), 64)
        if cluster.topology.shard_map.owner(handle_shard) == cluster.topology.shard_map.owner(
            ids.shard_of(user.id)
        ):
            session.commit()
            assert session.get(Handle, "ana") is not None
        else:
            with pytest.raises(CrossShardWriteError):
                session.commit()


def test_relationships_load_from_the_parents_shard(cluster: Cluster, settled: Settled) -> None:
    users = [add_user(cluster, f"user {i}", n_photos=3) for i in range(6)]
    settled()
    with cluster.reader() as session:
        first = session.get_one(User, users[0].id)
        assert sorted(p.caption for p in first.photos) == ["user 0 0", "user 0 1", "user 0 2"]
        assert first.photos[0].owner is first
        keys = [user.id for user in users]
        loaded = session.scalars(
            select(User).where(User.id.in_(keys)).options(selectinload(User.photos))
        ).all()
        assert {len(user.photos) for user in loaded} == {3}
        one = session.scalars(
            select(Photo).where(Photo.id == users[1].photos[0].id).options(joinedload(Photo.owner))
        ).one()
        assert one.owner.name == "user 1"


def test_a_scatter_is_exact_and_must_be_asked_for(cluster: Cluster, settled: Settled) -> None:
    users = [add_user(cluster, f"user {i}", n_photos=2) for i in range(20)]
    settled()
    newest = sorted((photo.id for user in users for photo in user.photos), reverse=True)
    statement = select(Photo).order_by(Photo.id.desc()).limit(5)
    with cluster.reader() as session:
        with pytest.raises(ScatterNotAllowedError):
            session.scalars(statement)
        found = session.scalars(statement.options(all_shards())).all()
        assert [photo.id for photo in found] == newest[:5]
        page = session.scalars(statement.where(Photo.id < newest[4]).options(all_shards())).all()
        assert [photo.id for photo in page] == newest[5:10]
        total = select(func.count(), func.min(Photo.id)).select_from(Photo)
        assert session.execute(total.options(all_shards())).one() == (40, newest[-1])
        owners = session.execute(
            select(Photo.owner_id, func.count().label("n"))
            .group_by(Photo.owner_id)
            .order_by(Photo.owner_id)
            .options(all_shards())
        ).all()
        assert [tuple(row) for row in owners] == [(u.id, 2) for u in sorted(users, key=_id)]
        assert owners[0].n == 2
        chosen = select(Photo.id, Photo.caption).where(
            Photo.owner_id.in_([users[0].id, users[9].id])
        )
        rows = session.execute(chosen.order_by(Photo.id)).all()
        assert [row.caption for row in rows] == ["user 0 0", "user 0 1", "user 9 0", "user 9 1"]


def test_columns_of_one_name_keep_their_places(cluster: Cluster, settled: Settled) -> None:
    users = [add_user(cluster, f"user {i}", n_photos=1) for i in range(4)]
    settled()
    owner, photo = aliased(User), aliased(Photo)
    expected = [(user.id, user.photos[0].id) for user in sorted(users, key=_id)]
    with cluster.reader() as session:
        entities = select(owner, photo).join(owner.photos.of_type(photo)).order_by(owner.id)
        rows = session.execute(entities.options(all_shards())).all()
        assert [(row[0].id, row[1].id) for row in rows] == expected
        columns = entities.with_only_columns(owner.id, photo.id).options(all_shards())
        assert [tuple(row) for row in session.execute(columns)] == expected
        tables = User.__table__.join(Photo.__table__)
        core = select(User.__table__.c.id, Photo.__table__.c.id).select_from(tables)
        found = session.execute(core.order_by(User.__table__.c.id).options(all_shards()))
        assert [tuple(row) for row in found] == expected


def test_sessions_stream_in_partitions(cluster: Cluster, settled: Settled) -> None:
    users = [add_user(cluster, f"user {i}") for i in range(3)]
    settled()
    everyone = select(User.id).order_by(User.id).options(all_shards())
    makers: list[Callable[[], ReadSession]] = [cluster.reader, cluster.writer]
    for make in makers:
        with make() as session:
            for statement, n in ((everyone, 3), (everyone.where(User.id == users[0].id), 1)):
                result = session.execute(statement, execution_options={"yield_per": 2})
                assert sum(len(part) for part in result.partitions()) == n


def test_a_context_of_begin_makes_a_token_and_ends_the_unit_of_work(topology: Topology) -> None:
    with placed(topology, 0, 40) as cluster, cluster.writer() as session:
        tokens = []
        for name in ("left", "right"):
            with session.begin():
                session.add(User(name=name))
            tokens.append(session.token)
        assert all(tokens)
        assert tokens[0] != tokens[1]


def test_a_relationship_cannot_move_a_row(topology: Topology) -> None:
    with placed(topology, 0, 1) as cluster:
        ana, bo = add_user(cluster, "ana", 1), add_user(cluster, "bo")
        with cluster.writer() as session:
            photo = session.get_one(Photo, ana.photos[0].id)
            photo.owner = session.get_one(User, bo.id)
            with pytest.raises(ShardKeyChangeError):
                session.flush()


def test_get_refuses_joined_loads_across_shards_too(cluster: Cluster) -> None:
    with (
        cluster.writer() as session,
        pytest.raises(UnsupportedStatementError, match="selectinload"),
    ):
        session.get(Like, (ids.compose(1, 1, 0), 1), options=[joinedload(Like.fan)])


def _id(user: User) -> int:
    return user.id


def test_one_statement_per_server(cluster: Cluster, settled: Settled) -> None:
    add_user(cluster, "ana", n_photos=1)
    settled()
    with cluster.reader() as session:
        route = session.route(select(Photo).order_by(Photo.id).options(all_shards()))
        assert route.kind == "all"
        assert [name for name, _ in route.statements] == ["alpha", "beta"]
        assert all(sql.count("UNION ALL") == 31 for _, sql in route.statements)


def test_a_plan_is_decided_once_and_answers_anew(
    topology: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    decided: list[object] = []
    plan = gather.plan

    def counted(statement: Any, params: Any, router: Router) -> gather.Plan:
        decided.append(statement)
        return plan(statement, params, router)

    monkeypatch.setattr(gather, "plan", counted)

    def last(session: Session, n: int) -> list[str]:
        # Not by id: those of two logical shards may be of the same millisecond.
        by_name = Photo.caption.collate("C").desc()
        statement = select(Photo).order_by(by_name).limit(n).options(all_shards())
        return [photo.caption for photo in session.scalars(statement)]

    with placed(topology, 0, 40) as cluster, cluster.writer() as session:  # alpha, beta
        for name in ("ana", "bo"):
            session.add(User(name=name, photos=[Photo(caption=name)]))
            session.commit()
        assert last(session, 2) == ["bo", "ana"]
        session.add(User(name="cy", photos=[Photo(caption="cy")]))
        session.commit()
        assert last(session, 2) == ["cy", "bo"]
        assert len(decided) == 1
        assert last(session, 3) == ["cy", "bo", "ana"]
        assert len(decided) == 2


def test_a_reader_cannot_write(cluster: Cluster, settled: Settled) -> None:
    user = add_user(cluster, "ana")
    settled()
    with cluster.reader() as session:
        session.add(User(name="bo"))
        with pytest.raises(ReadOnlySessionError):
            session.flush()
        session.expunge_all()
        with pytest.raises(ReadOnlySessionError):
            session.execute(update(User).where(User.id == user.id).values(name="x"))
        with pytest.raises(ReadOnlySessionError):
            session.get(User, user.id, with_for_update=True)
        with pytest.raises(ReadOnlySessionError):
            session.scalars(select(User).where(User.id == user.id).with_for_update())
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction) as caught:
            _raw(session, f"DELETE FROM {schema_name(ids.shard_of(user.id))}.users", user.id)
        assert "read-only" in str(caught.value)


def _raw(session: object, sql: str, user_id: int) -> None:
    from sqlalchemy.exc import DBAPIError

    try:
        session.execute(  # type: ignore[attr-defined]
            text(sql), bind_arguments={"logical_shard": ids.shard_of(user_id)}
        )
    except DBAPIError as error:
        raise error.orig from None  # type: ignore[misc]


def test_a_reader_on_the_primary_cannot_write_either(cluster: Cluster) -> None:
    user = add_user(cluster, "ana")
    with cluster.reader(after=ASK_PRIMARIES) as session:
        found = session.get(User, user.id)
        assert found is not None, "the primary answers"
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            _raw(session, f"DELETE FROM {schema_name(ids.shard_of(user.id))}.users", user.id)


def test_a_write_over_two_physical_shards_writes_nothing(topology: Topology) -> None:
    with placed(topology, 0, 40) as cluster:
        with cluster.writer() as session:
            session.add_all([User(name="left"), User(name="right")])
            with pytest.raises(
                CrossShardWriteError, match=r"alpha \(User \d+\); beta \(User \d+\)"
            ):
                session.commit()
        with cluster.reader(after=ASK_PRIMARIES) as reader:
            count = select(func.count()).select_from(User).options(all_shards())
            assert reader.scalar(count) == 0


def test_a_later_flush_to_another_server_is_refused_too(topology: Topology) -> None:
    with placed(topology, 0, 40) as cluster, cluster.writer() as session:
        session.add(User(name="left"))
        session.flush()
        session.add(User(name="right"))
        with pytest.raises(CrossShardWriteError):
            session.flush()
        session.rollback()
        session.add(User(name="left again"))
        session.commit()


def test_bulk_statements_route_by_their_key(cluster: Cluster) -> None:
    ana, bo = add_user(cluster, "ana", 2), add_user(cluster, "bo", 2)
    with cluster.writer() as session:
        session.execute(update(Photo).where(Photo.owner_id == ana.id).values(rank=7))
        session.commit()
        ranks = session.execute(select(Photo.owner_id, Photo.rank).options(all_shards())).all()
        assert {tuple(row) for row in ranks} == {(ana.id, 7), (bo.id, None)}
        session.execute(delete(Photo).where(Photo.id == bo.photos[0].id))
        session.commit()
        assert session.scalar(select(func.count()).where(Photo.owner_id == bo.id)) == 1
        with pytest.raises(ScatterNotAllowedError):
            session.execute(delete(Photo))
        with pytest.raises(CrossShardWriteError):
            session.execute(delete(Photo).options(all_shards()))


def test_changes_and_deletes_of_objects(cluster: Cluster) -> None:
    user = add_user(cluster, "ana", n_photos=2)
    with cluster.writer() as session:
        found = session.get_one(User, user.id)
        found.name = "anna"
        session.delete(found.photos[0])
        session.commit()
        assert session.token
        token = session.token
    with cluster.reader(after=token) as reader:
        again = reader.get_one(User, user.id)
        assert (again.name, len(again.photos)) == ("anna", 1)


def test_a_shard_key_never_changes(cluster: Cluster) -> None:
    ana, bo = add_user(cluster, "ana", 1), add_user(cluster, "bo")
    with cluster.writer() as session:
        photo = session.get_one(Photo, ana.photos[0].id)
        photo.owner_id = bo.id
        with pytest.raises(ShardKeyChangeError):
            session.flush()


def test_objects_that_nothing_places_are_refused(cluster: Cluster) -> None:
    user = add_user(cluster, "ana")
    with cluster.writer() as session:
        session.add(Photo(caption="whose?"))
        with pytest.raises(NoShardKeyError, match="owner_id"):
            session.flush()
        session.expunge_all()
        other = ids.compose(1, (ids.shard_of(user.id) + 1) % 64, 0)
        session.add(Photo(id=other, owner_id=user.id))
        with pytest.raises(InvalidShardKeyError, match="another logical shard"):
            session.flush()
        session.expunge_all()
        with pytest.raises(InvalidShardKeyError):
            session.get(User, str(user.id))
        with pytest.raises(InvalidShardKeyError):
            session.get(User, ids.compose(1, 64, 0))
        with pytest.raises(NoShardKeyError):
            session.execute(text("select 1"))


def test_savepoints_and_rollback(cluster: Cluster) -> None:
    user = add_user(cluster, "ana")
    with cluster.writer() as session:
        session.add(Photo(owner_id=user.id, caption="kept"))
        session.flush()
        nested = session.begin_nested()
        session.add(Photo(owner_id=user.id, caption="dropped"))
        session.flush()
        nested.rollback()
        with session.begin_nested():
            session.add(Photo(owner_id=user.id, caption="kept too"))
        session.commit()
        session.add(Photo(owner_id=user.id, caption="rolled back"))
        session.flush()
        session.rollback()
        captions = session.scalars(select(Photo.caption).where(Photo.owner_id == user.id)).all()
    assert sorted(captions) == ["kept", "kept too"]


def test_an_error_on_one_logical_shard_undoes_nothing_of_another_by_itself(
    cluster: Cluster,
) -> None:
    keys = [ids.compose(1, shard, 0) for shard in (0, 1)]
    first, second = (User(id=key, name="x") for key in keys)
    twin = insert(User).values(id=keys[1], name="twin")
    with cluster.writer() as session:
        session.add_all([first, second])
        session.commit()
        first.name = "kept"
        session.flush()
        savepoint = session.begin_nested()
        with pytest.raises(IntegrityError):
            session.execute(twin)
        savepoint.rollback()
        session.commit()
        first.name = "lost"
        session.flush()
        with pytest.raises(IntegrityError):
            session.execute(twin)
        with pytest.raises(InternalError, match="current transaction is aborted"):
            session.execute(select(User.name).where(User.id == keys[1]))
        session.rollback()
    with cluster.writer() as session:
        assert session.get_one(User, keys[0]).name == "kept"


def test_database_errors_pass_through(cluster: Cluster) -> None:
    user = add_user(cluster, "ana", 1)
    with cluster.writer() as session:
        session.add(Like(photo_id=user.photos[0].id, user_id=1))
        session.commit()
    with cluster.writer() as session:
        session.add(Like(photo_id=user.photos[0].id, user_id=1))
        with pytest.raises(IntegrityError):
            session.commit()
        session.rollback()
        session.add(Like(photo_id=user.photos[0].id, user_id=2))
        session.commit()


def test_a_failed_statement_never_becomes_a_commit(cluster: Cluster) -> None:
    user = add_user(cluster, "ana")
    with cluster.writer() as session:
        session.add(Photo(owner_id=user.id, caption="lost"))
        session.flush()
        here = {"logical_shard": ids.shard_of(user.id)}
        with pytest.raises(DBAPIError):
            session.execute(text("SELECT 1/0"), bind_arguments=here)
        with pytest.raises(PendingRollbackError):
            session.commit()
        assert not session.token
        session.rollback()
        assert session.scalar(select(func.count()).where(Photo.owner_id == user.id)) == 0


def test_a_full_pool_is_a_typed_error(topology: Topology) -> None:
    with placed(one_server(topology), 0, size=1) as cluster:
        user = add_user(cluster, "ana")
        with cluster.writer() as first, cluster.writer() as second:
            assert first.get(User, user.id) is not None
            with pytest.raises(PoolTimeoutError) as caught:
                second.get(User, user.id)
            assert caught.value.retryable


def test_reference_tables_join_in_every_logical_shard(cluster: Cluster) -> None:
    user = add_user(cluster, "pt")
    with cluster.writer() as session:
        assert session.get_one(Country, "pt").name == "Portugal"
        joined = select(User.name, Country.name).join(Country, Country.code == User.name)
        assert session.execute(joined.where(User.id == user.id)).one() == ("pt", "Portugal")
        assert session.execute(joined.options(all_shards())).all() == [("pt", "Portugal")]
        session.add(Country(code="es", name="Spain"))
        with pytest.raises(CrossShardWriteError, match="atomic=True"):
            session.flush()


def test_merge_and_refresh(cluster: Cluster) -> None:
    user = add_user(cluster, "ana")
    with cluster.writer() as session:
        merged = session.merge(User(id=user.id, name="merged"))
        session.commit()
        session.execute(update(User).where(User.id == user.id).values(name="refreshed"))
        session.refresh(merged)
        assert merged.name == "refreshed"


def test_an_unmapped_load_across_shards_is_refused(cluster: Cluster) -> None:
    user = add_user(cluster, "ana", 1)
    with cluster.writer() as session:
        with pytest.raises(UnsupportedStatementError, match="selectinload"):
            session.scalars(
                select(Like).where(Like.photo_id == user.photos[0].id).options(joinedload(Like.fan))
            )
        session.add(Like(photo_id=user.photos[0].id, user_id=user.id))
        session.flush()
        like = session.scalars(
            select(Like).where(Like.photo_id == user.photos[0].id).options(selectinload(Like.fan))
        ).one()
        assert like.fan.name == "ana"


def test_what_the_servers_say_counts_more_than_the_first_placement(topology: Topology) -> None:
    swapped = ShardMap(tuple(reversed(topology.shard_map.owners)), topology.shard_map.epochs)
    wrong = Topology(topology.name, topology.physical, swapped)
    with Cluster(wrong) as cluster:
        with cluster.writer() as session:
            session.add(User(name="found"))
            session.commit()
        assert cluster.topology.shard_map == topology.shard_map


@pytest.mark.anyio
async def test_the_async_twin_says_the_same_words(cluster_file: Path, settled: Settled) -> None:
    async with AsyncCluster.from_file(cluster_file) as cluster:
        async with cluster.writer() as session:
            users = [User(name=f"user {i}") for i in range(3)]
            for user in users:
                session.add(user)
                await session.commit()
                session.add(Photo(owner_id=user.id, caption=user.name))
                await session.commit()
            assert session.token
            photos = await session.execute(
                select(Photo.id, Photo.caption).order_by(Photo.id.desc()).options(all_shards())
            )
            expected = [row.caption for row in photos][:2]
        settled()
        async with cluster.reader() as session:
            assert (await session.get_one(User, users[0].id)).name == "user 0"
            newest = select(Photo).order_by(Photo.id.desc()).limit(2).options(all_shards())
            captions = [photo.caption for photo in await session.scalars(newest)]
            assert captions == expected
            assert session.route(newest).kind == "all"
            resting = [session.sync_session.is_at_rest]
            stream = await session.stream_scalars(newest.execution_options(yield_per=1))
            resting.append(session.sync_session.is_at_rest)
            await stream.close()
            resting.append(session.sync_session.is_at_rest)
            assert resting == [True, False, True]
            with pytest.raises(ScatterNotAllowedError):
                await session.scalars(select(Photo))
            session.add(User(name="no"))
            with pytest.raises(ReadOnlySessionError):
                await session.commit()


@pytest.mark.anyio
@pytest.mark.parametrize("limits", [all_shards(), all_shards(timeout=60)], ids=["", "timeout"])
async def test_a_cancelled_gather_leaves_clean_connections(
    cluster_file: Path, topology: Topology, limits: AllShards
) -> None:
    async with AsyncCluster.from_file(cluster_file) as cluster:
        for shard in (0, 40):
            async with cluster.writer() as session:
                session.add(User(id=ids.compose(1, shard, 0), name="x"))
                await session.commit()
        slow = select(User.id).where(cast(func.pg_sleep(60), String) == "").options(limits)
        async with cluster.reader(after=ASK_PRIMARIES) as session:
            task = asyncio.create_task(session.execute(slow))
            await asyncio.to_thread(
                wait_until,
                lambda: all(_sleeps(s) for s in topology.physical.values()),
                10.0,
                "both",
            )
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert not any(_sleeps(shard) for shard in topology.physical.values())
        async with cluster.reader(after=ASK_PRIMARIES) as session:
            names = await session.scalars(select(User.name).options(all_shards()))
            assert names.all() == ["x", "x"]
            assert await session.run_sync(_timeouts) == {"0"}


def _timeouts(session: Session) -> set[object]:
    assert isinstance(session, ReadSession)
    return {
        connection.exec_driver_sql("SHOW statement_timeout").scalar()
        for _, connection in session._roots.values()
    }


def _sleeps(shard: PhysicalShard) -> bool:
    with admin(shard) as connection:
        found = connection.execute(
            "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
        ).fetchone()
    return found is not None
