"""Saved photos over HTTP."""

from __future__ import annotations

from fastapi import APIRouter, status

from app.addresses import API
from app.deps import Keyed, Saves, SignedIn
from app.ids import Id
from app.paging import Cursor, Limit, Page
from app.photos.schemas import PhotoOut

__all__ = ["router"]

router = APIRouter(prefix=API, tags=["saves"])


@router.put("/photos/{photo_id}/save", status_code=status.HTTP_204_NO_CONTENT, dependencies=[Keyed])
async def save(photo_id: Id, viewer: SignedIn, saves: Saves) -> None:
    """Save a photo; nobody is told."""
    await saves.save(viewer, photo_id)


@router.delete(
    "/photos/{photo_id}/save", status_code=status.HTTP_204_NO_CONTENT, dependencies=[Keyed]
)
async def unsave(photo_id: Id, viewer: SignedIn, saves: Saves) -> None:
    """Keep a photo no longer."""
    await saves.unsave(viewer, photo_id)


@router.get("/me/saves")
async def saved(
    viewer: SignedIn, saves: Saves, cursor: Cursor = None, limit: Limit = 30
) -> Page[PhotoOut]:
    """Return what one has saved, the last first."""
    return await saves.saved(viewer, cursor, limit)
