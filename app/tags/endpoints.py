"""Hashtags over HTTP."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path

from app.addresses import API
from app.deps import MaybeViewer, Tags
from app.paging import Cursor, Limit, Page
from app.photos.schemas import PhotoOut

__all__ = ["TagName", "router"]

router = APIRouter(prefix=API, tags=["tags"])

TagName = Annotated[
    str, Path(description="a tag however written, without `#`", max_length=300, examples=["light"])
]


@router.get("/tags/{tag}/photos")
async def photos(
    tag: TagName, viewer: MaybeViewer, tags: Tags, cursor: Cursor = None, limit: Limit = 30
) -> Page[PhotoOut]:
    """Return the photos that have a tag, newest first."""
    return await tags.photos(tag, viewer, cursor, limit)
