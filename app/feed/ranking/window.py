"""Makes a ranked window: candidates from following, explore and ads, through the stages.

Called by the feed service with what databases and caches know; decides nothing about who may see
what. What is shared by all viewers (explore, ads) is read once in a while by each process.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final, Generic, TypeVar

from app.accounts.models import User
from app.feed.ranking.candidates import Candidate, Source
from app.feed.ranking.rankers import Ranker
from app.feed.ranking.stages import demoted, first_pass, ranked, varied, with_ads
from app.photos.models import Photo

__all__ = ["FOLLOWING", "Shared", "ordered", "picked"]

FOLLOWING: Final = 500
"""Photos of followed people in a window. Source: app.md, section 3.2: at least 500 candidates."""

EXPLORED: Final = 60
"""Photos of others that are candidates: at most a few of a page."""

T = TypeVar("T")


class Shared(Generic[T]):
    """Something that is the same for everybody, read at most once in a while by this process.

    Args:
        load: reads it.
        life: seconds for which it is used.
    """

    def __init__(self, load: Callable[[], Awaitable[T]], life: float) -> None:
        self._load = load
        self._life = life
        self._held: tuple[T, float] | None = None
        self._lock = asyncio.Lock()

    async def get(self) -> T:
        """Return it, read now or a moment ago; one reads, others wait."""
        async with self._lock:
            now = time.monotonic()
            if self._held is None or now - self._held[1] > self._life:
                self._held = (await self._load(), now)
            return self._held[0]


def picked(
    following: Sequence[int], explored: Sequence[int], age_of: Callable[[int], float]
) -> list[Candidate]:
    """Return the candidates whose rows are worth reading.

    Args:
        following: ids of photos of followed people, newest first.
        explored: ids of photos of others.
        age_of: seconds since a photo was posted.
    """
    known = set(following)
    candidates = [Candidate(id_, Source.FOLLOWING, max(0.0, age_of(id_))) for id_ in following]
    candidates += [
        Candidate(id_, Source.EXPLORE, max(0.0, age_of(id_)))
        for id_ in explored[:EXPLORED]
        if id_ not in known
    ]
    return first_pass(candidates)


def ordered(
    candidates: Sequence[Candidate],
    ads: Sequence[Candidate],
    photos: Mapping[int, Photo],
    owners: Mapping[int, User],
    *,
    ranker: Ranker,
    viewer_id: int,
    liked: set[int],
    now: float,
) -> list[Candidate]:
    """Return candidates in the order in which they are shown; what has no row is left out.

    Args:
        candidates: of the first pass.
        ads: that may be shown.
        photos: rows by id.
        owners: owners of photos that the viewer may see, by id.
        ranker: values candidates.
        viewer_id: who is asking.
        liked: ids of photos that the viewer likes.
        now: Unix seconds.
    """

    def whole(candidate: Candidate) -> Candidate | None:
        photo = photos.get(candidate.id)
        owner = None if photo is None else owners.get(photo.owner_id)
        if photo is None or owner is None:
            return None
        known = replace(
            candidate,
            owner_id=photo.owner_id,
            likes=photo.like_count,
            comments=photo.comment_count,
            width=photo.width,
            height=photo.height,
            is_mine=photo.owner_id == viewer_id,
            is_liked=photo.id in liked,
        )
        return demoted(known, photo.caption, now - owner.created_at.timestamp())

    shown = varied(ranked([each for c in candidates if (each := whole(c))], ranker))
    paid = ranked([each for ad in ads if (each := whole(ad)) and not each.is_mine], ranker)
    return with_ads(shown, paid)
