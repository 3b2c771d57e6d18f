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
from dataclasses import dataclass
from itertools import takewhile

from app.feed.modes import ROOT
from app.feed.rings import Timeline
from app.feed.timelines import AsyncTimelines
from app.graph import tao
from app.graph.models import Kind, edges_of
from app.graph.tao import Edge
from app.photos.models import newest_of
from shardkit import AsyncReadSession, ReadSession

__all__ = ["Sources", "following_of", "gathered", "merged"]

MOST_NEW = 50
"""Newly followed people who are pulled; of more the timeline is built anew."""


@dataclass(frozen=True, slots=True)
class Sources:
    """What is known of a feed without asking who posted.

    Attributes:
        owners: whose photos belong to it.
        ids: photos that may belong to it, newest first.
        above: of those with a higher id none is missing.
        new: follows that the timeline has not taken yet, newest first.
        timeline: what was pushed; None when there is none, or nothing is certain of it yet.
        lacks_timeline: there is none, so databases are asked, and it has to be built.
    """

    owners: frozenset[int]
    ids: Sequence[int] = ()
    above: int = (1 << 63) - 1
    new: Sequence[Edge] = ()
    timeline: Timeline | None = None
    lacks_timeline: bool = False


def merged(timeline: Timeline, pulled: Mapping[int, Sequence[int]]) -> tuple[list[int], int]:
    """Return photos newest first, and the id above which none is missing.

    Args:
        timeline: what was pushed.
        pulled: newest photos by author; as many as a list has, or all there are.
    """
    above = timeline.floor
    found = set(timeline.ids)
    for newest in pulled.values():
        found.update(newest)
        if len(newest) >= newest_of.limit:
            above = max(above, newest[-1])
    return sorted(found, reverse=True), above


def following_of(
    session: ReadSession, user_id: int, most: int
) -> tuple[Sequence[tuple[int, int]], set[int]]:
    """Return whom somebody follows, newest first, as time and id, and the authors who are pulled.

    No edges are made of them: there may be thousands, at each page.
    """
    mine, service = (user_id, int(Kind.FOLLOWS)), (ROOT, int(Kind.PULLED))
    lists = session.cached_many(edges_of, (mine, service))
    following: Sequence[tuple[int, int]] = lists[mine]
    if len(following) >= edges_of.limit:
        following = tao.assoc_page(session, user_id, Kind.FOLLOWS, None, most)
    pulled = {id2 for _, id2 in lists[service]}
    return following[:most], pulled


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
    following, pulled = await tao.on(session, following_of, user_id, most)
    owners = frozenset({user_id, *(id2 for _, id2 in following)})
    if timeline is None:
        return Sources(owners, lacks_timeline=True)
    if timeline.is_building:
        return Sources(owners)
    covered = timeline.covered
    new = tao.edges(takewhile(lambda pair: pair[0] > covered, following))  # they are newest first
    if len(new) > MOST_NEW:
        return Sources(owners, new=new, timeline=timeline)
    asked: Iterable[int] = {user_id, *(pulled & owners), *(edge.id2 for edge in new)}
    newest = await session.cached_many(newest_of, asked)
    ids, above = merged(timeline, newest)
    return Sources(owners, ids, above, new, timeline)
