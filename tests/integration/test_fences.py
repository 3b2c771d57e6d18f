"""A session used after its shard was fenced: a typed error that names the shard, and no row."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import func, insert, select, update
from sqlalchemy.exc import PendingRollbackError

from shardkit import AsyncCluster, Cluster, all_shards, ids
from shardkit.errors import GatherError, ShardFencedError
from shardkit.testing import wait_until
from shardkit.tokens import ASK_PRIMARIES
from shardkit.topology import Topology, schema_name
from shardkit.writer import WriteSession
from tests.fixtures.sharded import Settled, admin
from tests.models import Photo, User

pytestmark = pytest.mark.integration

SHARD = 41
FENCED, OPEN = ids.compose(1, SHARD, 0), ids.compose(1, SHARD + 1, 0)
TABLES = f"ALL TABLES IN SCHEMA {schema_name(SHARD)}"


@contextmanager
def fenced(topology: Topology, rights: str) -> Iterator[None]:
    """Take rights on the tables of a logical shard from the application's role."""
    owner = topology.physical[topology.shard_map.owner(SHARD)]
    role = owner.primary.url.username
    with admin(owner) as connection:
        connection.execute(f'REVOKE {rights} ON {TABLES} FROM "{role}"'.encode())
        try:
            yield
        finally:
            connection.execute(f'GRANT {rights} ON {TABLES} TO "{role}"'.encode())


@pytest.fixture
def photos(cluster: Cluster, settled: Settled) -> None:
    for owner in (FENCED, OPEN):
        with cluster.writer() as session:
            session.add(User(id=owner, name="x", photos=[Photo(caption="old")]))
            session.commit()
    settled()


def writes(session: WriteSession) -> list[Callable[[], Any]]:
    def adds() -> None:
        session.add(Photo(owner_id=FENCED))
        session.flush()

    def changes() -> None:
        photo = session.scalars(select(Photo).where(Photo.owner_id == FENCED)).first()
        assert photo is not None
        photo.caption = f"{photo.caption}!"
        session.commit()

    return [
        adds,
        changes,
        lambda: session.execute(insert(Photo).values(owner_id=FENCED, caption="new")),
        lambda: session.execute(
            update(Photo).where(Photo.owner_id.in_([OPEN, FENCED])).values(caption="new")
        ),
    ]


@pytest.mark.usefixtures("photos")
def test_a_writer_is_told_the_shard_and_writes_nothing(
    cluster: Cluster, topology: Topology
) -> None:
    with cluster.writer() as session, fenced(topology, "INSERT, UPDATE, DELETE"):
        for write in writes(session):
            with pytest.raises(ShardFencedError) as caught:
                write()
            assert caught.value.logical_shard == SHARD
            assert caught.value.retryable
            assert f"logical shard {SHARD}" in str(caught.value)
            session.rollback()
        with pytest.raises(ShardFencedError):
            session.execute(insert(Photo).values(owner_id=FENCED, caption="new"))
        with pytest.raises(PendingRollbackError):
            session.commit()
    with cluster.writer() as session:
        captions = select(Photo.caption).where(Photo.owner_id.in_([OPEN, FENCED]))
        assert session.scalars(captions).all() == ["old", "old"]
        for write in writes(session):  # the same calls succeed once the fence is lifted
            write()
        session.commit()


@pytest.mark.usefixtures("photos")
def test_a_reader_is_told_the_shard_and_reads_the_others(
    cluster: Cluster, topology: Topology, settled: Settled
) -> None:
    with cluster.reader() as session, fenced(topology, "SELECT"):
        settled()
        with pytest.raises(ShardFencedError) as caught:
            session.scalars(select(Photo).where(Photo.owner_id == FENCED)).all()
        assert caught.value.logical_shard == SHARD
        assert len(session.scalars(select(Photo).where(Photo.owner_id == OPEN)).all()) == 1
        assert session.get(User, OPEN) is not None
        with pytest.raises(ShardFencedError):
            session.get(User, FENCED)
        two = select(func.count()).select_from(Photo).where(Photo.owner_id.in_([OPEN, FENCED]))
        for options in ({}, {"yield_per": 2}):
            with pytest.raises(GatherError) as gathered:
                session.scalars(two, execution_options=options).all()
            assert f"logical shard {SHARD}" in str(gathered.value)
        rest = session.scalars(select(Photo).options(all_shards(partial=True))).all()
        (failure,) = session.failures.values()
        assert isinstance(failure, ShardFencedError)
        assert failure.logical_shard == SHARD
        assert all(photo.owner_id not in (FENCED, OPEN) for photo in rest), "of other servers"
    settled()
    with cluster.reader() as session:
        assert session.scalar(two) == 2


@pytest.mark.usefixtures("photos")
def test_what_waits_for_the_fence_is_told_too(cluster: Cluster, topology: Topology) -> None:
    owner = topology.physical[topology.shard_map.owner(SHARD)]
    role, schema = owner.primary.url.username, schema_name(SHARD)
    told: list[BaseException] = []

    def write() -> None:
        with cluster.writer() as session:
            try:
                session.execute(insert(Photo).values(owner_id=FENCED, caption="new"))
            except ShardFencedError as error:
                told.append(error)

    with admin(owner) as other, admin(owner) as mover:
        with mover.transaction():  # as a cut-over does
            mover.execute(f"LOCK TABLE {schema}.photos IN SHARE ROW EXCLUSIVE MODE".encode())
            thread = threading.Thread(target=write)
            thread.start()
            wait_until(lambda: _waits(other), 10.0, "the writer waits for the lock")
            mover.execute(f'REVOKE INSERT ON {TABLES} FROM "{role}"'.encode())
        thread.join(10.0)
        mover.execute(f'GRANT INSERT ON {TABLES} TO "{role}"'.encode())
    assert [getattr(error, "logical_shard", None) for error in told] == [SHARD]


def _waits(connection: psycopg.Connection[Any]) -> bool:
    found = connection.execute("SELECT count(*) FROM pg_locks WHERE NOT granted").fetchone()
    return found is not None and found[0] > 0


@pytest.mark.anyio
@pytest.mark.usefixtures("photos")
async def test_the_async_twin_is_told_alike(
    cluster_file: Path, topology: Topology, settled: Settled
) -> None:
    async with AsyncCluster.from_file(cluster_file) as cluster:
        with fenced(topology, "SELECT, INSERT"):
            async with cluster.writer() as session:
                session.add(Photo(owner_id=FENCED))
                with pytest.raises(ShardFencedError) as caught:
                    await session.commit()
                assert caught.value.logical_shard == SHARD
            async with cluster.reader(after=ASK_PRIMARIES) as reader:
                with pytest.raises(GatherError, match=f"logical shard {SHARD}"):
                    await reader.scalars(select(Photo).options(all_shards()))
    settled()
