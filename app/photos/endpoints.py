"""Photos over HTTP: the API, and the bytes of pictures under `/media`."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, File, Form, Response, UploadFile, status

from app.addresses import API, MEDIA
from app.deps import Accounts, Keyed, MaybeViewer, Photos, SignedIn
from app.ids import Id
from app.paging import Cursor, Limit, Page
from app.photos.schemas import Caption, LikesOut, PhotoOut

__all__ = ["media", "router"]

router = APIRouter(prefix=API, tags=["photos"])
media = APIRouter(prefix=MEDIA, include_in_schema=False)


@router.post("/photos", status_code=status.HTTP_201_CREATED, dependencies=[Keyed])
async def upload(
    viewer: SignedIn,
    photos: Photos,
    file: Annotated[UploadFile, File(description="a JPEG, PNG or WebP")],
    caption: Annotated[Caption, Form()] = "",
) -> PhotoOut:
    """Upload a photo; it is decoded, turned upright, freed of metadata and stored in four sizes."""
    return await photos.upload(viewer, await file.read(), caption)


@router.get("/photos/{photo_id}")
async def photo(photo_id: Id, viewer: MaybeViewer, photos: Photos) -> PhotoOut:
    """Return a photo."""
    return await photos.photo(photo_id, viewer)


@router.delete("/photos/{photo_id}", status_code=status.HTTP_204_NO_CONTENT, dependencies=[Keyed])
async def delete(photo_id: Id, viewer: SignedIn, photos: Photos) -> None:
    """Delete one's own photo with everything under it."""
    await photos.delete(viewer, photo_id)


@router.get("/users/{username}/photos")
async def grid(
    *,
    username: str,
    viewer: MaybeViewer,
    accounts: Accounts,
    photos: Photos,
    cursor: Cursor = None,
    limit: Limit = 30,
) -> Page[PhotoOut]:
    """Return a person's photos, newest first."""
    owner = await accounts.profile(username, viewer)
    return await photos.grid(owner.id, viewer, cursor, limit)


@router.put("/photos/{photo_id}/like", dependencies=[Keyed])
async def like(photo_id: Id, viewer: SignedIn, photos: Photos) -> LikesOut:
    """Like a photo."""
    return await photos.like(viewer, photo_id)


@router.delete("/photos/{photo_id}/like", dependencies=[Keyed])
async def unlike(photo_id: Id, viewer: SignedIn, photos: Photos) -> LikesOut:
    """Take a like back."""
    return await photos.unlike(viewer, photo_id)


@media.get("/{key}/{size}.jpg")
async def picture(key: str, size: int, photos: Photos) -> Response:
    """Return one size of a picture; it never changes, so browsers keep it."""
    return Response(
        await photos.picture(key, size),
        media_type="image/jpeg",
        headers={
            "cache-control": "public, max-age=31536000, immutable",
            "content-disposition": f'inline; filename="{size}.jpg"',
            "content-security-policy": "default-src 'none'; sandbox",
        },
    )
