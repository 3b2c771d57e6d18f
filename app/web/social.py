"""Pages around photos: stories, saved photos, tags, threads, notifications and search.

Called by nobody but browsers; the services of the API do the work. Forms are as in `app.web.pages`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from pydantic import TypeAdapter, ValidationError

from app.accounts.usernames import canonical
from app.deps import (
    Accounts,
    Comments,
    MaybeViewer,
    Notifications,
    Photos,
    ResourcesDep,
    Saves,
    Search,
    SignedIn,
    Stories,
    Tags,
)
from app.errors import EmptyUploadError, NotFoundError, UploadError
from app.ids import Id
from app.notifications.notices import NoticeKind
from app.notifications.schemas import ReadIn
from app.paging import Cursor
from app.search.endpoints import MAX_QUERY
from app.stories.schemas import StoryCaption, ViewerOfStoryOut
from app.tags.parser import canonical_tag
from app.web.forms import Sent, Upload
from app.web.pages import PagesDep, again, back_to, go

__all__ = ["router"]

router = APIRouter(include_in_schema=False)

GRID_PAGE, REPLY_PAGE, NOTICE_PAGE, VIEWERS, FOUND = 24, 50, 30, 100, 20

WORDS: Mapping[str, str] = {
    NoticeKind.LIKE: "liked your photo",
    NoticeKind.COMMENT: "commented on your photo",
    NoticeKind.REPLY: "answered your comment",
    NoticeKind.MENTION: "mentioned you",
    NoticeKind.FOLLOW: "began to follow you",
    NoticeKind.REQUEST: "asked to follow you",
}
"""What the list says after the names."""


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


@router.post("/p/{photo_id}/save")
async def save(photo_id: Id, viewer: SignedIn, form: Sent, saves: Saves) -> Response:
    """Save a photo."""
    await saves.save(viewer, photo_id)
    return back_to(form, f"/p/{photo_id}")


@router.post("/p/{photo_id}/unsave")
async def unsave(photo_id: Id, viewer: SignedIn, form: Sent, saves: Saves) -> Response:
    """Keep a photo no longer."""
    await saves.unsave(viewer, photo_id)
    return back_to(form, f"/p/{photo_id}")


@router.get("/p/{photo_id}/c/{comment_id}")
async def thread(
    *,
    photo_id: Id,
    comment_id: Id,
    viewer: MaybeViewer,
    photos: Photos,
    comments: Comments,
    pages: PagesDep,
    cursor: Cursor = None,
) -> Response:
    """Show a comment with all answers to it."""
    shown = await photos.photo(photo_id, viewer)
    top, page = await comments.thread(photo_id, comment_id, viewer, cursor, REPLY_PAGE)
    return pages.whole(
        "thread.html",
        title=f"Answers to {top.author.username}",
        viewer=viewer,
        top=top,
        page=page,
        owner_id=shown.owner.id,
        path=f"/p/{photo_id}",
        here_path=f"/p/{photo_id}/c/{comment_id}",
    )


@router.get("/notifications")
async def notifications(
    *,
    request: Request,
    viewer: SignedIn,
    notifications: Notifications,
    pages: PagesDep,
    cursor: Cursor = None,
) -> Response:
    """Show what happened to the viewer."""

    async def load() -> Mapping[str, Any]:
        page = await notifications.page(viewer, cursor, NOTICE_PAGE)
        return {"page": page, "words": WORDS}

    return pages.streamed(
        request, ("notifications.html", load), title="Activity", viewer=viewer, here="activity"
    )


@router.post("/notifications/read")
async def read(viewer: SignedIn, form: Sent, notifications: Notifications) -> Response:
    """Mark as read what the page has shown."""
    await notifications.read(viewer, ReadIn.model_validate(form.texts("seq")).seq)
    return go("/notifications")


@router.get("/stories/new")
async def story_form(viewer: SignedIn, pages: PagesDep, resources: ResourcesDep) -> Response:
    """Show the form for a story."""
    return pages.whole(
        "story_new.html",
        title="New story",
        viewer=viewer,
        values={"caption": ""},
        errors=(),
        megabytes=resources.settings.max_upload_bytes >> 20,
    )


@router.post("/stories/new")
async def post_story(
    viewer: SignedIn, form: Upload, stories: Stories, pages: PagesDep, resources: ResourcesDep
) -> Response:
    """Post a story."""
    caption = form.text("caption")
    try:
        data = await form.file()
        if data is None:
            raise EmptyUploadError("Choose a picture first.")
        checked = TypeAdapter(StoryCaption).validate_python(caption)
        story = await stories.post(viewer, data, checked)
    except (UploadError, ValidationError) as error:
        return again(
            pages,
            "story_new.html",
            "New story",
            error,
            viewer=viewer,
            values={"caption": caption},
            megabytes=resources.settings.max_upload_bytes >> 20,
        )
    return go(f"/stories/{viewer.username}?at={story.id}")


@router.get("/stories/{username}")
async def story(
    *,
    username: str,
    viewer: SignedIn,
    stories: Stories,
    pages: PagesDep,
    at: Id | None = None,
) -> Response:
    """Show one of a person's stories, the first unseen one unless another is asked for.

    To open the page is to have seen the story: there is no script that could say so later.
    """
    group = await stories.of(viewer, username)
    title = f"Story of {group.person.username}"
    if not group.stories:
        return pages.whole("stories_none.html", title=title, viewer=viewer, status=404, group=group)
    ids = [each.id for each in group.stories]
    unseen = [each.id for each in group.stories if not each.seen_by_me]
    shown = ids.index(at if at in ids else next(iter(unseen), ids[0]))
    story = group.stories[shown]
    views: Sequence[ViewerOfStoryOut] = ()
    if story.view_count is not None:
        views = (await stories.viewers(viewer, story.id, None, VIEWERS)).items
    elif not story.seen_by_me:
        await stories.view(viewer, story.id)
    return pages.whole(
        "story.html",
        title=title,
        viewer=viewer,
        group=group,
        story=story,
        at=shown,
        before=ids[shown - 1] if shown else None,
        after=ids[shown + 1] if shown + 1 < len(ids) else None,
        views=views,
    )


@router.post("/stories/{story_id}/delete")
async def delete_story(story_id: Id, viewer: SignedIn, _form: Sent, stories: Stories) -> Response:
    """Delete a story."""
    await stories.delete(viewer, story_id)
    return go("/")
