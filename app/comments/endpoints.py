"""Comments over HTTP."""

from __future__ import annotations

from fastapi import APIRouter, status

from app.addresses import API
from app.comments.schemas import CommentIn, CommentOut
from app.deps import Comments, Keyed, MaybeViewer, SignedIn
from app.ids import Id
from app.paging import Cursor, Limit, Page

__all__ = ["router"]

router = APIRouter(prefix=API, tags=["comments"])


@router.get("/photos/{photo_id}/comments")
async def comments(
    photo_id: Id, viewer: MaybeViewer, comments: Comments, cursor: Cursor = None, limit: Limit = 30
) -> Page[CommentOut]:
    """Return the comments under a photo, oldest first, each with the first answers to it."""
    return await comments.comments(photo_id, viewer, cursor, limit)


@router.post(
    "/photos/{photo_id}/comments", status_code=status.HTTP_201_CREATED, dependencies=[Keyed]
)
async def comment(
    photo_id: Id, given: CommentIn, viewer: SignedIn, comments: Comments
) -> CommentOut:
    """Write a comment, or answer one."""
    return await comments.comment(viewer, photo_id, given)


@router.get("/photos/{photo_id}/comments/{comment_id}/replies")
async def replies(
    *,
    photo_id: Id,
    comment_id: Id,
    viewer: MaybeViewer,
    comments: Comments,
    cursor: Cursor = None,
    limit: Limit = 30,
) -> Page[CommentOut]:
    """Return the answers to a comment, oldest first."""
    _, page = await comments.thread(photo_id, comment_id, viewer, cursor, limit)
    return page


@router.delete(
    "/photos/{photo_id}/comments/{comment_id}",
    status_code=status.HTTP_204_NO_CONTENT,
    dependencies=[Keyed],
)
async def delete_comment(
    photo_id: Id, comment_id: Id, viewer: SignedIn, comments: Comments
) -> None:
    """Delete one's own comment, or any under one's own photo, with the answers to it."""
    await comments.delete(viewer, photo_id, comment_id)
