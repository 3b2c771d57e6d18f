"""The pages: everything the API does, for a person with a browser and no script.

Called by nobody but browsers; the same services as the API do the work. Forms are sent with
POST and answered with a redirect, to the same place when one is sent again (`app.web.forms`). A
form that is refused is shown again with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, cast
from urllib.parse import quote

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import RedirectResponse
from pydantic import BaseModel, TypeAdapter, ValidationError

from app.accounts.schemas import Credentials, ProfilePatch, SignUp
from app.comments.schemas import CommentIn
from app.deps import (
    Accounts,
    Comments,
    Feed,
    Graph,
    MaybeViewer,
    Photos,
    ResourcesDep,
    Saves,
    SignedIn,
    Stories,
    Uploads,
    begin_login,
    end_login,
)
from app.errors import (
    AppError,
    EmptyUploadError,
    NotFoundError,
    UploadError,
    problem_of,
)
from app.feed.cursors import FeedCursor
from app.graph.places import After
from app.ids import Id
from app.paging import Cursor
from app.photos.schemas import Caption, PhotoOut
from app.web.forms import Fields, Sent, Upload
from app.web.rendering import Pages

__all__ = ["NO_MORE", "PagesDep", "again", "back_to", "go", "local_path", "router"]

router = APIRouter(include_in_schema=False)

FEED_PAGE, GRID_PAGE, COMMENT_PAGE, PEOPLE_PAGE = 10, 24, 50, 30
REFRESH = 2
"""Seconds after which the page of an upload asks again."""

SEE_OTHER = 303
NO_MORE = {"next_cursor": None}


async def get_pages(request: Request) -> Pages:
    """Return the templates."""
    return cast("Pages", request.app.state.pages)


PagesDep = Annotated[Pages, Depends(get_pages)]


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


@router.get("/signup")
async def sign_up_form(viewer: MaybeViewer, pages: PagesDep) -> Response:
    """Show the form for a new account."""
    if viewer is not None:
        return go("/")
    values = {"username": "", "display_name": ""}
    return pages.whole("signup.html", title="Sign up", values=values, errors=())


@router.post("/signup")
async def sign_up(request: Request, form: Sent, accounts: Accounts, pages: PagesDep) -> Response:
    """Create an account and log it in."""
    values = form.texts("username", "display_name", "password")
    try:
        login = await accounts.sign_up(SignUp.model_validate(values))
    except (AppError, ValidationError) as error:
        return again(pages, "signup.html", "Sign up", error, values=values)
    response = go("/")
    begin_login(request, response, login)
    return response


@router.get("/login")
async def log_in_form(
    viewer: MaybeViewer,
    pages: PagesDep,
    goto: Annotated[str, Query(alias="next", max_length=200)] = "/",
) -> Response:
    """Show the form to log in."""
    if viewer is not None:
        return go(local_path(goto))
    values = {"username": "", "next": local_path(goto)}
    return pages.whole("login.html", title="Log in", here="login", values=values, errors=())


@router.post("/login")
async def log_in(request: Request, form: Sent, accounts: Accounts, pages: PagesDep) -> Response:
    """Log in."""
    values = form.texts("username", "password", "next")
    given = {"username": values["username"], "password": values["password"]}
    try:
        login = await accounts.log_in(Credentials.model_validate(given))
    except (AppError, ValidationError) as error:
        values["next"] = local_path(values["next"])
        return again(pages, "login.html", "Log in", error, values=values)
    response = go(local_path(values["next"]))
    begin_login(request, response, login)
    return response


@router.post("/logout")
async def log_out(
    request: Request, viewer: MaybeViewer, form: Sent, accounts: Accounts
) -> Response:
    """Log out."""
    if viewer is not None:
        await accounts.log_out(viewer, everywhere=bool(form.text("everywhere")))
    response = go("/")
    end_login(request, response)
    return response


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


@router.get("/upload")
async def upload_form(viewer: SignedIn, pages: PagesDep, resources: ResourcesDep) -> Response:
    """Show the form to upload a photo."""
    return pages.whole(
        "upload.html",
        title="Upload",
        viewer=viewer,
        here="upload",
        values={"caption": ""},
        errors=(),
        megabytes=resources.settings.max_upload_bytes >> 20,
    )


@router.post("/upload")
async def upload(
    viewer: SignedIn, form: Upload, uploads: Uploads, pages: PagesDep, resources: ResourcesDep
) -> Response:
    """Store a photo."""
    caption = form.text("caption")
    try:
        data = await form.file()
        if data is None:
            raise EmptyUploadError("Choose a photo first.")
        checked = TypeAdapter(Caption).validate_python(caption)
        patience = resources.settings.upload_patience
        made = await uploads.upload(viewer, data, checked, patience=patience)
    except (UploadError, ValidationError) as error:
        return again(
            pages,
            "upload.html",
            "Upload",
            error,
            viewer=viewer,
            here="upload",
            values={"caption": caption},
            megabytes=resources.settings.max_upload_bytes >> 20,
        )
    return go(f"/p/{made.id}" if isinstance(made, PhotoOut) else f"/uploads/{made.id}")


@router.get("/uploads/{upload_id}")
async def upload_status(
    upload_id: Id, viewer: SignedIn, uploads: Uploads, pages: PagesDep
) -> Response:
    """Show what has become of an upload; the page asks again by itself."""
    found = await uploads.status(viewer, upload_id)
    if found.photo_id is not None:
        return go(f"/p/{found.photo_id}")
    response = pages.whole(
        "uploading.html", title="Upload", viewer=viewer, here="upload", upload=found
    )
    if found.state == "working":
        response.headers["refresh"] = str(REFRESH)
    return response


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


@router.get("/p/{photo_id}")
async def photo(
    *,
    request: Request,
    photo_id: Id,
    viewer: MaybeViewer,
    photos: Photos,
    comments: Comments,
    saves: Saves,
    pages: PagesDep,
    cursor: Cursor = None,
) -> Response:
    """Show a photo with its comments; whether it exists is known before the head."""
    shown = await photos.photo(photo_id, viewer)
    saved = await saves.has_saved(viewer, photo_id)
    path = f"/p/{photo_id}"

    async def load() -> Mapping[str, Any]:
        page = await comments.comments(photo_id, viewer, cursor, COMMENT_PAGE)
        return {"page": page, "path": path, "owner_id": shown.owner.id}

    return pages.streamed(
        request,
        ("comments.html", load),
        title=f"Photo by {shown.owner.username}",
        viewer=viewer,
        first=("photo.html", {"photo": shown, "path": path, "saved": saved}),
    )


@router.post("/p/{photo_id}/like")
async def like(photo_id: Id, viewer: SignedIn, form: Sent, photos: Photos) -> Response:
    """Like a photo."""
    await photos.like(viewer, photo_id)
    return back_to(form, f"/p/{photo_id}")


@router.post("/p/{photo_id}/unlike")
async def unlike(photo_id: Id, viewer: SignedIn, form: Sent, photos: Photos) -> Response:
    """Take a like back."""
    await photos.unlike(viewer, photo_id)
    return back_to(form, f"/p/{photo_id}")


@router.post("/p/{photo_id}/delete")
async def delete(photo_id: Id, viewer: SignedIn, _form: Sent, photos: Photos) -> Response:
    """Delete a photo."""
    await photos.delete(viewer, photo_id)
    return go(f"/u/{viewer.username}")


@router.post("/p/{photo_id}/comments")
async def comment(photo_id: Id, viewer: SignedIn, form: Sent, comments: Comments) -> Response:
    """Write a comment, or answer one."""
    parent = form.text("parent_id") or None
    given = CommentIn.model_validate({"body": form.text("body"), "parent_id": parent})
    written = await comments.comment(viewer, photo_id, given)
    return back_to(form, f"/p/{photo_id}", f"#c{written.id}")


@router.post("/p/{photo_id}/comments/{comment_id}/delete")
async def delete_comment(
    photo_id: Id, comment_id: Id, viewer: SignedIn, _form: Sent, comments: Comments
) -> Response:
    """Delete a comment with the answers to it."""
    await comments.delete(viewer, photo_id, comment_id)
    return go(f"/p/{photo_id}#comments")


def local_path(text: str) -> str:
    """Return a path of this site as given, or `/`: a form never leads to another site."""
    is_local = text.startswith("/") and not text.startswith(("//", "/\\"))
    return text if is_local and text.isascii() and text.isprintable() else "/"


def back_to(form: Fields, otherwise: str, fragment: str = "") -> Response:
    """Go where a form says that it was, or to another place."""
    back = local_path(form.text("back"))
    return go((back if back != "/" or otherwise == "/" else otherwise) + fragment)


def go(path: str) -> RedirectResponse:
    """Answer a form: the browser loads another page."""
    return RedirectResponse(quote(path, safe="/?=#&%:@"), SEE_OTHER)


def again(pages: Pages, template: str, title: str, error: Exception, **context: Any) -> Response:
    """Show a refused form again with what was typed and why it was refused."""
    problem = problem_of(error)
    errors = [_sentence(field) for field in problem.errors or ()] or [problem.detail]
    return pages.whole(template, title=title, status=problem.status, errors=errors, **context)


def _sentence(field: BaseModel) -> str:
    values = field.model_dump()
    name = str(values["field"]).replace("_", " ").capitalize()
    return f"{name} {values['message']}." if name else str(values["message"])
