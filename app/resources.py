"""What one server process holds open: made at start, closed at stop, never at import."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

from app import timing
from app.accounts.passwords import Passwords
from app.clock import Clock
from app.feed.building import Builder
from app.feed.cursors import Cursors
from app.feed.ranked import RankedFeed
from app.feed.timelines import AsyncTimelines
from app.legacy.photos import open_client, open_map
from app.limits.buckets import Buckets, LocalBuckets, RedisBuckets
from app.limits.limiter import Limiter
from app.notifications.hub import Hub
from app.notifications.hub import opened as hub_opened
from app.photos.images import FORMATS, ImageLimits, ImageWorkers
from app.photos.likes import Likes
from app.photos.opening import open_blobs
from app.photos.running import RunningUploads
from app.photos.store import BlobStore
from app.search.cached import CachedSearch
from app.search.postgres import PostgresSearch
from app.search.protocol import SearchIndex
from app.settings import Settings
from shardkit import AsyncCluster
from shardkit.idmap import AsyncIdMap

__all__ = ["Resources", "open_resources", "running"]


@dataclass(frozen=True, slots=True)
class Resources:
    """Everything a request may need that outlives it.

    Attributes:
        settings: as given at start.
        cluster: the databases.
        passwords: the hasher.
        blobs: the bytes of pictures.
        workers: the decoding processes.
        uploads: those that are worked on after their answer.
        clock: the time.
        likes: writes likes, many together.
        cursors: where pages of feeds begin.
        ranked: ranks feeds.
        limiter: decides who asks too often.
        search: finds people and hashtags.
        hub: the open streams of notifications.
        redis_url: address of Redis, or None when there is none.
        legacy_photos: ids of photos by the number they once had; None without Redis.
        timelines: what was pushed to whom, and who builds it; None without Redis.
    """

    settings: Settings
    cluster: AsyncCluster
    passwords: Passwords
    blobs: BlobStore
    workers: ImageWorkers
    uploads: RunningUploads
    clock: Clock
    likes: Likes
    cursors: Cursors
    ranked: RankedFeed
    limiter: Limiter
    search: SearchIndex
    hub: Hub
    redis_url: str | None = None
    legacy_photos: AsyncIdMap | None = None
    timelines: tuple[AsyncTimelines, Builder] | None = None


@asynccontextmanager
async def open_resources(settings: Settings, clock: Clock) -> AsyncIterator[Resources]:
    """Open everything a server or a command needs, and close it at the end.

    Raises:
        ConfigurationError: the configuration of the cluster is wrong.
    """
    async with AsyncExitStack() as stack:
        cluster = await stack.enter_async_context(AsyncCluster.from_file(settings.config))
        cluster.listen(timing.heard)
        blobs = open_blobs(settings)
        stack.push_async_callback(blobs.close)
        workers = ImageWorkers(
            settings.image_workers,
            ImageLimits(max_pixels=settings.max_pixels),
            FORMATS if settings.webp else ("jpg",),
        )
        stack.push_async_callback(workers.close)
        uploads = RunningUploads()
        stack.push_async_callback(uploads.close)
        likes = Likes(cluster, clock, timeout=settings.database_timeout)
        stack.push_async_callback(likes.close)
        redis_url = cluster.services.get("redis")
        buckets: Buckets = LocalBuckets() if redis_url is None else RedisBuckets(redis_url)
        limiter = Limiter(buckets, settings.limits)
        stack.push_async_callback(limiter.close)
        legacy_photos: AsyncIdMap | None = None
        timelines: tuple[AsyncTimelines, Builder] | None = None
        if redis_url is not None:
            redis = open_client(redis_url)
            stack.push_async_callback(redis.aclose)
            legacy_photos = open_map(redis)
            opened = AsyncTimelines(redis_url)
            stack.push_async_callback(opened.close)
            builder = Builder(cluster, opened, settings.max_followees)
            stack.push_async_callback(builder.close)
            timelines = opened, builder
        hub = await stack.enter_async_context(hub_opened(cluster, redis_url, clock))
        yield Resources(
            settings=settings,
            cluster=cluster,
            passwords=await asyncio.to_thread(Passwords, settings.hash_workers),
            blobs=blobs,
            workers=workers,
            uploads=uploads,
            clock=clock,
            likes=likes,
            cursors=Cursors(cluster.token_keys),
            ranked=RankedFeed(cluster, clock),
            limiter=limiter,
            redis_url=redis_url,
            legacy_photos=legacy_photos,
            timelines=timelines,
            search=CachedSearch(PostgresSearch(cluster)),
            hub=hub,
        )


@contextmanager
def running(work: Coroutine[Any, Any, None]) -> Iterator[None]:
    """Run something in the background for the time of a `with` block."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
