"""What clients send about stories, and what they see."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from app.accounts.schemas import Paragraph, PersonOut
from app.ids import IdText

__all__ = ["StoriesOut", "StoryCaption", "StoryOut", "ViewerOfStoryOut"]

StoryCaption = Annotated[Paragraph, Field(max_length=500)]
"""What the owner says with a story; may be empty."""


class StoryOut(BaseModel):
    """A story as one viewer sees it.

    Attributes:
        images: addresses by size in pixels; they end with the story, and want the log-in.
        seen_by_me: whether the viewer has opened it.
        view_count: how many others have; null for everybody but the owner.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "1903344051200003",
                    "owner": {"id": "1903344051200000", "username": "ana", "display_name": "Ana"},
                    "caption": "On the way",
                    "width": 1080,
                    "height": 810,
                    "images": {"640": "/media/stories/1903344051200003/640.jpg"},
                    "created_at": "2026-11-21T11:00:00Z",
                    "expires_at": "2026-11-22T11:00:00Z",
                    "seen_by_me": False,
                    "view_count": None,
                }
            ]
        }
    )

    id: IdText
    owner: PersonOut
    caption: str
    width: int
    height: int
    images: Mapping[str, str]
    created_at: dt.datetime
    expires_at: dt.datetime
    seen_by_me: bool
    view_count: int | None = None


class StoriesOut(BaseModel):
    """Somebody's stories of the last day, the oldest first.

    Attributes:
        all_seen: whether the viewer has opened all of them.
    """

    person: PersonOut
    stories: Sequence[StoryOut]
    all_seen: bool


class ViewerOfStoryOut(BaseModel):
    """Somebody who has seen a story."""

    person: PersonOut
    seen_at: dt.datetime
