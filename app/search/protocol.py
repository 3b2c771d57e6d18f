"""The seam between the service and whatever finds people and hashtags."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

__all__ = ["Found", "SearchIndex", "TagFound"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TagFound:
    """A tag that was found.

    Attributes:
        name: in its canonical form.
        photo_count: how many photos have it, as far as the index knows.
    """

    name: str
    photo_count: int


@dataclass(frozen=True, slots=True)
class Found(Generic[T]):
    """What was found, the best first.

    Attributes:
        items: what was found.
        is_partial: whether something may be missing because a server did not answer.
    """

    items: Sequence[T] = field(default_factory=tuple)
    is_partial: bool = False


class SearchIndex(Protocol):
    """Finds by what people remember, misspelt or half of it.

    It may be some seconds behind, and may find who is gone: whoever shows what it finds reads the
    rows. It is told of changes by events (`app.happenings`), never by who searches.
    """

    async def people(self, text: str, n: int) -> Found[int]:
        """Return ids of up to `n` people for what was typed, the best first."""

    async def hashtags(self, text: str, n: int) -> Found[TagFound]:
        """Return up to `n` tags for what was typed, the best first."""
