"""Everything under `/api/v1`: the routers of the features, and how errors are documented."""

from __future__ import annotations

from fastapi import APIRouter

from app.accounts.endpoints import router as accounts
from app.errors import Problem
from app.feed.endpoints import router as feed
from app.graph.endpoints import router as graph
from app.leaving.endpoints import router as leaving
from app.photos.endpoints import router as photos

__all__ = ["router"]

_PROBLEM = {"content": {"application/problem+json": {"schema": Problem.model_json_schema()}}}

router = APIRouter(
    responses={
        "4XX": {"description": "the request was refused", **_PROBLEM},
        "5XX": {"description": "try again, or it is our fault", **_PROBLEM},
        422: {"description": "a value cannot be used", **_PROBLEM},
    },
)
for feature in (accounts, photos, graph, feed, leaving):
    router.include_router(feature)
