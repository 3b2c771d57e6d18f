"""Likes of one hot photo: written together and counted in slots, against a row update per like.

Both arms insert a row for each like and answer when it is committed, with fsync, from one process
with asyncio. *row update* is the plain way: lock the photo, insert, add one, commit; as many at a
time as connections, since they wait for one lock anyway. *together* is what the application does,
with two thousand likes under way. The totals are then compared with the rows.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from sqlalchemy import func, select

from app.clock import utc_now
from app.photos.likes import Likes, Reaction
from app.photos.models import Like, LikeSlot, Photo
from benchmarks.measure import report
from benchmarks.socialworld import World, world
from shardkit import AsyncCluster, ids

PEERS = ("a row update per like",)
TARGETS = {"vs_row_update": "≥ 20", "wrong_totals": "≤ 0"}

UNDER_WAY = 2000
AT_ONCE = 5
"""Connections of a pool; more row updates at a time only wait longer."""


def main(*, as_json: bool, quick: bool = False) -> None:
    with world(fsync=True) as here:
        figures, medians = asyncio.run(measured(here, seconds=3.0 if quick else 15.0))
    report("likes", figures, peers=PEERS, medians=medians, targets=TARGETS, as_json=as_json)


async def measured(here: World, *, seconds: float) -> tuple[dict[str, float], dict[str, float]]:
    owners = here.people(2)
    photos = [some[0] for some in here.photos(owners, 1).values()]
    plain, hot = sorted(photos)
    async with AsyncCluster(here.topology) as cluster:
        likes = Likes(cluster, utc_now, timeout=30.0)

        async def one(user: int) -> None:
            await locked_like(cluster, plain, user)

        async def together(user: int) -> None:
            await likes.react(hot, Reaction(user, likes=True))

        speeds: dict[str, list[float]] = {"row update": [], "together": []}
        base = 0
        for _ in range(3):  # in turns: noise hits both
            for name, work, at_once in (
                ("row update", one, AT_ONCE),
                ("together", together, UNDER_WAY),
            ):
                n, took = await driven(work, base, at_once, seconds / 3)
                base += n
                speeds[name].append(n / took)
        await likes.close()
        wrong = await differing(cluster, plain, hot)
    rates = {name: sorted(found)[1] for name, found in speeds.items()}
    figures = {
        "vs_row_update": rates["together"] / rates["row update"],
        "likes_per_second": rates["together"],
        "row_updates_per_second": rates["row update"],
        "wrong_totals": float(wrong),
    }
    return figures, {name: 1 / rate for name, rate in rates.items()}


async def driven(
    work: Callable[[int], Awaitable[None]], base: int, at_once: int, seconds: float
) -> tuple[int, float]:
    """Have so many people like at a time; return how many did, and how long that took."""
    started = time.perf_counter()
    n = 0

    async def somebody() -> None:
        nonlocal n
        while time.perf_counter() - started < seconds:
            n += 1
            await work(ids.compose(9, (base + n) % 16, 0) + ((base + n) << 24))

    await asyncio.gather(*(somebody() for _ in range(at_once)))
    return n, time.perf_counter() - started


async def locked_like(cluster: AsyncCluster, photo_id: int, user: int) -> None:
    """Like a photo as one does at first: under its lock."""
    async with cluster.writer() as session:
        photo: Any = await session.get(Photo, photo_id, with_for_update=True)
        session.add(Like(photo_id=photo_id, user_id=user, created_at=utc_now()))
        photo.like_count += 1
        await session.commit()


async def differing(cluster: AsyncCluster, plain: int, hot: int) -> int:
    """Return how many of the two totals are not the number of rows."""
    wrong = 0
    async with cluster.writer() as session:
        for photo_id in (plain, hot):
            rows = select(func.count()).select_from(Like).where(Like.photo_id == photo_id)
            true = (await session.scalars(rows)).one()
            if photo_id == plain:
                total = (await session.get_one(Photo, photo_id)).like_count
            else:
                slots = select(func.sum(LikeSlot.n)).where(LikeSlot.photo_id == photo_id)
                total = int((await session.scalars(slots)).one())
            wrong += total != true or not true
    return wrong
