"""Statements about photos, likes and comments."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import delete, select

from app.errors import NotFoundError
from app.paging import cut
from app.partial import FAILED, PATIENCE, answered, answered_or_none
from app.photos.models import Comment, Like, LikeSlot, Photo, newest_of
from shardkit import AsyncReadSession, AsyncWriteSession, deadline

__all__ = ["PhotoRepository", "delete_photo", "locked_photo"]


class PhotoRepository:
    """Photos as one session sees them.

    Args:
        session: where to read.
    """

    def __init__(self, session: AsyncReadSession) -> None:
        self._session = session

    async def photo(self, photo_id: int) -> Photo:
        """Return a photo.

        Raises:
            NotFoundError: there is none.
        """
        photo = await self._session.get(Photo, photo_id)
        if photo is None:
            raise NotFoundError("There is no such photo.")
        return photo

    async def grid(
        self, owner_id: int, before: int | None, n: int
    ) -> tuple[Sequence[Photo], int | None]:
        """Return a page of one person's photos below an id, newest first, and the next cursor."""
        try:
            with deadline(PATIENCE):
                ids, cursor = cut(await self._newest(owner_id, before, n + 1), n, lambda each: each)
                photos = await self._session.get_many(Photo, ids)
            return [photo for photo in photos if photo is not None], cursor
        except FAILED:  # who answers is asked
            return cut(await self.of_owners([owner_id], before, n + 1), n, lambda photo: photo.id)

    async def _newest(self, owner_id: int, before: int | None, n: int) -> Sequence[int]:
        """Return ids of one person's photos below an id, newest first."""
        newest = await self._session.cached(newest_of, owner_id)
        ids = [each for each in newest if before is None or each < before]
        if len(ids) >= n or len(newest) < newest_of.limit:
            return ids[:n]
        statement = select(Photo.id).where(Photo.owner_id == owner_id, Photo.id < before)
        return (await self._session.scalars(statement.order_by(Photo.id.desc()).limit(n))).all()

    async def of_owners(
        self, owner_ids: Sequence[int], before: int | None, n: int
    ) -> Sequence[Photo]:
        """Return the newest photos of some people below an id, newest first, of who answers."""
        statement = select(Photo).where(Photo.owner_id.in_(owner_ids))
        if before is not None:
            statement = statement.where(Photo.id < before)
        return await answered(self._session, statement.order_by(Photo.id.desc()).limit(n))

    async def of_everybody(self, before: int | None, n: int) -> Sequence[Photo]:
        """Return the newest photos of all shards below an id, newest first, of who answers."""
        statement = select(Photo)
        if before is not None:
            statement = statement.where(Photo.id < before)
        return await answered(self._session, statement.order_by(Photo.id.desc()).limit(n))

    async def liked_among(self, user_id: int, photo_ids: Sequence[int]) -> set[int]:
        """Return which of some photos a person likes."""
        if not photo_ids:
            return set()
        statement = select(Like.photo_id).where(
            Like.photo_id.in_(photo_ids), Like.user_id == user_id
        )
        return set(await answered_or_none(self._session, statement))

    async def by_ids(self, ids: Sequence[int]) -> Sequence[Photo]:
        """Return photos in the order of ids, without those that are gone or do not answer."""
        try:
            with deadline(PATIENCE):
                photos = await self._session.get_many(Photo, ids)
        except FAILED:  # who answers is asked
            statement = select(Photo).where(Photo.id.in_(ids))
            found = {photo.id: photo for photo in await answered_or_none(self._session, statement)}
            photos = [found.get(each) for each in ids]
        return [photo for photo in photos if photo is not None]


async def locked_photo(session: AsyncWriteSession, photo_id: int) -> Photo:
    """Return a photo, locked until the transaction ends, so that its counts stay exact.

    Others may like it meanwhile; deleting it takes a stronger lock by itself.

    Raises:
        NotFoundError: there is none.
    """
    photo = await session.get(Photo, photo_id, with_for_update={"key_share": True})
    if photo is None:
        raise NotFoundError("There is no such photo.")
    return photo


async def delete_photo(session: AsyncWriteSession, photo: Photo) -> None:
    """Delete a photo with its likes and comments, all on its shard."""
    await session.execute(delete(Like).where(Like.photo_id == photo.id))
    await session.execute(delete(LikeSlot).where(LikeSlot.photo_id == photo.id))
    await session.execute(delete(Comment).where(Comment.photo_id == photo.id))
    await session.delete(photo)
