"""Look at, like and delete photos; `app.photos.uploads` makes them.

Called by the API and the pages. The bytes of a deleted photo are removed when its row is gone, by
this process at once, and by the relay if it dies before.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from app import happenings
from app.accounts.models import User
from app.accounts.repository import AccountRepository
from app.accounts.service import Viewer, person_out
from app.addresses import MEDIA
from app.clock import Clock
from app.database import Database, Request
from app.errors import (
    DamagedPictureError,
    ForbiddenError,
    NotFoundError,
    StorageUnavailableError,
)
from app.graph.privacy import seen_among
from app.graph.tao import on
from app.paging import Page
from app.partial import is_partial
from app.photos.images import SIZES
from app.photos.likes import Likes, Reaction, likes_among, react
from app.photos.models import Photo
from app.photos.repository import PhotoRepository, delete_photo, locked_photo
from app.photos.schemas import LikesOut, PhotoOut
from app.photos.store import BlobStore, DamagedBlobError
from app.tags.repository import drop_tags
from shardkit import AsyncReadSession, AsyncWriteSession
from shardkit.errors import UnavailableError

__all__ = ["PhotoService", "describe", "images_of", "photo_out", "photo_page", "unseen"]

log = logging.getLogger("app")


class PhotoService:
    """What people do with photos.

    Args:
        database: the client's sessions.
        blobs: where the bytes go.
        clock: the time.
        likes: writes likes, many together.
    """

    def __init__(self, database: Database, blobs: BlobStore, clock: Clock, likes: Likes) -> None:
        self._database = database
        self._blobs = blobs
        self._clock = clock
        self._likes = likes

    async def delete(self, viewer: Viewer, photo_id: int) -> None:
        """Delete one's own photo with everything under it.

        Raises:
            NotFoundError: there is no such photo.
            ForbiddenError: it is somebody else's.
        """

        async def work(session: AsyncWriteSession) -> str:
            photo = await locked_photo(session, photo_id)
            if photo.owner_id != viewer.id:
                raise ForbiddenError("This photo belongs to somebody else.")
            await drop_tags(session, photo_id)
            happenings.photo_removed(session, photo_id)
            await delete_photo(session, photo)
            owner = await session.get(User, photo.owner_id, with_for_update=True)
            if owner is not None:
                owner.photo_count -= 1
            return photo.blob_key

        request = Request(viewer.id, ("delete photo", photo_id))
        key = await self._database.run(request, work, near=photo_id)
        try:
            await self._blobs.delete(key)
        except OSError:
            log.warning("the bytes of %s are left to the relay", key, exc_info=True)

    async def photo(self, photo_id: int, viewer: Viewer | None) -> PhotoOut:
        """Return a photo as a viewer sees it.

        Raises:
            NotFoundError: there is no such photo.
        """
        async with self._database.reader() as session:
            photo = await PhotoRepository(session).photo(photo_id)
            shown = await describe(session, [photo], viewer)
            if not shown:
                raise unseen(session)
            return shown[0]

    async def grid(
        self, owner_id: int, viewer: Viewer | None, before: int | None, n: int
    ) -> Page[PhotoOut]:
        """Return a page of one person's photos, newest first; none to who may not see them."""
        async with self._database.reader() as session:
            owners = await AccountRepository(session).users([owner_id])
            if not await seen_among(session, None if viewer is None else viewer.id, owners):
                return Page[PhotoOut](items=[], partial=is_partial(session))
            photos, cursor = await PhotoRepository(session).grid(owner_id, before, n)
            return await photo_page(session, photos, viewer, cursor)

    async def like(self, viewer: Viewer, photo_id: int) -> LikesOut:
        """Like a photo; liking twice is liking once.

        Raises:
            NotFoundError: there is no such photo.
            BusyError: too many like it at this moment.
        """
        return await self._react(viewer, photo_id, likes=True)

    async def unlike(self, viewer: Viewer, photo_id: int) -> LikesOut:
        """Take a like back; doing so twice is doing so once.

        Raises:
            NotFoundError: there is no such photo.
            BusyError: too many like it at this moment.
        """
        return await self._react(viewer, photo_id, likes=False)

    async def _react(self, viewer: Viewer, photo_id: int, *, likes: bool) -> LikesOut:
        """Write a like together with others; alone where a key has to be kept with it."""
        reaction = Reaction(viewer.id, likes)
        if not self._database.has_key:
            n_likes, token = await self._likes.react(photo_id, reaction)
            self._database.saw(token)
            return LikesOut(photo_id=photo_id, like_count=n_likes, liked_by_me=likes)

        async def work(session: AsyncWriteSession) -> int:
            total, refused = await on(session, react, photo_id, [reaction], self._clock())
            if likes and refused:
                raise NotFoundError("There is no such photo.")
            return total

        request = Request(viewer.id, ("like" if likes else "unlike", photo_id))
        n_likes = await self._database.run(request, work, near=photo_id)
        return LikesOut(photo_id=photo_id, like_count=n_likes, liked_by_me=likes)

    async def picture(self, key: str, variant: str) -> bytes:
        """Return the bytes of one variant.

        Raises:
            NotFoundError: there are none.
            DamagedPictureError: the disk does not return what was stored.
            StorageUnavailableError: the store does not answer.
        """
        try:
            data = await self._blobs.get(key, variant)
        except DamagedBlobError as error:
            log.exception("a picture is damaged")
            raise DamagedPictureError from error
        except OSError as error:
            raise StorageUnavailableError from error
        if data is None:
            raise NotFoundError("There is no such picture.")
        return data


