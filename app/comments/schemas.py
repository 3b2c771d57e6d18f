"""What clients send about comments, and what they see."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from app.accounts.schemas import Paragraph, PersonOut
from app.ids import IdText

__all__ = ["CommentIn", "CommentOut"]


class CommentIn(BaseModel):
    """A comment to be written."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"body": "What a #light, @ana!", "parent_id": None}]},
    )

    body: Annotated[Paragraph, Field(min_length=1, max_length=1000)]
    parent_id: Annotated[
        IdText | None, Field(description="the comment that is answered; null for none")
    ] = None


class CommentOut(BaseModel):
    """A comment as everybody sees it.

    Attributes:
        parent_id: the comment at the top of its thread; null for one that is there itself.
        reply_count: answers in its thread, for one at the top.
        replies: the first of them.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "1903344051200002",
                    "photo_id": "1903344051200001",
                    "parent_id": None,
                    "author": {"id": "1903344051200000", "username": "ana", "display_name": "Ana"},
                    "body": "What a #light, @ben!",
                    "created_at": "2026-11-21T11:00:00Z",
                    "reply_count": 0,
                    "replies": [],
                }
            ]
        }
    )

    id: IdText
    photo_id: IdText
    parent_id: IdText | None
    author: PersonOut
    body: str
    created_at: dt.datetime
    reply_count: int = 0
    replies: Sequence[CommentOut] = ()
