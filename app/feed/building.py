"""Builds timelines in the background, and adds the photos of people who are newly followed.

Reads primaries: what is built has to have everything that was committed before pushes arrive in
it. A page never waits for this; until it is done databases are asked.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from typing import Any, Final

from sqlalchemy import select

from app.feed.rings import MOST, Timeline
from app.feed.sources import MOST_NEW, following_of
from app.feed.timelines import AsyncTimelines, SilentError
from app.graph import tao
from app.graph.models import Assoc, Kind
from app.graph.tao import Edge
from app.partial import FAILED
from app.photos.models import Photo
from shardkit import AsyncCluster, AsyncWriteSession, background, deadline

__all__ = ["Builder"]

log = logging.getLogger("app.feed")

TIMEOUT: Final = 20.0
"""Seconds that building one may take: less than a timeline is kept that is being built."""

AT_ONCE: Final = 4
"""Timelines built at the same time; users come first."""


class Builder:
    """Builds timelines beside the requests of one server process.

    Args:
        cluster: where follows and photos are.
        timelines: where they are built.
        most: people whose photos are looked for.
    """

    def __init__(self, cluster: AsyncCluster, timelines: AsyncTimelines, most: int) -> None:
        self._cluster = cluster
        self._timelines = timelines
        self._most = most
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._gate = asyncio.Semaphore(AT_ONCE)

    def build(self, user_id: int) -> None:
        """Begin to build somebody's timeline, unless that is under way here."""
        self._start(user_id, self._build(user_id))

    def cover(self, user_id: int, new: Sequence[Edge], seen: Timeline) -> None:
        """Begin to add the photos of newly followed people to a timeline.

        Args:
            user_id: whose.
            new: the follows, newest first.
            seen: the timeline that lacks them.
        """
        work = self._rebuild(user_id) if len(new) > MOST_NEW else self._cover(user_id, new, seen)
        self._start(user_id, work)

    async def settled(self) -> None:
        """Wait for what has been begun."""
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def close(self) -> None:
        """End what is under way; it is begun again when it is asked for."""
        for task in self._tasks.values():
            task.cancel()
        await self.settled()

    def _start(self, user_id: int, work: Coroutine[Any, Any, None]) -> None:
        if user_id in self._tasks:
            work.close()
            return
        task = asyncio.create_task(self._quietly(work))
        self._tasks[user_id] = task
        task.add_done_callback(lambda _: self._tasks.pop(user_id, None))

    async def _quietly(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            async with self._gate:
                with deadline(TIMEOUT), background():
                    await work
        except (SilentError, *FAILED) as error:
            log.info("a timeline was not built: %s", error)
        finally:
            work.close()

    async def _rebuild(self, user_id: int) -> None:
        await self._timelines.forget(user_id)
        await self._build(user_id)

    async def _build(self, user_id: int) -> None:
        begun = await self._timelines.begin(user_id)
        if begun is None:
            return
        async with self._cluster.writer() as session:
            following, pulled = await tao.on(session, following_of, user_id, self._most)
            taken, covered = await self._taken(session, user_id, tao.edges(following))
            owners = taken - pulled
            photo_ids: list[int] = []
            if owners:
                photo_ids = await _newest(session, owners, 0, MOST + 1)
        await self._timelines.finish(user_id, photo_ids, begun=begun, floor=0, covered=covered)

    async def _cover(self, user_id: int, new: Sequence[Edge], seen: Timeline) -> None:
        async with self._cluster.writer() as session:
            taken, covered = await self._taken(session, user_id, new)
            if not taken:
                return
            photo_ids = await _newest(session, taken, seen.floor, MOST + 1)
        if len(photo_ids) > MOST:
            await self._rebuild(user_id)
        else:
            await self._timelines.cover(user_id, photo_ids[::-1], seen=seen, covered=covered)

    @staticmethod
    async def _taken(
        session: AsyncWriteSession, user_id: int, following: Sequence[Edge]
    ) -> tuple[set[int], int]:
        """Return who pushes to somebody from now on, and the last follow before which all do.

        Those are the people at whom the inverse edge is.
        """
        if not following:
            return set(), 0
        statement = select(Assoc.id1).where(
            Assoc.id1.in_([edge.id2 for edge in following]),
            Assoc.atype == int(Kind.FOLLOWED_BY),
            Assoc.id2 == user_id,
        )
        there = set(await session.scalars(statement))
        taken: set[int] = set()
        covered = 0
        for edge in reversed(following):
            if edge.id2 not in there:
                break
            taken.add(edge.id2)
            covered = edge.at
        return taken, covered


async def _newest(session: AsyncWriteSession, owners: set[int], above: int, n: int) -> list[int]:
    statement = select(Photo.id).where(Photo.owner_id.in_(owners), Photo.id > above)
    return list(await session.scalars(statement.order_by(Photo.id.desc()).limit(n)))
