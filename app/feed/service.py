"""The home feed, read when asked for: newest photos of oneself and of whom one follows.

Called by the API and the pages. Nothing is fanned out: one statement per physical shard reads
the newest rows of all its owners, and shardkit merges them. When a server does not answer, the
photos of the others are shown, and the page says that it is not whole.
"""

from __future__ import annotations

from app.accounts.service import Viewer
from app.database import Database
from app.graph import tao
from app.graph.models import Kind
from app.paging import Page, cut
from app.photos.repository import PhotoRepository
from app.photos.schemas import PhotoOut
from app.photos.service import photo_page

__all__ = ["FeedService"]


class FeedService:
    """What there is to see.

    Args:
        database: the client's sessions.
        max_followees: people whose photos are looked for.
    """

    def __init__(self, database: Database, max_followees: int) -> None:
        self._database = database
        self._max_followees = max_followees

    async def home(self, viewer: Viewer, before: int | None, n: int) -> Page[PhotoOut]:
        """Return a page of the viewer's feed, newest first, without gaps or repeats."""
        async with self._database.reader() as session:
            owners = await tao.on(
                session, tao.all_ids, viewer.id, Kind.FOLLOWS, self._max_followees
            )
            rows = await PhotoRepository(session).of_owners([*owners, viewer.id], before, n + 1)
            photos, cursor = cut(rows, n, lambda photo: photo.id)
            return await photo_page(session, photos, viewer, cursor)

    async def newest(self, viewer: Viewer | None, before: int | None, n: int) -> Page[PhotoOut]:
        """Return a page of everybody's photos, newest first; reads every shard."""
        async with self._database.reader() as session:
            rows = await PhotoRepository(session).of_everybody(before, n + 1)
            photos, cursor = cut(rows, n, lambda photo: photo.id)
            return await photo_page(session, photos, viewer, cursor)
