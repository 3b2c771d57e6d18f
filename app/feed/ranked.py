"""A ranked feed: windows of the newest photos, each ranked once and then shown as it was ranked.

The first page of a window ranks it; its order goes into the cursor, so that nothing that happens
meanwhile moves what has been handed out. When the ranked photos are at their end, those of the
window that the first pass left out come newest first; then the next window begins below it. So
every photo of the people one follows is shown once. Called by `app.feed.service`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Protocol

from sqlalchemy import select

from app.accounts.models import User
from app.accounts.repository import AccountRepository
from app.accounts.service import Viewer
from app.clock import Clock
from app.feed.cursors import Place
from app.feed.ranking.ads import Ad, running
from app.feed.ranking.candidates import Candidate, Source
from app.feed.ranking.rankers import LinearRanker, Ranker
from app.feed.ranking.window import FOLLOWING, Shared, ordered, picked
from app.feed.schemas import Reason
from app.graph.privacy import seen_among
from app.partial import FAILED, PATIENCE, answered_or_none
from app.photos.models import Photo
from app.photos.repository import PhotoRepository
from shardkit import AsyncCluster, AsyncReadSession, all_shards, deadline, ids

__all__ = ["Chronological", "RankedFeed"]

EXPLORE_LIFE: Final = 5.0
ADS_LIFE: Final = 30.0
"""Seconds for which a process uses what it has read of these."""

EXPLORE_SIZE: Final = 300

REASONS: Final[dict[Source, Reason]] = {
    Source.FOLLOWING: "following",
    Source.EXPLORE: "suggested",
    Source.AD: "sponsored",
}

Shown = tuple[Photo, Reason]


class Chronological(Protocol):
    """The feed that is newest first, below the ranked one."""

    async def photos(
        self, session: AsyncReadSession, viewer_id: int, before: int, n: int
    ) -> tuple[Sequence[Photo], int | None]:
        """Return photos below an id, newest first, and where the next page begins."""
        ...

    async def ids(
        self, session: AsyncReadSession, viewer_id: int, before: int, n: int
    ) -> tuple[list[int], frozenset[int]]:
        """Return ids that may belong to the feed, newest first, and the owners that do."""
        ...


class RankedFeed:
    """Ranks for everybody; one of a server process.

    Args:
        cluster: where photos and ads are.
        clock: the time.
        ranker: values candidates.
    """

    def __init__(self, cluster: AsyncCluster, clock: Clock, ranker: Ranker | None = None) -> None:
        self._cluster = cluster
        self._clock = clock
        self._ranker = ranker or LinearRanker()
        self._explored = Shared(self._load_explored, EXPLORE_LIFE)
        self._ads = Shared(self._load_ads, ADS_LIFE)

    async def page(
        self,
        session: AsyncReadSession,
        feed: Chronological,
        viewer: Viewer,
        place: Place,
        n: int,
    ) -> tuple[list[Shown], Place | None]:
        """Return a page of a ranked feed, and where the next one begins."""
        if not place.ranked:
            place = await self._window(session, feed, viewer, place.before)
        if place.rank < len(place.ranked):
            return await self._from_window(session, feed, viewer, place, n)
        return await self._rest(session, feed, viewer, place, n)

    async def _window(
        self, session: AsyncReadSession, feed: Chronological, viewer: Viewer, before: int
    ) -> Place:
        """Rank the window that begins below an id."""
        following, owners = await feed.ids(session, viewer.id, before, FOLLOWING)
        low = following[-1] if len(following) == FOLLOWING else 0
        now = self._clock().timestamp()
        ads = [
            Candidate(ad.photo_id, Source.AD, 0.0, bid=ad.bid)
            for ad in await self._ads.get()
            if ad.owner_id not in owners
        ]
        paid = {each.id for each in ads}
        explored = [
            id_
            for id_, owner_id in await self._explored.get()
            if low < id_ < before and owner_id not in owners and id_ not in paid
        ]
        candidates = picked(following, explored, lambda id_: now - ids.parse(id_).time.timestamp())
        photos = await self._rows(session, [each.id for each in (*candidates, *ads)])
        theirs = set(following)
        known = {
            photo.id: photo
            for photo in photos
            if photo.owner_id in owners or photo.id not in theirs  # not of who was unfollowed
        }
        people, seen = await self._people(session, viewer, list(known.values()))
        liked = await PhotoRepository(session).liked_among(viewer.id, list(known))
        found = ordered(
            candidates,
            ads,
            known,
            {id_: people[id_] for id_ in seen},
            ranker=self._ranker,
            viewer_id=viewer.id,
            liked=liked,
            now=now,
        )
        tokens = tuple(4 * each.id + each.source for each in found)
        return Place(before, is_ranked=True, ranked=tokens, rank=0, low=low)

    async def _from_window(
        self,
        session: AsyncReadSession,
        feed: Chronological,
        viewer: Viewer,
        place: Place,
        n: int,
    ) -> tuple[list[Shown], Place | None]:
        """Return what comes next of a window, without what is gone since it was ranked."""
        tokens = place.ranked[place.rank : place.rank + n]
        _, owners = await feed.ids(session, viewer.id, 0, 0)
        photos = {photo.id: photo for photo in await self._rows(session, [t // 4 for t in tokens])}
        _, seen = await self._people(session, viewer, list(photos.values()))
        shown: list[Shown] = []
        for token in tokens:
            photo, source = photos.get(token // 4), Source(token % 4)
            if photo is None or photo.owner_id not in seen:
                continue
            if source is Source.FOLLOWING and photo.owner_id not in owners:
                continue
            shown.append((photo, REASONS[source]))
        after = place._replace(rank=place.rank + len(tokens))
        if after.rank == len(after.ranked) and not after.low and len(after.ranked) < 100:
            return shown, None  # the first pass left nothing out, and nothing is below
        return shown, after

    async def _rest(
        self,
        session: AsyncReadSession,
        feed: Chronological,
        viewer: Viewer,
        place: Place,
        n: int,
    ) -> tuple[list[Shown], Place | None]:
        """Return what the first pass left out of a window, newest first."""
        known = {token // 4 for token in place.ranked}
        shown: list[Shown] = []
        before: int | None = place.before
        while before is not None and len(shown) < n:
            photos, last = await feed.photos(session, viewer.id, before, n - len(shown))
            for photo in photos:
                if photo.id < place.low:
                    return shown, Place(place.low, is_ranked=True)
                if photo.id not in known:
                    shown.append((photo, "following"))
            before = last
        if before is None:
            return shown, None
        return shown, place._replace(before=before)

    @staticmethod
    async def _rows(session: AsyncReadSession, photo_ids: Sequence[int]) -> list[Photo]:
        """Return the rows there are, of the servers that answer."""
        if not photo_ids:
            return []
        try:
            with deadline(PATIENCE):
                rows: Sequence[Photo | None] = await session.get_many(Photo, photo_ids)
        except FAILED:
            statement = select(Photo).where(Photo.id.in_(photo_ids))
            return list(await answered_or_none(session, statement))
        return [row for row in rows if row is not None]

    @staticmethod
    async def _people(
        session: AsyncReadSession, viewer: Viewer, photos: Sequence[Photo]
    ) -> tuple[dict[int, User], set[int]]:
        people = await AccountRepository(session).users({photo.owner_id for photo in photos})
        return people, await seen_among(session, viewer.id, people)

    async def _load_explored(self) -> list[tuple[int, int]]:
        statement = select(Photo.id, Photo.owner_id).order_by(Photo.id.desc()).limit(EXPLORE_SIZE)
        return [(row.id, row.owner_id) for row in await self._load(statement)]

    async def _load_ads(self) -> list[Ad]:
        return [row[0] for row in await self._load(running(self._clock()))]

    async def _load(self, statement: Any) -> Sequence[Any]:
        """Return rows of the servers that answer; none where none does."""
        try:
            with deadline(PATIENCE):
                async with self._cluster.reader() as session:
                    asked = statement.options(all_shards(partial=True))
                    return (await session.execute(asked)).all()
        except FAILED:
            return ()
