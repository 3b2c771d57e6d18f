"""What one server process holds open: made at start, closed at stop, never at import."""

from __future__ import annotations

import asyncio
import tomllib
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.accounts.passwords import Passwords
from app.clock import Clock
from app.notifications.hub import Hub, opened
from app.photos.images import ImageLimits, ImageWorkers
from app.photos.store import BlobStore, FileBlobStore
from app.search.cached import CachedSearch
from app.search.postgres import PostgresSearch
from app.search.protocol import SearchIndex
from app.settings import Settings
from app.stories.cleanup import keep_clean
from shardkit import AsyncCluster

__all__ = ["Resources", "open_resources", "services"]


@dataclass(frozen=True, slots=True)
class Resources:
    """Everything a request may need that outlives it.

    Attributes:
        settings: as given at start.
        cluster: the databases.
        passwords: the hasher.
        blobs: the bytes of pictures.
        workers: the decoding processes.
        clock: the time.
        search: finds people and hashtags.
        hub: the open streams of notifications.
        redis_url: address of Redis, or None when there is none.
    """

    settings: Settings
    cluster: AsyncCluster
    passwords: Passwords
    blobs: BlobStore
    workers: ImageWorkers
    clock: Clock
    search: SearchIndex
    hub: Hub
    redis_url: str | None = None


@asynccontextmanager
async def open_resources(settings: Settings, clock: Clock) -> AsyncIterator[Resources]:
    """Open everything a server needs, and close it at the end.

    Raises:
        ConfigurationError: the configuration of the cluster is wrong.
    """
    async with AsyncExitStack() as stack:
        cluster = await stack.enter_async_context(AsyncCluster.from_file(settings.config))
        workers = ImageWorkers(settings.image_workers, ImageLimits(max_pixels=settings.max_pixels))
        stack.push_async_callback(workers.close)
        blobs = FileBlobStore(settings.media_folder)
        redis_url = services(settings.config).get("redis")
        hub = await stack.enter_async_context(opened(cluster, redis_url, clock))
        stack.enter_context(running(keep_clean(cluster, blobs, clock)))
        yield Resources(
            settings=settings,
            cluster=cluster,
            passwords=await asyncio.to_thread(Passwords, settings.hash_workers),
            blobs=blobs,
            workers=workers,
            clock=clock,
            search=CachedSearch(PostgresSearch(cluster)),
            hub=hub,
            redis_url=redis_url,
        )


@contextmanager
def running(work: Coroutine[Any, Any, None]) -> Iterator[None]:
    """Run something in the background for the time of a `with` block."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()


def services(config: Path) -> Mapping[str, str]:
    """Return `[services]` of a configuration file that the cluster has accepted already."""
    services: Mapping[str, str] = tomllib.loads(config.read_text("utf-8")).get("services", {})
    return services
