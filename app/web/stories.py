"""Pages of stories. For browsers only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from fastapi import APIRouter, Response
from pydantic import TypeAdapter, ValidationError

from app.deps import (
    ResourcesDep,
    SignedIn,
    Stories,
)
from app.errors import UploadError
from app.ids import Id
from app.stories.schemas import StoryCaption, ViewerOfStoryOut
from app.web.forms import Sent, Upload
from app.web.replies import PagesDep, go
from app.web.uploading import UploadPage

__all__ = ["router"]

router = APIRouter(include_in_schema=False)

VIEWERS = 100

STORY: Final = UploadPage(
    "story_new.html", "New story", "", "Choose a picture first.", TypeAdapter(StoryCaption)
)


@router.get("/stories/new")
async def story_form(viewer: SignedIn, pages: PagesDep, resources: ResourcesDep) -> Response:
    """Show the form for a story."""
    return STORY.empty(pages, viewer, resources.settings)


@router.post("/stories/new")
async def post_story(
    viewer: SignedIn, form: Upload, stories: Stories, pages: PagesDep, resources: ResourcesDep
) -> Response:
    """Post a story."""
    try:
        data, caption = await STORY.read(form)
        story = await stories.post(viewer, data, caption)
    except (UploadError, ValidationError) as error:
        return STORY.refused(pages, viewer, resources.settings, form, error)
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
