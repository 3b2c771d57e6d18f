"""Follows, requests and blocks over HTTP."""

from __future__ import annotations

from fastapi import APIRouter, Response, status

from app.accounts.schemas import PersonOut
from app.addresses import API
from app.deps import Graph, Keyed, MaybeViewer, SignedIn
from app.graph.places import After
from app.paging import Limit, Page

__all__ = ["router"]

router = APIRouter(prefix=API, tags=["graph"])

NO_CONTENT = status.HTTP_204_NO_CONTENT


@router.put(
    "/users/{username}/follow",
    status_code=NO_CONTENT,
    dependencies=[Keyed],
    responses={202: {"description": "the account is private; it has been asked"}},
)
async def follow(username: str, viewer: SignedIn, graph: Graph) -> Response:
    """Follow a person; a private account is asked instead."""
    _, follows = await graph.follow(viewer, username)
    return Response(status_code=NO_CONTENT if follows else status.HTTP_202_ACCEPTED)


@router.delete("/users/{username}/follow", status_code=NO_CONTENT, dependencies=[Keyed])
async def unfollow(username: str, viewer: SignedIn, graph: Graph) -> None:
    """Unfollow a person, or take back that one has asked to."""
    await graph.unfollow(viewer, username)


@router.get("/users/{username}/followers")
async def followers(
    username: str, viewer: MaybeViewer, graph: Graph, after: After, limit: Limit = 30
) -> Page[PersonOut]:
    """Return who follows a person, newest first."""
    return await graph.followers(username, viewer, after, limit)


@router.get("/users/{username}/following")
async def following(
    username: str, viewer: MaybeViewer, graph: Graph, after: After, limit: Limit = 30
) -> Page[PersonOut]:
    """Return whom a person follows, newest first."""
    return await graph.following(username, viewer, after, limit)


@router.delete("/me/followers/{username}", status_code=NO_CONTENT, dependencies=[Keyed])
async def remove_follower(username: str, viewer: SignedIn, graph: Graph) -> None:
    """Make a person no longer follow one."""
    await graph.remove_follower(viewer, username)


@router.get("/me/requests")
async def requests(
    viewer: SignedIn, graph: Graph, after: After, limit: Limit = 30
) -> Page[PersonOut]:
    """Return who asks to follow one, newest first."""
    return await graph.requests(viewer, after, limit)


@router.put("/me/requests/{username}", status_code=NO_CONTENT, dependencies=[Keyed])
async def accept(username: str, viewer: SignedIn, graph: Graph) -> None:
    """Let a person follow one who has asked to."""
    await graph.accept(viewer, username)


@router.delete("/me/requests/{username}", status_code=NO_CONTENT, dependencies=[Keyed])
async def refuse(username: str, viewer: SignedIn, graph: Graph) -> None:
    """Refuse a person who has asked to follow one."""
    await graph.refuse(viewer, username)


@router.get("/me/blocks")
async def blocked(
    viewer: SignedIn, graph: Graph, after: After, limit: Limit = 30
) -> Page[PersonOut]:
    """Return whom one blocks, newest first."""
    return await graph.blocked(viewer, after, limit)


@router.put("/users/{username}/block", status_code=NO_CONTENT, dependencies=[Keyed])
async def block(username: str, viewer: SignedIn, graph: Graph) -> None:
    """Hide a person and oneself from each other, and end what edges there are."""
    await graph.block(viewer, username)


@router.delete("/users/{username}/block", status_code=NO_CONTENT, dependencies=[Keyed])
async def unblock(username: str, viewer: SignedIn, graph: Graph) -> None:
    """End a block."""
    await graph.unblock(viewer, username)
