"""Where the photos of a feed are known from, merged: a timeline, and authors that are pulled.

The timeline has what was pushed. Pulled are, from the cached lists of their newest photos: oneself,
so that one's own photo is there at once; authors who are never pushed; and whoever is followed
since the timeline last took the photos of newly followed people. That last is decided by the time
of the follow, which grows with each follow of one person. A follow counts as taken only when its
inverse edge was there before the author's photos were read: from then on they are pushed.

So of what is merged everything is there above one id, `above`; what is below comes from databases.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, takewhile
from operator import itemgetter
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from app.feed.modes import ROOT
from app.feed.rings import Timeline
from app.feed.timelines import AsyncTimelines
from app.graph import tao
from app.graph.models import Kind, edges_of
from app.graph.tao import Edge
from app.photos.models import newest_of
from shardkit import AsyncReadSession, ReadSession
from shardkit.ids import MAX_ID

__all__ = ["Sources", "following_of", "gathered", "merged", "owners_of"]

_ID2: Final = itemgetter(1)

MOST_NEW = 50
"""Newly followed people who are pulled; of more the timeline is built anew."""


def _none() -> NDArray[np.int64]:
    return np.empty(0, np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Sources:
    """What is known of a feed without asking who posted.

    Attributes:
        owners: whose photos belong to it.
        ids: photos that may belong to it, ascending, some perhaps twice.
        above: of those with a higher id none is missing.
        new: follows that the timeline has not taken yet, newest first.
        timeline: what was pushed; None when there is none, or nothing is certain of it yet.
        lacks_timeline: there is none, so databases are asked, and it has to be built.
    """

    owners: frozenset[int]
    ids: NDArray[np.int64] = field(default_factory=_none)
    above: int = MAX_ID
    new: Sequence[Edge] = ()
    timeline: Timeline | None = None
    lacks_timeline: bool = False

    def below(self, before: int, n: int) -> list[int]:
        """Return the newest ids below one, and above `above`, each once; fewer when there are."""
        low = int(self.ids.searchsorted(self.above, "right"))
        high = int(self.ids.searchsorted(before))
        found: list[int] = []
        while low < high and len(found) < n:
            start = max(low, high - n + len(found))
            for id_ in reversed(self.ids[start:high].tolist()):
                if not found or found[-1] != id_:
                    found.append(id_)
            high = start
        return found


def merged(
    timeline: Timeline, pulled: Mapping[int, Sequence[int]]
) -> tuple[NDArray[np.int64], int]:
    """Return photos ascending, and the id above which none is missing.

    All are sorted, few become Python's numbers: a page has twenty of nine hundred.

    Args:
        timeline: what was pushed.
        pulled: newest photos by author; as many as a list has, or all there are.
    """
    above = timeline.floor
    parts = [timeline.slots]
    for newest in pulled.values():
        parts.append(np.array(newest, np.int64))
        if len(newest) >= newest_of.limit:
            above = max(above, newest[-1])
    found = np.concatenate(parts)
    found.sort()
    return found, above


def owners_of(user_id: int, following: Iterable[tuple[int, int]]) -> frozenset[int]:
    """Return whose photos belong to a feed, by what `following_of` returned."""
    return frozenset(chain((user_id,), map(_ID2, following)))


def following_of(
    session: ReadSession, user_id: int, most: int
) -> tuple[Sequence[tuple[int, int]], set[int]]:
    """Return whom somebody follows, newest first, as time and id, and the authors who are pulled.

    No edges are made of them: there may be thousands, at each page.
    """
    lists = session.cached_many(edges_of, _lists(user_id))
    return _followed(session, user_id, most, lists)


def known_of(
    session: ReadSession, user_id: int, most: int
) -> tuple[Sequence[tuple[int, int]], set[int], Sequence[int]]:
    """Return what `following_of` does, and one's own newest photos, from the same round trip."""
    found = session.cached_together({edges_of: _lists(user_id), newest_of: (user_id,)})
    return *_followed(session, user_id, most, found[edges_of]), found[newest_of][user_id]


def _lists(user_id: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return (user_id, int(Kind.FOLLOWS)), (ROOT, int(Kind.PULLED))


def _followed(
    session: ReadSession, user_id: int, most: int, lists: Mapping[Any, Sequence[tuple[int, int]]]
) -> tuple[Sequence[tuple[int, int]], set[int]]:
    mine, service = _lists(user_id)
    following = lists[mine]
    if len(following) >= edges_of.limit:
        following = tao.assoc_page(session, user_id, Kind.FOLLOWS, None, most)
    return following[:most], {id2 for _, id2 in lists[service]}


async def gathered(
    session: AsyncReadSession, timelines: AsyncTimelines, user_id: int, most: int
) -> Sources:
    """Return where the photos of a feed are known from.

    Args:
        session: a reader.
        timelines: what was pushed.
        user_id: whose feed.
        most: people whose photos are looked for.

    Raises:
        SilentError: Redis does not answer.
        UnavailableError: neither a cache nor a server does (retryable).
    """
    # Before the list of follows: a follow of after it is then newer than what it covers.
    timeline = await timelines.read(user_id)
    following, pulled, own = await tao.on(session, known_of, user_id, most)
    owners = owners_of(user_id, following)
    if timeline is None:
        return Sources(owners, lacks_timeline=True)
    if timeline.is_building:
        return Sources(owners)
    covered = timeline.covered
    new = tao.edges(takewhile(lambda pair: pair[0] > covered, following))  # they are newest first
    if len(new) > MOST_NEW:
        return Sources(owners, new=new, timeline=timeline)
    asked = {*(pulled & owners), *(edge.id2 for edge in new)} - {user_id}
    newest = await session.cached_many(newest_of, asked) if asked else {}
    ids, above = merged(timeline, {user_id: own, **newest})
    return Sources(owners, ids, above, new, timeline)
