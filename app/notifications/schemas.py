"""What clients see of what happened to them."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from app.accounts.schemas import PersonOut
from app.ids import IdText
from app.notifications.notices import NoticeKind

__all__ = ["GroupOut", "NotificationOut", "ReadIn", "UnreadOut"]


class NotificationOut(BaseModel):
    """One thing that happened, as the stream tells it.

    Attributes:
        seq: its number; the `id` of the event.
    """

    seq: IdText
    kind: NoticeKind
    actor: PersonOut
    photo_id: IdText | None
    comment_id: IdText | None
    created_at: dt.datetime


class GroupOut(BaseModel):
    """Things of a kind that happened to one photo, or on one day, as one line of the list.

    Attributes:
        seq: number of the newest of them.
        count: how many people did so.
        actors: who did them, the last first, three at most.
        photo: address of a small picture of the photo, if the viewer may see it.
        unread: whether there is one that is not marked as read.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "seq": "42",
                    "kind": "like",
                    "count": 3,
                    "actors": [
                        {"id": "1903344051200000", "username": "ana", "display_name": "Ana"}
                    ],
                    "photo_id": "1903344051200001",
                    "photo": "/media/0123456789abcdef0123456789abcdef/150.jpg",
                    "comment_id": None,
                    "created_at": "2026-11-21T11:00:00Z",
                    "unread": True,
                }
            ]
        }
    )

    seq: IdText
    kind: NoticeKind
    count: int
    actors: Sequence[PersonOut]
    photo_id: IdText | None
    photo: str | None
    comment_id: IdText | None
    created_at: dt.datetime
    unread: bool


class UnreadOut(BaseModel):
    """How much there is that was not read."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"unread": 3}]})

    unread: int


class ReadIn(BaseModel):
    """Up to where the viewer has read."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"seq": "42"}]})

    seq: Annotated[IdText, Field(description="`seq` of the newest one that was shown")]
