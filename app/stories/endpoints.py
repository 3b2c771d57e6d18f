"""Stories over HTTP: the API, and the bytes under `/media/stories`."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, File, Form, Response, UploadFile, status

from app.addresses import API, MEDIA
from app.deps import Keyed, SignedIn, Stories
from app.ids import Id
from app.paging import Cursor, Limit, Page
from app.stories.schemas import StoriesOut, StoryCaption, StoryOut, ViewerOfStoryOut

__all__ = ["media", "router"]

router = APIRouter(prefix=API, tags=["stories"])
media = APIRouter(prefix=MEDIA, include_in_schema=False)


@router.post("/stories", status_code=status.HTTP_201_CREATED, dependencies=[Keyed])
async def post(
    viewer: SignedIn,
    stories: Stories,
    file: Annotated[UploadFile, File(description="a JPEG, PNG or WebP")],
    caption: Annotated[StoryCaption, Form(examples=["On the way"])] = "",
) -> StoryOut:
    """Post a story; it is there for 24 hours."""
    return await stories.post(viewer, await file.read(), caption)


@router.get("/stories")
async def everybody(viewer: SignedIn, stories: Stories) -> Page[StoriesOut]:
    """Return one's own stories and those of whom one follows, what is new first."""
    return await stories.all(viewer)


@router.get("/users/{username}/stories")
async def of(username: str, viewer: SignedIn, stories: Stories) -> StoriesOut:
    """Return a person's stories of the last 24 hours, the oldest first."""
    return await stories.of(viewer, username)


@router.get("/stories/{story_id}")
async def story(story_id: Id, viewer: SignedIn, stories: Stories) -> StoryOut:
    """Return a story."""
    return await stories.story(viewer, story_id)


@router.delete("/stories/{story_id}", status_code=status.HTTP_204_NO_CONTENT, dependencies=[Keyed])
async def delete(story_id: Id, viewer: SignedIn, stories: Stories) -> None:
    """Delete one's own story before its time."""
    await stories.delete(viewer, story_id)


@router.put(
    "/stories/{story_id}/view", status_code=status.HTTP_204_NO_CONTENT, dependencies=[Keyed]
)
async def view(story_id: Id, viewer: SignedIn, stories: Stories) -> None:
    """Tell the owner that one has seen a story."""
    await stories.view(viewer, story_id)


@router.get("/stories/{story_id}/viewers")
async def viewers(
    story_id: Id, viewer: SignedIn, stories: Stories, cursor: Cursor = None, limit: Limit = 30
) -> Page[ViewerOfStoryOut]:
    """Return who has seen one's own story, the last first."""
    return await stories.viewers(viewer, story_id, cursor, limit)


@media.get("/stories/{story_id}/{size}.jpg")
async def picture(story_id: Id, size: int, viewer: SignedIn, stories: Stories) -> Response:
    """Return one size of a story's picture, which browsers keep until it ends, no longer."""
    data, seconds = await stories.picture(viewer, story_id, size)
    return Response(
        data,
        media_type="image/jpeg",
        headers={
            "cache-control": f"private, max-age={seconds}",
            "content-disposition": f'inline; filename="{size}.jpg"',
            "content-security-policy": "default-src 'none'; sandbox",
        },
    )
