"""Follows over HTTP."""

from __future__ import annotations

from fastapi import APIRouter, status

from app.accounts.schemas import PersonOut
from app.addresses import API
from app.deps import Graph, Keyed, SignedIn
from app.paging import Cursor, Limit, Page

__all__ = ["router"]

router = APIRouter(prefix=API, tags=["graph"])


@router.put(
    "/users/{username}/follow", status_code=status.HTTP_204_NO_CONTENT, dependencies=[Keyed]
)
async def follow(username: str, viewer: SignedIn, graph: Graph) -> None:
    """Follow a person."""
    await graph.follow(viewer, username)


@router.delete(
    "/users/{username}/follow", status_code=status.HTTP_204_NO_CONTENT, dependencies=[Keyed]
)
async def unfollow(username: str, viewer: SignedIn, graph: Graph) -> None:
    """Unfollow a person."""
    await graph.unfollow(viewer, username)


@router.get("/users/{username}/followers")
async def followers(
    username: str, graph: Graph, cursor: Cursor = None, limit: Limit = 30
) -> Page[PersonOut]:
    """Return who follows a person."""
    return await graph.followers(username, cursor, limit)


@router.get("/users/{username}/following")
async def following(
    username: str, graph: Graph, cursor: Cursor = None, limit: Limit = 30
) -> Page[PersonOut]:
    """Return whom a person follows."""
    return await graph.following(username, cursor, limit)
