"""Removes stories whose time is over: first the bytes, then the rows that name them.

Nothing that is served depends on it. It runs in the server's process, since that is where the
bytes are at hand, in as many of them as there are; what another has removed is no error.
A crash in between leaves a row whose bytes are gone, which the next one removes.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Final

from sqlalchemy import delete, select

from app.clock import Clock
from app.database import TIMEOUT
from app.partial import FAILED, answered
from app.photos.store import BlobStore
from app.stories.models import Story, StoryView
from shardkit import AsyncCluster, deadline, ids

__all__ = ["keep_clean", "sweep"]

log = logging.getLogger("app")

BATCH: Final = 500
PAUSE: Final = 60.0
"""Seconds between two sweeps, on average."""


async def keep_clean(cluster: AsyncCluster, blobs: BlobStore, clock: Clock) -> None:
    """Sweep again and again, until cancelled."""
    while True:
        await asyncio.sleep(PAUSE * random.uniform(0.5, 1.5))  # noqa: S311 - not all at once
        try:
            while await sweep(cluster, blobs, clock()) == BATCH:
                pass
        except FAILED as error:
            log.warning("stories were not all removed, later then: %s", error)
        except Exception:
            log.exception("the sweep of stories failed")


async def sweep(cluster: AsyncCluster, blobs: BlobStore, now: dt.datetime) -> int:
    """Remove up to `BATCH` stories that expired; return how many there were.

    Args:
        cluster: where the rows are; servers that do not answer are left for later.
        blobs: where the bytes are.
        now: the time.

    Raises:
        GatherError: no server answers (retryable).
        UnavailableError: one that answered no longer does (retryable).
    """
    statement = select(Story).where(Story.expires_at <= now).order_by(Story.id).limit(BATCH)
    async with cluster.reader() as session:
        stories: Sequence[Story] = await answered(session, statement)
    for story in stories:
        await blobs.delete(story.blob_key)
    shard_map = cluster.topology.shard_map
    by_server: dict[str, list[int]] = defaultdict(list)
    for story in stories:
        by_server[shard_map.owner(ids.shard_of(story.id))].append(story.id)
    for gone in by_server.values():
        with deadline(TIMEOUT):
            async with cluster.writer() as session:
                await session.execute(delete(StoryView).where(StoryView.story_id.in_(gone)))
                await session.execute(delete(Story).where(Story.id.in_(gone)))
                await session.commit()
    return len(stories)
