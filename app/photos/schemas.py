"""What clients send about photos, and what they see."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, Field

from app.accounts.schemas import Paragraph, PersonOut
from app.ids import IdText

__all__ = ["Caption", "LikesOut", "PhotoOut"]

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
    """

    id: IdText
    owner: PersonOut
    caption: str
    width: int
    height: int
    images: Mapping[str, str]
    like_count: int
    comment_count: int
    liked_by_me: bool
    created_at: dt.datetime
