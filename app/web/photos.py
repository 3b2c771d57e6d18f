"""Pages of a photo: upload it, look at it, like, save and comment it. For browsers only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from fastapi import APIRouter, Request, Response
from pydantic import TypeAdapter, ValidationError

from app.comments.schemas import CommentIn
from app.deps import (
    Comments,
    MaybeViewer,
    Photos,
    ResourcesDep,
    Saves,
    SignedIn,
    Uploads,
)
from app.errors import UploadError
from app.ids import Id
from app.paging import Cursor
from app.photos.schemas import Caption, PhotoOut
from app.web.forms import Sent, Upload
from app.web.replies import PagesDep, back_to, go
from app.web.uploading import UploadPage

__all__ = ["router"]

router = APIRouter(include_in_schema=False)

COMMENT_PAGE, REPLY_PAGE = 50, 50
REFRESH: Final = 2
"""Seconds after which the page of an upload asks again."""

UPLOAD: Final = UploadPage(
    "upload.html", "Upload", "upload", "Choose a photo first.", TypeAdapter(Caption)
)


@router.get("/upload")
async def upload_form(viewer: SignedIn, pages: PagesDep, resources: ResourcesDep) -> Response:
    """Show the form to upload a photo."""
    return UPLOAD.empty(pages, viewer, resources.settings)


@router.post("/upload")
async def upload(
    viewer: SignedIn, form: Upload, uploads: Uploads, pages: PagesDep, resources: ResourcesDep
) -> Response:
    """Store a photo."""
    settings = resources.settings
    try:
        data, caption = await UPLOAD.read(form)
        made = await uploads.upload(viewer, data, caption, patience=settings.upload_patience)
    except (UploadError, ValidationError) as error:
        return UPLOAD.refused(pages, viewer, settings, form, error)
    return go(f"/p/{made.id}" if isinstance(made, PhotoOut) else f"/uploads/{made.id}")


@router.get("/uploads/{upload_id}")
async def upload_status(
    upload_id: Id, viewer: SignedIn, uploads: Uploads, pages: PagesDep
) -> Response:
    """Show what has become of an upload; the page asks again by itself."""
    found = await uploads.status(viewer, upload_id)
    if found.photo_id is not None:
        return go(f"/p/{found.photo_id}")
    response = pages.whole(
        "uploading.html", title="Upload", viewer=viewer, here="upload", upload=found
    )
    if found.state == "working":
        response.headers["refresh"] = str(REFRESH)
    return response


@router.get("/p/{photo_id}")
async def photo(
    *,
    request: Request,
    photo_id: Id,
    viewer: MaybeViewer,
    photos: Photos,
    comments: Comments,
    saves: Saves,
    pages: PagesDep,
    cursor: Cursor = None,
) -> Response:
    """Show a photo with its comments; whether it exists is known before the head."""
    shown = await photos.photo(photo_id, viewer)
    saved = await saves.has_saved(viewer, photo_id)
    path = f"/p/{photo_id}"

    async def load() -> Mapping[str, Any]:
        page = await comments.comments(photo_id, viewer, cursor, COMMENT_PAGE)
        return {"page": page, "path": path, "owner_id": shown.owner.id}

    return pages.streamed(
        request,
        ("comments.html", load),
        title=f"Photo by {shown.owner.username}",
        viewer=viewer,
        first=("photo.html", {"photo": shown, "path": path, "saved": saved}),
    )


@router.post("/p/{photo_id}/like")
async def like(photo_id: Id, viewer: SignedIn, form: Sent, photos: Photos) -> Response:
    """Like a photo."""
    await photos.like(viewer, photo_id)
    return back_to(form, f"/p/{photo_id}")


@router.post("/p/{photo_id}/unlike")
async def unlike(photo_id: Id, viewer: SignedIn, form: Sent, photos: Photos) -> Response:
    """Take a like back."""
    await photos.unlike(viewer, photo_id)
    return back_to(form, f"/p/{photo_id}")


@router.post("/p/{photo_id}/delete")
async def delete(photo_id: Id, viewer: SignedIn, _form: Sent, photos: Photos) -> Response:
    """Delete a photo."""
    await photos.delete(viewer, photo_id)
    return go(f"/u/{viewer.username}")


@router.post("/p/{photo_id}/save")
async def save(photo_id: Id, viewer: SignedIn, form: Sent, saves: Saves) -> Response:
    """Save a photo."""
    await saves.save(viewer, photo_id)
    return back_to(form, f"/p/{photo_id}")


@router.post("/p/{photo_id}/unsave")
async def unsave(photo_id: Id, viewer: SignedIn, form: Sent, saves: Saves) -> Response:
    """Keep a photo no longer."""
    await saves.unsave(viewer, photo_id)
    return back_to(form, f"/p/{photo_id}")


@router.post("/p/{photo_id}/comments")
async def comment(photo_id: Id, viewer: SignedIn, form: Sent, comments: Comments) -> Response:
    """Write a comment, or answer one."""
    parent = form.text("parent_id") or None
    given = CommentIn.model_validate({"body": form.text("body"), "parent_id": parent})
    written = await comments.comment(viewer, photo_id, given)
    return back_to(form, f"/p/{photo_id}", f"#c{written.id}")


@router.get("/p/{photo_id}/c/{comment_id}")
async def thread(
    *,
    photo_id: Id,
    comment_id: Id,
    viewer: MaybeViewer,
    photos: Photos,
    comments: Comments,
    pages: PagesDep,
    cursor: Cursor = None,
) -> Response:
    """Show a comment with all answers to it."""
    shown = await photos.photo(photo_id, viewer)
    top, page = await comments.thread(photo_id, comment_id, viewer, cursor, REPLY_PAGE)
    return pages.whole(
        "thread.html",
        title=f"Answers to {top.author.username}",
        viewer=viewer,
        top=top,
        page=page,
        owner_id=shown.owner.id,
        path=f"/p/{photo_id}",
        here_path=f"/p/{photo_id}/c/{comment_id}",
    )


@router.post("/p/{photo_id}/comments/{comment_id}/delete")
async def delete_comment(
    photo_id: Id, comment_id: Id, viewer: SignedIn, _form: Sent, comments: Comments
) -> Response:
    """Delete a comment with the answers to it."""
    await comments.delete(viewer, photo_id, comment_id)
    return go(f"/p/{photo_id}#comments")