async def describe(
    session: AsyncReadSession,
    photos: Sequence[Photo],
    viewer: Viewer | None,
    *,
    is_checked: bool = False,
) -> Sequence[PhotoOut]:
    """Return photos with their owners, how many like them, and whether the viewer does.

    Args:
        session: a reader.
        photos: what is to be shown.
        viewer: to whom; what others may not see is left out.
        is_checked: whether the viewer may see all of them, as the caller has found out.
    """
    owners = await AccountRepository(session).users(photo.owner_id for photo in photos)
    seen = set(owners)
    if not is_checked:
        seen = await seen_among(session, None if viewer is None else viewer.id, owners)
    photos = [photo for photo in photos if photo.owner_id in seen]
    liked: set[int] = set()
    if viewer is not None:
        ids = [photo.id for photo in photos]
        liked = await PhotoRepository(session).liked_among(viewer.id, ids)
    likes = await likes_among(session, photos)
    return [
        photo_out(photo, owners[photo.owner_id], likes[photo.id], liked=photo.id in liked)
        for photo in photos
    ]


def unseen(session: AsyncReadSession) -> Exception:
    """Return why nothing is shown: there is nothing for this viewer, or it is not known."""
    if is_partial(session):
        return UnavailableError("the owner is on a server that does not answer")
    return NotFoundError("There is no such photo.")


async def photo_page(
    session: AsyncReadSession, photos: Sequence[Photo], viewer: Viewer | None, cursor: int | None
) -> Page[PhotoOut]:
    """Return a page of photos; it says so when servers did not answer."""
    items = await describe(session, photos, viewer)
    return Page[PhotoOut](items=items, next_cursor=cursor, partial=is_partial(session))


def images_of(blob_key: str, ending: str = "jpg") -> dict[str, str]:
    """Return the addresses of a picture by size."""
    return {str(size): f"{MEDIA}/{blob_key}/{size}.{ending}" for size in SIZES}


def photo_out(photo: Photo, owner: User, n_likes: int, *, liked: bool) -> PhotoOut:
    """Return a photo as one viewer sees it."""
    return PhotoOut(
        id=photo.id,
        owner=person_out(owner),
        caption=photo.caption,
        width=photo.width,
        height=photo.height,
        images=images_of(photo.blob_key),
        images_webp=images_of(photo.blob_key, "webp") if photo.has_webp else {},
        like_count=n_likes,
        comment_count=photo.comment_count,
        liked_by_me=liked,
        created_at=photo.created_at,
    )
