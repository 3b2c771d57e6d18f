"""The home feed and everybody's newest photos.

Called by the API and the pages. Photos are pushed to the timelines of followers by the relay, or
pulled, and merged here (`app.feed.sources`); whether one belongs to a feed is decided when it is
read: by its owner, whom the viewer must follow at this moment and no block may hide, and by its
row, which must be there. Below what timelines have, without a timeline, and without Redis, one
statement per physical shard reads the newest rows of all owners. When a server does not answer,
the photos of the others are shown, and the page says that it is not whole.
"""

from __future__ import annotations

from collections.abc import Sequence

from app.accounts.repository import AccountRepository
from app.accounts.service import Viewer
from app.clock import Clock
from app.database import Database
from app.feed.building import Builder
from app.feed.cursors import Cursors, Place
from app.feed.ranked import RankedFeed
from app.feed.schemas import FeedItem, Reason
from app.feed.sources import Sources, following_of, gathered, owners_of
from app.feed.timelines import AsyncTimelines, SilentError
from app.graph import tao
from app.graph.privacy import seen_among
from app.paging import Page, cut
from app.partial import FAILED, PATIENCE, is_partial
from app.photos.models import Photo
from app.photos.repository import PhotoRepository
from app.photos.schemas import PhotoOut
from app.photos.service import describe, photo_page
from shardkit import AsyncReadSession, deadline, ids

__all__ = ["FeedService"]

SPARE = 4
"""Photos looked at beyond a page, for those that are gone or hidden."""


