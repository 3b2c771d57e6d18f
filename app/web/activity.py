"""The page of what happened to the viewer. For browsers only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request, Response

from app.deps import (
    Notifications,
    SignedIn,
)
from app.notifications.notices import NoticeKind
from app.notifications.schemas import ReadIn
from app.paging import Cursor
from app.web.forms import Sent
from app.web.replies import PagesDep, go

__all__ = ["router"]

router = APIRouter(include_in_schema=False)

NOTICE_PAGE = 30

WORDS: Mapping[str, str] = {
    NoticeKind.LIKE: "liked your photo",
    NoticeKind.COMMENT: "commented on your photo",
    NoticeKind.REPLY: "answered your comment",
    NoticeKind.MENTION: "mentioned you",
    NoticeKind.FOLLOW: "began to follow you",
    NoticeKind.REQUEST: "asked to follow you",
}
"""What the list says after the names."""


@router.get("/notifications")
async def notifications(
    *,
    request: Request,
    viewer: SignedIn,
    notifications: Notifications,
    pages: PagesDep,
    cursor: Cursor = None,
) -> Response:
    """Show what happened to the viewer."""

    async def load() -> Mapping[str, Any]:
        page = await notifications.page(viewer, cursor, NOTICE_PAGE)
        return {"page": page, "words": WORDS}

    return pages.streamed(
        request, ("notifications.html", load), title="Activity", viewer=viewer, here="activity"
    )


@router.post("/notifications/read")
async def read(viewer: SignedIn, form: Sent, notifications: Notifications) -> Response:
    """Mark as read what the page has shown."""
    await notifications.read(viewer, ReadIn.model_validate(form.texts("seq")).seq)
    return go("/notifications")
