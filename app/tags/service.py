"""The pages of tags: everybody's newest photos that have one, from all shards."""

from __future__ import annotations

from app.accounts.service import Viewer
from app.database import Database
from app.errors import NotFoundError
from app.paging import Page, cut
from app.photos.repository import PhotoRepository
from app.photos.schemas import PhotoOut
from app.photos.service import photo_page
from app.tags.parser import canonical_tag
from app.tags.repository import photos_tagged

__all__ = ["TagService"]


class TagService:
    """What there is to see of a tag.

    Args:
        database: the client's sessions.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def photos(
        self, tag: str, viewer: Viewer | None, before: int | None, n: int
    ) -> Page[PhotoOut]:
        """Return a page of the photos that have a tag and the viewer may see, newest first.

        Raises:
            NotFoundError: this is no tag.
        """
        try:
            name = canonical_tag(tag)
        except ValueError:
            raise NotFoundError("There is no such tag.") from None
        async with self._database.reader() as session:
            ids, cursor = cut(
                await photos_tagged(session, name, before, n + 1), n, lambda each: each
            )
            photos = await PhotoRepository(session).by_ids(ids)
            return await photo_page(session, photos, viewer, cursor)
