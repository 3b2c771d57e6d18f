"""What clients send about photos, and what they see."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from app.accounts.schemas import Paragraph, PersonOut
from app.ids import IdText

__all__ = [
    "Caption",
    "LikesOut",
    "PhotoOut",
    "UploadOut",
    "UploadProblem",
]

Caption = Annotated[Paragraph, Field(max_length=2200)]
"""What the owner says about a photo; may be empty."""


class LikesOut(BaseModel):
    """The likes of a photo after one's own changed."""

    photo_id: IdText
    like_count: int
    liked_by_me: bool


class PhotoOut(BaseModel):
    """A photo as one viewer sees it.

    Attributes:
        images: addresses by size in pixels; 1080 and 640 keep the shape, 320 and 150 are square.
        images_webp: the same as WebP, a third smaller; empty where there are none.
    """

    id: IdText
    owner: PersonOut
    caption: str
    width: int
    height: int
    images: Mapping[str, str]
    images_webp: Mapping[str, str] = Field(default_factory=dict)
    like_count: int
    comment_count: int
    liked_by_me: bool
    created_at: dt.datetime


class UploadProblem(BaseModel):
    """Why an upload did not become a photo; `type` is that of a problem document."""

    type: str
    detail: str


class UploadOut(BaseModel):
    """What has become of an upload that takes its time.

    Attributes:
        photo_id: the photo, once the state is `done`.
        problem: why there is none, once it is `failed`.
    """

    id: IdText
    state: Literal["working", "done", "failed"]
    photo_id: IdText | None = None
    problem: UploadProblem | None = None
    created_at: dt.datetime
