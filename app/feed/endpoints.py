"""The feeds over HTTP."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from app.addresses import API
from app.deps import Feed, MaybeViewer, SignedIn
from app.feed.cursors import FeedCursor
from app.feed.schemas import FeedItem, Order
from app.paging import Cursor, Limit, Page
from app.photos.schemas import PhotoOut

__all__ = ["router"]

router = APIRouter(prefix=API, tags=["feed"])


@router.get("/feed")
async def home(
    viewer: SignedIn,
    feed: Feed,
    cursor: FeedCursor = None,
    limit: Limit = 20,
    order: Annotated[
        Order | None,
        Query(description="of the first page; one's own choice when it is left out"),
    ] = None,
) -> Page[FeedItem]:
    """Return the home feed: one's own photos and those of people one follows.

    Newest first, or ranked, with photos of others and paid ones, as `reason` says.
    """
    is_ranked = viewer.is_feed_ranked if order is None else order == "ranked"
    return await feed.home(viewer, feed.place(viewer, cursor), limit, is_ranked=is_ranked)


@router.get("/explore")
async def explore(
    viewer: MaybeViewer, feed: Feed, cursor: Cursor = None, limit: Limit = 20
) -> Page[PhotoOut]:
    """Return everybody's photos, newest first."""
    return await feed.newest(viewer, cursor, limit)
