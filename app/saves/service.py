"""Save photos for oneself, and look at them again. Nobody else is shown that somebody saved."""

from __future__ import annotations

from sqlalchemy import select

from app.accounts.models import User
from app.accounts.repository import AccountRepository
from app.accounts.service import Viewer
from app.clock import Clock
from app.database import Database, Request
from app.errors import NotFoundError
from app.graph.privacy import seen_among
from app.paging import Page, cut
from app.photos.models import Photo
from app.photos.repository import PhotoRepository
from app.photos.schemas import PhotoOut
from app.photos.service import photo_page, unseen
from app.saves.models import Save
from shardkit import AsyncReadSession, AsyncWriteSession

__all__ = ["SaveService"]


class SaveService:
    """What people keep.

    Args:
        database: the client's sessions.
        clock: the time.
    """

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    async def save(self, viewer: Viewer, photo_id: int) -> None:
        """Save a photo; saving twice is saving once.

        Raises:
            NotFoundError: there is no such photo, or the viewer may not see it.
        """
        async with self._database.reader() as session:
            photo = await PhotoRepository(session).photo(photo_id)
            owners = await AccountRepository(session).users([photo.owner_id])
            if not await seen_among(session, viewer.id, owners):
                raise unseen(session)

        async def work(session: AsyncWriteSession) -> None:
            # Deleted meanwhile on another server, it leaves a row that nobody is shown.
            if await session.get(Photo, photo_id) is None:
                raise NotFoundError("There is no such photo.")
            await _lock(session, viewer.id)
            if await _save(session, viewer.id, photo_id) is None:
                session.add(Save(user_id=viewer.id, photo_id=photo_id, saved_at=self._clock()))

        request = Request(viewer.id, ("save", photo_id))
        await self._database.run(request, work, near=viewer.id)

    async def unsave(self, viewer: Viewer, photo_id: int) -> None:
        """Keep a photo no longer; there need not be one."""

        async def work(session: AsyncWriteSession) -> None:
            await _lock(session, viewer.id)
            if (save := await _save(session, viewer.id, photo_id)) is not None:
                await session.delete(save)

        request = Request(viewer.id, ("unsave", photo_id))
        await self._database.run(request, work, near=viewer.id)

    async def saved(self, viewer: Viewer, before: int | None, n: int) -> Page[PhotoOut]:
        """Return a page of what the viewer saved, the last first.

        Photos that are gone, or that the viewer may no longer see, are left out.
        """
        async with self._database.reader() as session:
            statement = select(Save).where(Save.user_id == viewer.id)
            if before is not None:
                statement = statement.where(Save.id < before)
            rows = await session.scalars(statement.order_by(Save.id.desc()).limit(n + 1))
            saves, cursor = cut(rows.all(), n, lambda save: save.id)
            photos = await PhotoRepository(session).by_ids([save.photo_id for save in saves])
            return await photo_page(session, photos, viewer, cursor)

    async def has_saved(self, viewer: Viewer | None, photo_id: int) -> bool:
        """Tell whether the viewer keeps a photo."""
        if viewer is None:
            return False
        async with self._database.reader() as session:
            return await _save(session, viewer.id, photo_id) is not None


async def _lock(session: AsyncWriteSession, user_id: int) -> None:
    """Let the savings of a person come one after the other."""
    if await session.get(User, user_id, with_for_update=True) is None:
        raise NotFoundError("There is no such person.")


async def _save(session: AsyncReadSession, user_id: int, photo_id: int) -> Save | None:
    statement = select(Save).where(Save.user_id == user_id, Save.photo_id == photo_id)
    return (await session.scalars(statement)).first()
