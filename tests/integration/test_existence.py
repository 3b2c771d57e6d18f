"""EXISTS and lists as columns over several logical shards, on real servers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import distinct, exists, func, select

from shardkit import AsyncCluster, Cluster, all_shards, ids
from shardkit.errors import ScatterNotAllowedError, UnsupportedStatementError
from shardkit.tokens import ASK_PRIMARIES
from tests.fixtures.sharded import Settled
from tests.models import Like, Photo, User

pytestmark = pytest.mark.integration

OWNERS = [ids.compose(1, shard, 0) for shard in (0, 9, 33, 63)]


@pytest.fixture
def owners(cluster: Cluster, settled: Settled) -> list[int]:
    """Owners on both servers; the one at place i has i photos, of rank i, the last one None."""
    for i, owner in enumerate(OWNERS):
        with cluster.writer() as session:
            user = User(id=owner, name=f"user {i}")
            ranks = [*[i] * (i - 1), None][:i]
            user.photos = [Photo(caption=f"{i}.{j}", rank=r) for j, r in enumerate(ranks)]
            session.add(user)
            session.commit()
    settled()
    return OWNERS


@pytest.mark.usefixtures("owners")
def test_any_logical_shard_may_have_the_row(cluster: Cluster) -> None:
    with cluster.reader() as session:
        for rank, found in ((3, True), (1, False), (9, False)):
            of_rank = select(Photo).where(Photo.rank == rank)
            for question, answer in (
                (exists().where(Photo.rank == rank), found),
                (of_rank.exists(), found),
                (~of_rank.exists(), not found),
                (session.query(Photo).filter(Photo.rank == rank).exists(), found),
                (exists(of_rank).label("x"), found),
            ):
                assert session.scalar(select(question).options(all_shards())) is answer
                asked = session.query(question).options(all_shards())
                assert asked.scalar() is answer
        with pytest.raises(ScatterNotAllowedError):
            session.scalar(select(exists().where(Photo.rank == 3)))


def test_keys_confine_what_is_asked(cluster: Cluster, owners: list[int]) -> None:
    none, *others = owners
    with cluster.reader() as session:
        many = [ids.compose(7 + i, i % 64, 1) for i in range(100_000)]
        for keys, answer in (([none], False), (others, True), ([none, owners[3]], True),
                             ([], False), (many, False), ([*many, owners[3]], True)):  # fmt: skip
            question = select(exists().where(Photo.owner_id.in_(keys)))
            assert session.scalar(question) is answer
            assert len(session.route(question).shards) == len(
                {ids.shard_of(k) for k in keys} or {0}
            )


def test_beside_aggregates_and_of_several_tables(cluster: Cluster, owners: list[int]) -> None:
    statement = select(
        func.count(Photo.id),
        exists(select(User.id).where(User.name == "user 3")).label("has_user"),
        ~exists(select(Like.photo_id)),
    )
    with cluster.reader() as session:
        assert session.execute(statement.options(all_shards())).one() == (6, True, True)
        row = session.execute(statement.where(Photo.owner_id == owners[2]).options(all_shards()))
        assert row.one() == (2, True, True)
        with pytest.raises(UnsupportedStatementError, match="beside EXISTS"):
            session.execute(select(Photo.id, exists(select(User.id))).options(all_shards()))


@pytest.mark.usefixtures("owners")
def test_lists_of_all_logical_shards(cluster: Cluster) -> None:
    statement: Any = select(
        func.array_agg(Photo.caption).aggregate_order_by(Photo.rank.desc(), Photo.id),
        func.array_agg(Photo.caption),
        func.array_agg(distinct(Photo.rank)).aggregate_order_by(Photo.rank),
        func.array_agg(Photo.rank).filter(Photo.rank > 7),
        func.string_agg(Photo.caption, " ").aggregate_order_by(Photo.caption.collate("C")),
    )
    everything = ["1.0", "2.0", "2.1", "3.0", "3.1", "3.2"]
    with cluster.reader() as session:
        sorted_, unsorted, once, none, text = session.execute(statement.options(all_shards())).one()
        assert sorted_ == ["1.0", "2.1", "3.2", "3.0", "3.1", "2.0"], "by id among equals"
        assert sorted(unsorted) == everything
        assert [c[0] for c in unsorted] == [*"122333"], "one logical shard after another"
        assert once == [2, 3, None]
        assert none is None
        assert text == " ".join(everything)


@pytest.mark.anyio
@pytest.mark.usefixtures("owners")
async def test_the_async_twin_asks_alike(cluster_file: Path) -> None:
    async with (
        AsyncCluster.from_file(cluster_file) as cluster,
        cluster.reader(after=ASK_PRIMARIES) as session,
    ):
        question = select(exists().where(Photo.rank == 3)).options(all_shards())
        assert await session.scalar(question) is True
        ranks = func.array_agg(Photo.rank).aggregate_order_by(Photo.rank.nulls_first())
        found = await session.scalar(select(ranks).options(all_shards()))
        assert found == [None, None, None, 2, 3, 3]
