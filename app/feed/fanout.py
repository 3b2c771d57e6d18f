"""Pushes new photos to the timelines of followers: the relay's handler of `photo.added`.

Events of an author come in order, at least once. A photo that is pushed again takes a slot again,
and readers see it once. When Redis does not answer the event is tried again, later ones of its
author wait, and feeds come from databases meanwhile.

Followers are read on the primary, after the photo was committed: so whoever's inverse edge is
there by then is reached, and of all others readers know that they have to look themselves
(`app.feed.sources`).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Final

from sqlalchemy import select

from app.accounts.models import User
from app.feed.modes import Modes, begin_pull, end_pull, is_pulled
from app.feed.rings import MOST
from app.feed.timelines import Timelines
from app.graph.models import Assoc, Kind
from app.photos.models import Photo
from shardkit import Cluster
from shardkit.outbox import Event

__all__ = ["deliver"]

PAGE: Final = 10_000
"""Followers read at once."""


def deliver(
    cluster: Cluster, timelines: Timelines | None, modes: Modes, events: Sequence[Event]
) -> None:
    """Push photos to who follows their owners.

    Args:
        cluster: where followers are.
        timelines: of whom; None where there is no Redis, and nothing to do.
        modes: decides who is pulled instead.
        events: with `id` and `owner_id`.

    Raises:
        SilentError: Redis does not answer (retryable).
        UnavailableError: a primary does not answer (retryable).
    """
    if timelines is None:
        return
    photos: dict[int, list[int]] = defaultdict(list)
    for event in events:
        photos[int(event.payload["owner_id"])].append(int(event.payload["id"]))
    for owner_id, added in photos.items():
        with cluster.writer() as session:
            owner = session.get(User, owner_id)
        if owner is None:  # the account has ended; nothing of it is shown any more
            continue
        pulled = is_pulled(cluster, owner_id)
        wanted = modes.decide(owner.follower_count, pulled=pulled)
        if wanted and not pulled:
            begin_pull(cluster, owner_id, int(time.time() * 1000))
        if not wanted:
            photo_ids = _all_there_are(cluster, owner_id) if pulled else added
            _push(cluster, timelines, modes, owner_id, photo_ids)
        if pulled and not wanted:
            end_pull(cluster, owner_id)


def _push(
    cluster: Cluster, timelines: Timelines, modes: Modes, owner_id: int, photo_ids: Sequence[int]
) -> None:
    for followers in _followers(cluster, owner_id):
        started = time.perf_counter()
        timelines.push(followers, photo_ids)
        modes.measured(len(followers) * len(photo_ids), time.perf_counter() - started)


def _followers(cluster: Cluster, owner_id: int) -> Iterator[list[int]]:
    """Yield who follows an author, some at a time, in the order of ids."""
    last = 0
    while True:
        statement = (
            select(Assoc.id2)
            .where(Assoc.id1 == owner_id, Assoc.atype == int(Kind.FOLLOWED_BY), Assoc.id2 > last)
            .order_by(Assoc.id2)
            .limit(PAGE)
        )
        with cluster.writer() as session:
            found = list(session.scalars(statement))
        if found:
            yield found
        if len(found) < PAGE:
            return
        last = found[-1]


def _all_there_are(cluster: Cluster, owner_id: int) -> list[int]:
    """Return an author's photos, oldest first, as many as a timeline has."""
    statement = select(Photo.id).where(Photo.owner_id == owner_id).order_by(Photo.id.desc())
    with cluster.writer() as session:
        return list(session.scalars(statement.limit(MOST)))[::-1]
