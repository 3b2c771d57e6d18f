"""Upload, look at, like and delete photos.

Called by the API and the pages. The bytes are stored before the row and removed after it: a
crash leaves at worst bytes nobody points to, never a photo without its picture.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from typing import Any

from app import happenings
from app.accounts.models import User
from app.accounts.repository import AccountRepository
from app.accounts.service import Viewer, person_out
from app.addresses import MEDIA
from app.clock import Clock
from app.database import Database, Request
from app.errors import ForbiddenError, NotFoundError
from app.graph.privacy import check_reaction, seen_among
from app.graph.tao import on
from app.paging import Page
from app.partial import counted, is_partial
from app.photos.images import SIZES, ImageWorkers
from app.photos.models import Like, Photo, likes_of
from app.photos.repository import PhotoRepository, delete_photo, locked_photo
from app.photos.schemas import LikesOut, PhotoOut
from app.photos.store import BlobStore
from app.tags.parser import mentions, tags
from app.tags.repository import add_tags, drop_tags
from shardkit import AsyncReadSession, AsyncWriteSession
from shardkit.errors import OutcomeUnknownError, UnavailableError

__all__ = ["PhotoService", "describe", "image_url", "images_of", "photo_page", "unseen"]

KEY_BYTES = 16
"""Random bytes of a blob key: nobody guesses the address of a picture."""


class PhotoService:
    """What people do with photos.

    Args:
        database: the client's sessions.
        blobs: where the bytes go.
        workers: the decoding processes.
        clock: the time.
    """

    def __init__(
        self, database: Database, blobs: BlobStore, workers: ImageWorkers, clock: Clock
    ) -> None:
        self._database = database
        self._blobs = blobs
        self._workers = workers
        self._clock = clock

    async def upload(self, viewer: Viewer, data: bytes, caption: str) -> PhotoOut:
        """Store a photo and return it.

        Raises:
            UploadError: the file is refused; nothing was stored.
            BusyError: too many uploads wait already.
        """
        prepared = await self._workers.prepare(data)
        key = secrets.token_hex(KEY_BYTES)
        await self._blobs.put(key, prepared.sizes)

        async def work(session: AsyncWriteSession) -> dict[str, Any]:
            owner = await session.get(User, viewer.id, with_for_update=True)
            if owner is None:
                raise NotFoundError("There is no such person.")
            photo = Photo(
                owner_id=viewer.id,
                caption=caption,
                width=prepared.width,
                height=prepared.height,
                blob_key=key,
                like_count=0,
                comment_count=0,
                created_at=self._clock(),
            )
            session.add(photo)
            owner.photo_count += 1
            await session.flush()
            await add_tags(session, photo.id, photo.id, tags(caption))
            if names := mentions(caption):
                happenings.photo_added(session, photo.id, viewer.id, names)
            return _photo_out(photo, owner, 0, liked=False).model_dump(mode="json")

        digest = hashlib.sha256(data).hexdigest()
        request = Request(viewer.id, ("upload", digest, caption))
        try:
            answer = await self._database.run(request, work, near=viewer.id)
        except Exception as error:
            if not isinstance(error, OutcomeUnknownError):  # nothing was committed
                await self._blobs.delete(key)
            raise
        photo = PhotoOut.model_validate(answer)
        if photo.images != images_of(key):  # a repetition: the first one's are kept
            await self._blobs.delete(key)
        return photo

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
        await self._blobs.delete(await self._database.run(request, work, near=photo_id))

    async def photo(self, photo_id: int, viewer: Viewer | None) -> PhotoOut:
        """Return a photo as a viewer sees it.

        Raises:
            NotFoundError: there is no such photo.
        """
        async with self._database.reader() as session:
            photo = await PhotoRepository(session).photo(photo_id)
            # Asked for by itself: a list leaves out whose server does not answer, one photo cannot.
            if await session.get(User, photo.owner_id) is None:
                raise NotFoundError
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
        """

        async def work(session: AsyncWriteSession) -> int:
            photo = await locked_photo(session, photo_id)
            await on(session, check_reaction, viewer.id, photo.owner_id)
            if await session.get(Like, (photo_id, viewer.id)) is None:
                session.add(Like(photo_id=photo_id, user_id=viewer.id, created_at=self._clock()))
                photo.like_count += 1
                happenings.like_changed(session, photo_id, photo.owner_id, viewer.id, liked=True)
            return photo.like_count

        request = Request(viewer.id, ("like", photo_id))
        n_likes = await self._database.run(request, work, near=photo_id)
        return LikesOut(photo_id=photo_id, like_count=n_likes, liked_by_me=True)

    async def unlike(self, viewer: Viewer, photo_id: int) -> LikesOut:
        """Take a like back; doing so twice is doing so once.

        Raises:
            NotFoundError: there is no such photo.
        """

        async def work(session: AsyncWriteSession) -> int:
            photo = await locked_photo(session, photo_id)
            like = await session.get(Like, (photo_id, viewer.id))
            if like is not None:
                await session.delete(like)
                photo.like_count -= 1
                happenings.like_changed(session, photo_id, photo.owner_id, viewer.id, liked=False)
            return photo.like_count

        request = Request(viewer.id, ("unlike", photo_id))
        n_likes = await self._database.run(request, work, near=photo_id)
        return LikesOut(photo_id=photo_id, like_count=n_likes, liked_by_me=False)

    async def picture(self, key: str, size: int) -> bytes:
        """Return the bytes of one size.

        Raises:
            NotFoundError: there are none.
        """
        data = await self._blobs.get(key, size) if size in SIZES else None
        if data is None:
            raise NotFoundError("There is no such picture.")
        return data


async def describe(
    session: AsyncReadSession, photos: Sequence[Photo], viewer: Viewer | None
) -> Sequence[PhotoOut]:
    """Return photos with their owners, how many like them, and whether the viewer does."""
    owners = await AccountRepository(session).users(photo.owner_id for photo in photos)
    seen = await seen_among(session, None if viewer is None else viewer.id, owners)
    photos = [photo for photo in photos if photo.owner_id in seen]
    liked: set[int] = set()
    if viewer is not None:
        ids = [photo.id for photo in photos]
        liked = await PhotoRepository(session).liked_among(viewer.id, ids)
    likes = await counted(session, likes_of, {photo.id: photo.like_count for photo in photos})
    return [
        _photo_out(photo, owners[photo.owner_id], likes[photo.id], liked=photo.id in liked)
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


def image_url(blob_key: str, size: int) -> str:
    """Return the address of one size of a picture."""
    return f"{MEDIA}/{blob_key}/{size}.jpg"


def images_of(blob_key: str) -> dict[str, str]:
    """Return the addresses of a picture by size."""
    return {str(size): image_url(blob_key, size) for size in SIZES}


def _photo_out(photo: Photo, owner: User, n_likes: int, *, liked: bool) -> PhotoOut:
    return PhotoOut(
        id=photo.id,
        owner=person_out(owner),
        caption=photo.caption,
        width=photo.width,
        height=photo.height,
        images=images_of(photo.blob_key),
        like_count=n_likes,
        comment_count=photo.comment_count,
        liked_by_me=liked,
        created_at=photo.created_at,
    )
