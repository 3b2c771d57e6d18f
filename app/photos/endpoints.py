"""Photos over HTTP: the API, and the bytes of pictures under `/media`."""

from __future__ import annotations

import re
from typing import Annotated, Final
from zlib import crc32

from fastapi import APIRouter, File, Form, Header, Request, Response, UploadFile, status

from app.addresses import API, MEDIA
from app.deps import Accounts, Keyed, MaybeViewer, Photos, ResourcesDep, SignedIn, Uploads
from app.ids import Id
from app.paging import Cursor, Limit, Page
from app.photos.schemas import Caption, LikesOut, PhotoOut, UploadOut
from app.photos.store import MEDIA_TYPES

__all__ = ["media", "router"]

router = APIRouter(prefix=API, tags=["photos"])
media = APIRouter(prefix=MEDIA, include_in_schema=False)

POLL: Final = 1
"""Seconds after which a client may ask again what has become of its upload."""

EDGE: Final = 60
"""Seconds for which a proxy shows a picture that may have been deleted meanwhile."""

_RESPOND_ASYNC: Final = re.compile(r"(^|[,;])\s*respond-async\s*($|[,;])", re.IGNORECASE)


@router.post(
    "/photos",
    status_code=status.HTTP_201_CREATED,
    dependencies=[Keyed],
    responses={202: {"model": UploadOut, "description": "being worked on; see Location"}},
)
async def upload(
    *,
    viewer: SignedIn,
    uploads: Uploads,
    resources: ResourcesDep,
    response: Response,
    file: Annotated[UploadFile, File(description="a JPEG, PNG or WebP")],
    caption: Annotated[Caption, Form()] = "",
    prefer: Annotated[
        str, Header(max_length=200, description="`respond-async` to be answered at once, with 202")
    ] = "",
) -> PhotoOut | UploadOut:
    """Upload a photo; it is decoded, turned upright, freed of metadata and stored in four sizes.

    What takes more than a few seconds is answered with 202 and the address of its status.
    """
    patience = 0.0 if _RESPOND_ASYNC.search(prefer) else resources.settings.upload_patience
    found = await uploads.upload(viewer, await file.read(), caption, patience=patience)
    if isinstance(found, UploadOut):
        response.status_code = status.HTTP_202_ACCEPTED
        response.headers["location"] = f"{API}/uploads/{found.id}"
        response.headers["retry-after"] = str(POLL)
    return found


@router.get("/uploads/{upload_id}")
async def upload_status(
    upload_id: Id, viewer: SignedIn, uploads: Uploads, response: Response
) -> UploadOut:
    """Return what has become of one's own upload: a photo, or the reason why not."""
    found = await uploads.status(viewer, upload_id)
    if found.state == "working":
        response.headers["retry-after"] = str(POLL)
    return found


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


@media.get("/{key}/{variant}")
async def picture(key: str, variant: str, request: Request, photos: Photos) -> Response:
    """Return one variant of a picture; it never changes, so browsers keep it."""
    data = await photos.picture(key, variant)
    ending = variant.partition(".")[2]
    tag = f'"{crc32(data):08x}-{len(data):x}"'
    headers = {
        "etag": tag,
        "cache-control": "public, max-age=31536000, immutable",
        "x-accel-expires": str(EDGE),
        "content-disposition": f'inline; filename="{variant}"',
        "content-security-policy": "default-src 'none'; sandbox",
    }
    known = request.headers.get("if-none-match", "")
    if known == "*" or tag in (each.strip().removeprefix("W/") for each in known.split(",")):
        return Response(status_code=status.HTTP_304_NOT_MODIFIED, headers=headers)
    return Response(data, media_type=MEDIA_TYPES[ending], headers=headers)
