"""Pages of people: profiles, who follows whom, requests, blocks, search. For browsers only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from pydantic import ValidationError

from app.accounts.schemas import ProfilePatch
from app.accounts.usernames import canonical
from app.deps import (
    Accounts,
    Graph,
    MaybeViewer,
    Photos,
    Search,
    SignedIn,
)
from app.errors import AppError, NotFoundError
from app.graph.places import After
from app.paging import Cursor
from app.search.endpoints import MAX_QUERY
from app.web.forms import Sent
from app.web.replies import PagesDep, again, back_to, go

__all__ = ["router"]

router = APIRouter(include_in_schema=False)

GRID_PAGE, PEOPLE_PAGE, FOUND = 24, 30, 20


@router.get("/settings")
async def settings_form(viewer: SignedIn, pages: PagesDep) -> Response:
    """Show the form for the profile."""
    values = {
        "display_name": viewer.display_name,
        "bio": viewer.bio,
        "is_private": viewer.is_private,
    }
    return pages.whole(
        "settings.html", title="Edit profile", viewer=viewer, values=values, errors=()
    )


@router.post("/settings")
async def settings(viewer: SignedIn, form: Sent, accounts: Accounts, pages: PagesDep) -> Response:
    """Change the profile."""
    values = {**form.texts("display_name", "bio"), "is_private": bool(form.text("is_private"))}
    try:
        await accounts.edit(viewer, ProfilePatch.model_validate(values))
    except (AppError, ValidationError) as error:
        return again(pages, "settings.html", "Edit profile", error, viewer=viewer, values=values)
    return go(f"/u/{viewer.username}")


@router.get("/u/{username}")
async def profile(
    *,
    request: Request,
    username: str,
    viewer: MaybeViewer,
    accounts: Accounts,
    photos: Photos,
    pages: PagesDep,
    cursor: Cursor = None,
) -> Response:
    """Show a person and their photos; whether the person exists is known before the head."""
    found = await accounts.profile(username, viewer)

    if not found.is_open:
        return pages.whole("closed.html", title=found.username, viewer=viewer, profile=found)

    async def load() -> Mapping[str, Any]:
        page = await photos.grid(found.id, viewer, cursor, GRID_PAGE)
        return {"page": page, "path": f"/u/{found.username}"}

    return pages.streamed(
        request,
        ("grid.html", load),
        title=f"{found.display_name} (@{found.username})",
        viewer=viewer,
        here="me" if found.is_me else "",
        first=("profile.html", {"profile": found}),
    )


@router.get("/u/{username}/{direction}")
async def people(
    *,
    request: Request,
    username: str,
    direction: str,
    viewer: MaybeViewer,
    accounts: Accounts,
    graph: Graph,
    pages: PagesDep,
    after: After,
) -> Response:
    """Show who follows a person, or whom the person follows."""
    if direction not in {"followers", "following"}:
        raise NotFoundError
    found = await accounts.profile(username, viewer)
    if not found.is_open:
        raise NotFoundError("This account is private.")
    read = graph.followers if direction == "followers" else graph.following

    async def load() -> Mapping[str, Any]:
        page = await read(found.username, viewer, after, PEOPLE_PAGE)
        return {
            "page": page,
            "username": found.username,
            "heading": direction,
            "path": f"/u/{found.username}/{direction}",
            "followed": await graph.followed_among(viewer, [p.id for p in page.items]),
        }

    return pages.streamed(
        request, ("people.html", load), title=f"{found.username}: {direction}", viewer=viewer
    )


@router.post("/u/{username}/follow")
async def follow(username: str, viewer: SignedIn, form: Sent, graph: Graph) -> Response:
    """Follow a person."""
    person, _ = await graph.follow(viewer, username)
    return back_to(form, f"/u/{person.username}")


@router.post("/u/{username}/unfollow")
async def unfollow(username: str, viewer: SignedIn, form: Sent, graph: Graph) -> Response:
    """Unfollow a person."""
    person = await graph.unfollow(viewer, username)
    return back_to(form, f"/u/{person.username}")


@router.post("/u/{username}/block")
async def block(username: str, viewer: SignedIn, _form: Sent, graph: Graph) -> Response:
    """Block a person."""
    person = await graph.block(viewer, username)
    return go(f"/u/{person.username}")


@router.post("/u/{username}/unblock")
async def unblock(username: str, viewer: SignedIn, form: Sent, graph: Graph) -> Response:
    """End a block."""
    person = await graph.unblock(viewer, username)
    return back_to(form, f"/u/{person.username}")


@router.get("/requests")
async def requests(
    *, request: Request, viewer: SignedIn, graph: Graph, pages: PagesDep, after: After
) -> Response:
    """Show who asks to follow the viewer."""

    async def load() -> Mapping[str, Any]:
        return {"page": await graph.requests(viewer, after, PEOPLE_PAGE)}

    return pages.streamed(request, ("requests.html", load), title="Requests", viewer=viewer)


@router.post("/requests/{username}/accept")
async def accept(username: str, viewer: SignedIn, _form: Sent, graph: Graph) -> Response:
    """Let a person follow the viewer."""
    await graph.accept(viewer, username)
    return go("/requests")


@router.post("/requests/{username}/refuse")
async def refuse(username: str, viewer: SignedIn, _form: Sent, graph: Graph) -> Response:
    """Refuse a person who asks to follow the viewer."""
    await graph.refuse(viewer, username)
    return go("/requests")


@router.get("/blocks")
async def blocks(
    *, request: Request, viewer: SignedIn, graph: Graph, pages: PagesDep, after: After
) -> Response:
    """Show whom the viewer blocks."""

    async def load() -> Mapping[str, Any]:
        return {"page": await graph.blocked(viewer, after, PEOPLE_PAGE)}

    return pages.streamed(request, ("blocks.html", load), title="Blocked", viewer=viewer)


@router.get("/search")
async def search(
    *,
    request: Request,
    viewer: MaybeViewer,
    accounts: Accounts,
    search: Search,
    pages: PagesDep,
    q: Annotated[str, Query(max_length=MAX_QUERY)] = "",
) -> Response:
    """Go to the profile of a name that was typed whole, or show what is like it."""
    try:
        found = await accounts.profile(canonical(q), viewer)
    except (ValueError, NotFoundError):
        pass
    else:
        return go(f"/u/{found.username}")

    async def load() -> Mapping[str, Any]:
        return {"page": await search.find(q, viewer, FOUND), "typed": q.strip()}

    return pages.streamed(request, ("search.html", load), title="Search", viewer=viewer)
