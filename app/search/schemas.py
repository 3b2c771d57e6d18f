"""What clients see of a search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from app.accounts.schemas import PersonOut

__all__ = ["SearchOut", "TagOut"]


class TagOut(BaseModel):
    """A hashtag that was found."""

    name: str
    photo_count: int


class SearchOut(BaseModel):
    """What was found, the best first.

    Attributes:
        people: whose name is like what was typed.
        tags: hashtags that begin with it or are like it.
        partial: whether something may be missing because a server did not answer.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "people": [
                        {"id": "1903344051200000", "username": "ana", "display_name": "Ana"}
                    ],
                    "tags": [{"name": "analog", "photo_count": 12}],
                    "partial": False,
                }
            ]
        }
    )

    people: Sequence[PersonOut]
    tags: Sequence[TagOut]
    partial: Annotated[bool, Field(description="something may be missing; ask again")] = False
