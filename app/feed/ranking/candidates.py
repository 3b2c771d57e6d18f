"""What the stages work on. Values; no I/O."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

__all__ = ["Candidate", "Shape", "Source"]

TALL, WIDE = 0.9, 1.1
"""Width over height below and above which a photo is tall or wide."""


class Source(IntEnum):
    """Where a candidate comes from."""

    FOLLOWING = 0
    EXPLORE = 1
    AD = 2


class Shape(IntEnum):
    """The format of a photo."""

    SQUARE = 0
    TALL = 1
    WIDE = 2


@dataclass(frozen=True, slots=True)
class Candidate:
    """A photo that may be shown.

    Attributes:
        id: of the photo.
        source: where it comes from.
        age: seconds since it was posted.
        owner_id: whose; 0 until its row was read.
        likes: how many like it.
        comments: how many comments it has.
        width: pixels.
        height: pixels.
        is_mine: it is the viewer's own.
        is_liked: the viewer likes it already.
        bid: what an advertiser pays; 0 for all others.
        trust: from 0 to 1: what is left of its value after the integrity rules.
    """

    id: int
    source: Source
    age: float
    owner_id: int = 0
    likes: int = 0
    comments: int = 0
    width: int = 1
    height: int = 1
    is_mine: bool = False
    is_liked: bool = False
    bid: float = 0.0
    trust: float = 1.0

    @property
    def shape(self) -> Shape:
        """The format of the photo."""
        ratio = self.width / self.height
        return Shape.TALL if ratio < TALL else Shape.WIDE if ratio > WIDE else Shape.SQUARE
