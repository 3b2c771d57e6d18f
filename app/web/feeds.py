"""Pages of photos of everybody: home, explore, tags, and what the viewer keeps. For browsers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request, Response

from app.accounts.schemas import ProfilePatch
from app.deps import (
    Accounts,
    Feed,
    MaybeViewer,
    Saves,
    SignedIn,
    Stories,
    Tags,
)
from app.errors import NotFoundError
from app.feed.cursors import FeedCursor
from app.paging import Cursor
from app.tags.parser import canonical_tag
from app.web.forms import Sent
from app.web.replies import NO_MORE, PagesDep, go

__all__ = ["router"]

router = APIRouter(include_in_schema=False)

FEED_PAGE, GRID_PAGE = 10, 24


@router.get("/")
async def home(
    *,
    request: Request,
    viewer: MaybeViewer,
    feed: Feed,
    stories: Stories,
    pages: PagesDep,
    cursor: FeedCursor = None,
) -> Response:
    """Show the home feed, or what this is to a stranger."""
    if viewer is None:

        async def load_newest() -> Mapping[str, Any]:
            return {
                "page": (await feed.newest(None, None, 9)).model_copy(update=NO_MORE),
                "path": "",
            }

        return pages.streamed(
            request,
            ("grid.html", load_newest),
            title="Welcome",
            viewer=None,
            first=("landing.html", {}),
        )
    back = "/" if cursor is None else f"/?cursor={cursor}"
    place = feed.place(viewer, cursor)

    async def load() -> Mapping[str, Any]:
        return {
            "page": await feed.home(viewer, place, FEED_PAGE, is_ranked=viewer.is_feed_ranked),
            "back": back,
        }

    async def load_stories() -> Mapping[str, Any]:
        return {"groups": (await stories.all(viewer)).items}

    parts = [("home.html", load)] if cursor else [("tray.html", load_stories), ("home.html", load)]
    return pages.streamed(request, *parts, title="Home", viewer=viewer, here="home")


@router.post("/feed-order")
async def feed_order(viewer: SignedIn, form: Sent, accounts: Accounts) -> Response:
    """Choose how one's own feed is ordered."""
    is_ranked = form.text("order") == "ranked"
    await accounts.edit(viewer, ProfilePatch(is_feed_ranked=is_ranked))
    return go("/")


@router.get("/explore")
async def explore(
    *,
    request: Request,
    viewer: MaybeViewer,
    accounts: Accounts,
    feed: Feed,
    pages: PagesDep,
    cursor: Cursor = None,
) -> Response:
    """Show everybody's newest photos and the newest people."""

    async def load() -> Mapping[str, Any]:
        people = await accounts.newest(12) if cursor is None else ()
        return {"page": await feed.newest(viewer, cursor, GRID_PAGE), "people": people}

    return pages.streamed(
        request, ("explore.html", load), title="Explore", viewer=viewer, here="explore"
    )


@router.get("/tags/{tag}")
async def tag(
    *,
    request: Request,
    tag: str,
    viewer: MaybeViewer,
    tags: Tags,
    pages: PagesDep,
    cursor: Cursor = None,
) -> Response:
    """Show the photos that have a tag."""
    try:
        name = canonical_tag(tag)
    except ValueError:
        raise NotFoundError("There is no such tag.") from None

    async def load() -> Mapping[str, Any]:
        page = await tags.photos(name, viewer, cursor, GRID_PAGE)
        return {"page": page, "tag": name, "path": f"/tags/{name}"}

    return pages.streamed(request, ("tag.html", load), title=f"#{name}", viewer=viewer)


@router.get("/saved")
async def saved(
    *, request: Request, viewer: SignedIn, saves: Saves, pages: PagesDep, cursor: Cursor = None
) -> Response:
    """Show what the viewer keeps."""

    async def load() -> Mapping[str, Any]:
        return {"page": await saves.saved(viewer, cursor, GRID_PAGE)}

    return pages.streamed(request, ("saved.html", load), title="Saved", viewer=viewer)
