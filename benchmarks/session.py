"""What routing costs: one row read and written, against plain sessions on the same server.

Arms, interleaved, each with a fresh session a time: shardkit, SQLAlchemy's own `Session` on the
schema of the same logical shard, and raw psycopg. A write is one object added and committed; two
writes are flushed one after the other, so that nothing but BEGIN and its round trip is spared.
"""

from __future__ import annotations

import asyncio
import itertools

from sqlalchemy import BigInteger, create_engine
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from benchmarks.measure import connect, database, interleaved, report, servers
from shardkit import AsyncCluster, Cluster, Sharded, ids
from shardkit.config import load
from shardkit.topology import schema_name

PEERS = ("sqlalchemy.orm.Session", "sqlalchemy.ext.asyncio.AsyncSession", "psycopg")
TARGETS = {
    "get_vs_plain_session": "≤ 0.75",
    "write_vs_plain_session": "≤ 1.00",
    "async_get_vs_plain_session": "≤ 0.75",
    "async_write_vs_plain_session": "≤ 1.00",
}
SHARD = 7


class Base(DeclarativeBase):
    """Models of the shardkit arm."""


class Photo(Sharded, Base):
    __tablename__ = "photos"
    __shard_key__ = "owner_id"
    owner_id: Mapped[int]
    caption: Mapped[str]


class PlainBase(DeclarativeBase):
    """Models of the plain arm: the same table, named with its schema."""

    __abstract__ = True


class PlainPhoto(PlainBase):
    __tablename__ = "photos"
    __table_args__ = {"schema": schema_name(SHARD)}  # noqa: RUF012  SQLAlchemy's own form
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    owner_id: Mapped[int] = mapped_column(BigInteger)
    caption: Mapped[str]


def main(*, as_json: bool, quick: bool = False) -> None:  # noqa: PLR0915  an arm is a function
    with servers(logical_shards=64) as local:
        _, topology = load(local.config_path)
        small = database(local, topology, "bench", logical_shards=64, metadata=Base.metadata)
        shard = small.physical[small.shard_map.owner(SHARD)]
        engine = create_engine(shard.primary.url)
        owner = ids.compose(1, SHARD, 0)
        numbers = itertools.count(ids.compose(2, SHARD, 0))
        with Cluster(small) as cluster, connect(shard) as raw:
            with cluster.writer() as session:
                photo = Photo(owner_id=owner, caption="dawn")
                session.add(photo)
                session.commit()
            key = photo.id
            select = f"SELECT id, owner_id, caption FROM {schema_name(SHARD)}.photos WHERE id = %s"

            def get() -> object:
                with cluster.reader() as session:
                    return session.get_one(Photo, key)

            def plain_get() -> object:
                with Session(engine) as session:
                    return session.get_one(PlainPhoto, key)

            def raw_get() -> object:
                return raw.execute(select.encode(), (key,)).fetchone()

            def write() -> None:
                with cluster.writer() as session:
                    session.add(Photo(owner_id=owner, caption="dawn"))
                    session.commit()

            def plain_write() -> None:
                with Session(engine) as session:
                    session.add(PlainPhoto(id=next(numbers), owner_id=owner, caption="dawn"))
                    session.commit()

            def write_twice() -> None:
                with cluster.writer() as session:
                    for _ in range(2):
                        session.add(Photo(owner_id=owner, caption="dawn"))
                        session.flush()
                    session.commit()

            def plain_write_twice() -> None:
                with Session(engine) as session:
                    for _ in range(2):
                        photo = PlainPhoto(id=next(numbers), owner_id=owner, caption="dawn")
                        session.add(photo)
                        session.flush()
                    session.commit()

            loop = asyncio.new_event_loop()
            async_cluster = AsyncCluster(small)
            async_engine = create_async_engine(shard.primary.url)

            async def awaited() -> object:
                async with async_cluster.reader() as session:
                    return await session.get_one(Photo, key)

            async def plain_awaited() -> object:
                async with AsyncSession(async_engine) as session:
                    return await session.get_one(PlainPhoto, key)

            async def written() -> None:
                async with async_cluster.writer() as session:
                    session.add(Photo(owner_id=owner, caption="dawn"))
                    await session.commit()

            async def plain_written() -> None:
                async with AsyncSession(async_engine) as session:
                    session.add(PlainPhoto(id=next(numbers), owner_id=owner, caption="dawn"))
                    await session.commit()

            rounds = 2_000 if quick else 10_000
            medians = interleaved(
                {"get": get, "plain get": plain_get, "psycopg get": raw_get}, rounds=rounds
            )
            medians |= interleaved({"write": write, "plain write": plain_write}, rounds=rounds)
            medians |= interleaved(
                {"two writes": write_twice, "plain two writes": plain_write_twice}, rounds=rounds
            )
            medians |= interleaved(
                {
                    "async get": lambda: loop.run_until_complete(awaited()),
                    "plain async get": lambda: loop.run_until_complete(plain_awaited()),
                },
                rounds=rounds,
            )
            medians |= interleaved(
                {
                    "async write": lambda: loop.run_until_complete(written()),
                    "plain async write": lambda: loop.run_until_complete(plain_written()),
                },
                rounds=rounds,
            )
            loop.run_until_complete(async_cluster.close())
            loop.run_until_complete(async_engine.dispose())
            loop.close()
        engine.dispose()
    figures = {
        "get_vs_plain_session": medians["get"] / medians["plain get"],
        "write_vs_plain_session": medians["write"] / medians["plain write"],
        "two_writes_vs_plain_session": medians["two writes"] / medians["plain two writes"],
        "async_write_vs_plain_session": medians["async write"] / medians["plain async write"],
        "async_get_vs_plain_session": medians["async get"] / medians["plain async get"],
        "get_vs_raw_psycopg": medians["get"] / medians["psycopg get"],
    }
    report("session", figures, peers=PEERS, medians=medians, targets=TARGETS, as_json=as_json)
