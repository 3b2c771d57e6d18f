"""Likes of one photo by many at once: each counts once, and the count is exact."""

from __future__ import annotations

import asyncio
import datetime as dt
import random

import pytest
from sqlalchemy import func, select

from app.accounts.models import User
from app.errors import NotFoundError
from app.graph import tao
from app.graph.models import Kind
from app.photos.likes import Likes, Reaction, likes_among
from app.photos.models import Like, LikeSlot, Photo
from app.workers import relay_of
from shardkit import AsyncCluster, Cluster, ids
from shardkit.testing import wait_until
from tests.fixtures.service import Service

pytestmark = pytest.mark.integration

NOW = dt.datetime(2026, 5, 1, tzinfo=dt.UTC)


def new_photo(cluster: Cluster) -> tuple[int, int]:
    with cluster.writer() as session:
        owner = User(username="hot", display_name="hot", password_hash="", created_at=NOW)
        owner.username = f"hot{random.randrange(1 << 40)}"
        session.add(owner)
        session.commit()
        photo = Photo(
            owner_id=owner.id, caption="", width=1, height=1, blob_key="x", created_at=NOW
        )
        session.add(photo)
        session.commit()
        return int(owner.id), int(photo.id)


@pytest.mark.anyio
async def test_thousands_at_once_count_once_each(service: Service) -> None:
    rng = random.Random(5)
    people = [ids.compose(5, n % 8, n) for n in range(400)]
    with Cluster.from_file(service.settings.config) as cluster:
        owner, photo = new_photo(cluster)
        with cluster.writer() as session:
            tao.assoc_add(session, tao.locked(session, owner), Kind.BLOCKS, people[0], 1)
            session.commit()
        async with AsyncCluster.from_file(service.settings.config) as aio:
            servers = [Likes(aio, lambda: NOW, timeout=30.0) for _ in range(3)]
            expected: set[int] = set()

            async def somebody(user: int) -> None:
                for _ in range(5):
                    likes = rng.random() < 0.6
                    server = rng.choice(servers)
                    try:
                        await server.react(photo, Reaction(user, likes))
                    except NotFoundError:
                        assert (user, likes) == (people[0], True)
                    else:
                        (expected.add if likes else expected.discard)(user)

            await asyncio.gather(*map(somebody, people))
            total, token = await servers[0].react(photo, Reaction(people[1], likes=True))
            expected.add(people[1])
            assert total == len(expected)
            with pytest.raises(NotFoundError):
                await servers[0].react(photo + 1, Reaction(people[1], likes=True))
            async with aio.reader(after=token) as reader:
                found = await reader.get(Photo, photo)
                assert found is not None
                assert await likes_among(reader, [found]) == {photo: len(expected)}
            for server in servers:
                await server.close()
        with cluster.writer() as session:
            rows = select(Like.user_id).where(Like.photo_id == photo)
            assert set(session.scalars(rows)) == expected
            slots = select(func.sum(LikeSlot.n)).where(LikeSlot.photo_id == photo)
            assert int(session.scalars(slots).one()) == len(expected)
        relay = relay_of(cluster)

        def folded() -> bool:
            relay.drain()
            with cluster.writer() as session:
                return bool(session.get_one(Photo, photo).like_count == len(expected))

        wait_until(folded, 60.0, "the relay folds")
