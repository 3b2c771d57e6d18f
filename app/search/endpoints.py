"""Search over HTTP."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from app.addresses import API
from app.deps import MaybeViewer, Search
from app.search.schemas import SearchOut

__all__ = ["MAX_QUERY", "router"]

MAX_QUERY = 100

router = APIRouter(prefix=API, tags=["search"])


@router.get("/search")
async def search(
    q: Annotated[
        str, Query(max_length=MAX_QUERY, description="what to look for", examples=["ana"])
    ],
    viewer: MaybeViewer,
    search: Search,
    limit: Annotated[int, Query(ge=1, le=50, description="people, and tags, at most")] = 20,
) -> SearchOut:
    """Find people and hashtags; `@` asks for people only, `#` for hashtags only."""
    return await search.find(q, viewer, limit)
