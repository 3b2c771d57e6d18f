"""Keyset pages: a cursor is the last id of the page before, never an offset.

Ids sort by time over all shards, so one id marks a place in a list merged from any number of
them, and the place stays right while rows come and go.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Generic, TypeVar

from fastapi import Query
from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema

from app.ids import Id

__all__ = ["Cursor", "Limit", "Page", "cut"]

T = TypeVar("T")

MAX_PAGE = 100

Cursor = Annotated[
    Id | None, Query(description="`next_cursor` of the page before; leave out for the first page")
]
"""Where a page begins, as a query parameter."""

Limit = Annotated[int, Query(ge=1, le=MAX_PAGE, description="items per page")]
"""Length of a page, as a query parameter."""


CursorText = Annotated[
    str | int,
    BeforeValidator(lambda value: str(value) if isinstance(value, int) else value),
    WithJsonSchema({"type": "string"}),
]
"""A cursor in JSON: text that only we read; often an id."""


class Page(BaseModel, Generic[T]):
    """Some items and where the rest begins.

    Attributes:
        partial: whether items may be missing because a server did not answer.
    """

    items: Sequence[T]
    next_cursor: Annotated[
        CursorText | None, Field(description="send as `cursor` for the next page; null at the end")
    ] = None
    partial: Annotated[
        bool, Field(description="items may be missing here; read the page again in a moment")
    ] = False


def cut(rows: Sequence[T], n: int, id_of: Callable[[T], int]) -> tuple[Sequence[T], int | None]:
    """Split `n` rows off a list read with a limit of `n + 1`; return them and the next cursor."""
    if len(rows) <= n:
        return rows, None
    return rows[:n], id_of(rows[n - 1])
