"""Everything under `/api/v1`: the routers of the features, and how errors are documented."""

from __future__ import annotations

from fastapi import APIRouter

from app.accounts.endpoints import router as accounts
from app.comments.endpoints import router as comments
from app.errors import Problem
from app.feed.endpoints import router as feed
from app.graph.endpoints import router as graph
from app.notifications.endpoints import router as notifications
from app.photos.endpoints import router as photos
from app.saves.endpoints import router as saves
from app.search.endpoints import router as search
from app.stories.endpoints import router as stories
from app.tags.endpoints import router as tags

__all__ = ["router"]

_PROBLEM = {"content": {"application/problem+json": {"schema": Problem.model_json_schema()}}}

router = APIRouter(
    responses={
        "4XX": {"description": "the request was refused", **_PROBLEM},
        "5XX": {"description": "try again, or it is our fault", **_PROBLEM},
        422: {"description": "a value cannot be used", **_PROBLEM},
    },
)
for feature in (
    accounts,
    photos,
    comments,
    graph,
    feed,
    stories,
    saves,
    tags,
    notifications,
    search,
):
    router.include_router(feature)