class FeedService:
    """What there is to see.

    Args:
        database: the client's sessions.
        clock: the time.
        cursors: writes and reads cursors.
        ranked: ranks windows.
        max_followees: people whose photos are looked for.
        timelines: what was pushed, and who builds it; None without Redis.
    """

    def __init__(
        self,
        database: Database,
        clock: Clock,
        cursors: Cursors,
        ranked: RankedFeed,
        *,
        max_followees: int,
        timelines: tuple[AsyncTimelines, Builder] | None = None,
    ) -> None:
        self._database = database
        self._clock = clock
        self._cursors = cursors
        self._ranked = ranked
        self._max_followees = max_followees
        self._timelines = timelines

    def place(self, viewer: Viewer, cursor: str | None) -> Place | None:
        """Return where a page of the viewer's feed begins; None for the first.

        Raises:
            InvalidInputError: the cursor is none of ours, of somebody else, or too old.
        """
        if cursor is None:
            return None
        return self._cursors.place(cursor, viewer_id=viewer.id, now=self._clock().timestamp())

    async def home(
        self, viewer: Viewer, place: Place | None, n: int, *, is_ranked: bool = False
    ) -> Page[FeedItem]:
        """Return a page of the viewer's feed, without gaps or repeats.

        Args:
            viewer: whose feed.
            place: where the page begins; None for the first.
            n: photos of the page at most; a ranked window may end in a shorter one.
            is_ranked: whether the first page is ranked, or newest first; others go on alike.
        """
        begin = place or Place(ids.MAX_ID, is_ranked)
        async with self._database.reader() as session:
            shown: Sequence[tuple[Photo, Reason]]
            if begin.is_ranked:
                shown, after = await self._ranked.page(session, self, viewer, begin, n)
            else:
                photos, last = await self.photos(session, viewer.id, begin.before, n)
                shown = [(photo, "following") for photo in photos]
                after = None if last is None else Place(last)
            rows = [photo for photo, _ in shown]
            described = await describe(session, rows, viewer, is_checked=True)
            reasons = {photo.id: reason for photo, reason in shown}
            items = [FeedItem(**dict(each), reason=reasons[each.id]) for each in described]
            text = None
            if after is not None:
                now = self._clock().timestamp()
                text = self._cursors.text(after, viewer_id=viewer.id, now=now)
            return Page[FeedItem](items=items, next_cursor=text, partial=is_partial(session))

    async def newest(self, viewer: Viewer | None, before: int | None, n: int) -> Page[PhotoOut]:
        """Return a page of everybody's photos, newest first; reads every shard."""
        async with self._database.reader() as session:
            rows = await PhotoRepository(session).of_everybody(before, n + 1)
            photos, cursor = cut(rows, n, lambda photo: photo.id)
            return await photo_page(session, photos, viewer, cursor)

    async def photos(
        self, session: AsyncReadSession, viewer_id: int, before: int, n: int
    ) -> tuple[Sequence[Photo], int | None]:
        """Return photos of a feed below an id, newest first, and where the next page begins."""
        try:
            with deadline(PATIENCE):
                sources = await self._sources(session, viewer_id)
                found = await self._merged(session, viewer_id, sources, before, n + 1)
        except FAILED:  # who answers is asked
            following, _ = await tao.on(session, following_of, viewer_id, self._max_followees)
            owners = owners_of(viewer_id, following)
            found = await self._from_databases(session, viewer_id, owners, before, n + 1)
        return cut(found, n, lambda photo: photo.id)

    async def ids(
        self, session: AsyncReadSession, viewer_id: int, before: int, n: int
    ) -> tuple[list[int], frozenset[int]]:
        """Return ids that may belong to a feed, newest first, and the owners that do.

        Their rows have not been read, so some may be gone, hidden or of other owners.
        """
        try:
            with deadline(PATIENCE):
                sources = await self._sources(session, viewer_id)
        except FAILED:  # who answers is asked
            following, _ = await tao.on(session, following_of, viewer_id, self._max_followees)
            sources = Sources(owners_of(viewer_id, following))
        found = sources.below(before, n)
        if len(found) < n and sources.above:
            below = min(before, sources.above + 1)
            rows = await PhotoRepository(session).of_owners(
                sorted(sources.owners), below, n - len(found)
            )
            found += [photo.id for photo in rows]
        return found, sources.owners

    # -- parts

    async def _sources(self, session: AsyncReadSession, viewer_id: int) -> Sources:
        """Return where photos are known from, and have lacking timelines built."""
        if self._timelines is not None:
            timelines, builder = self._timelines
            try:
                found = await gathered(session, timelines, viewer_id, self._max_followees)
            except SilentError:
                pass
            else:
                if found.lacks_timeline:
                    builder.build(viewer_id)
                elif found.new and found.timeline is not None:
                    builder.cover(viewer_id, found.new, found.timeline)
                return found
        following, _ = await tao.on(session, following_of, viewer_id, self._max_followees)
        return Sources(owners_of(viewer_id, following))

    async def _merged(
        self, session: AsyncReadSession, viewer_id: int, sources: Sources, before: int, n: int
    ) -> list[Photo]:
        """Return photos below an id: what is merged, then what databases have below that."""
        found: list[Photo] = []
        at = before
        while len(found) < n and (some := sources.below(at, n - len(found) + SPARE)):
            at = some[-1]
            rows: Sequence[Photo | None] = await session.get_many(Photo, some)
            there = [row for row in rows if row is not None and row.owner_id in sources.owners]
            found += await self._seen(session, viewer_id, there)
        if len(found) < n and sources.above:
            below = min(before, sources.above + 1)
            found += await self._from_databases(
                session, viewer_id, sources.owners, below, n - len(found)
            )
        return found[:n]

    async def _from_databases(
        self,
        session: AsyncReadSession,
        viewer_id: int,
        owners: frozenset[int],
        before: int,
        n: int,
    ) -> list[Photo]:
        """Return photos of some people below an id, of the servers that answer."""
        repository = PhotoRepository(session)
        found: list[Photo] = []
        while len(found) < n:
            wanted = n - len(found) + SPARE
            rows = await repository.of_owners(sorted(owners), before, wanted)
            found += await self._seen(session, viewer_id, rows)
            if len(rows) < wanted:
                break
            before = rows[-1].id
        return found[:n]

    @staticmethod
    async def _seen(
        session: AsyncReadSession, viewer_id: int, photos: Sequence[Photo]
    ) -> list[Photo]:
        """Return the photos whose owners hide nothing from the viewer."""
        owners = await AccountRepository(session).users({photo.owner_id for photo in photos})
        seen = await seen_among(session, viewer_id, owners)
        return [photo for photo in photos if photo.owner_id in seen]
