"""The feeds over HTTP."""

from __future__ import annotations

from fastapi import APIRouter

from app.addresses import API
from app.deps import Feed, MaybeViewer, SignedIn
from app.feed.cursors import FeedCursor
from app.paging import Cursor, Limit, Page
from app.photos.schemas import PhotoOut

__all__ = ["router"]

router = APIRouter(prefix=API, tags=["feed"])


@router.get("/feed")
async def home(
    viewer: SignedIn, feed: Feed, cursor: FeedCursor = None, limit: Limit = 20
) -> Page[PhotoOut]:
    """Return the home feed: one's own photos and those of people one follows, newest first."""
    return await feed.home(viewer, feed.place(viewer, cursor), limit)


@router.get("/explore")
async def explore(
    viewer: MaybeViewer, feed: Feed, cursor: Cursor = None, limit: Limit = 20
) -> Page[PhotoOut]:
    """Return everybody's photos, newest first."""
    return await feed.newest(viewer, cursor, limit)
