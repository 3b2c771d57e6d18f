"""What one server process holds open: made at start, closed at stop, never at import."""

from __future__ import annotations

import asyncio
import tomllib
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from app.accounts.passwords import Passwords
from app.clock import Clock
from app.legacy.photos import open_client, open_map
from app.photos.images import FORMATS, ImageLimits, ImageWorkers
from app.photos.opening import open_blobs
from app.photos.running import RunningUploads
from app.photos.store import BlobStore
from app.settings import Settings
from shardkit import AsyncCluster
from shardkit.idmap import AsyncIdMap

__all__ = ["Resources", "open_resources"]


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
        redis_url: address of Redis, or None when there is none.
        legacy_photos: ids of photos by the number they once had; None without Redis.
    """

    settings: Settings
    cluster: AsyncCluster
    passwords: Passwords
    blobs: BlobStore
    workers: ImageWorkers
    uploads: RunningUploads
    clock: Clock
    redis_url: str | None = None
    legacy_photos: AsyncIdMap | None = None


@asynccontextmanager
async def open_resources(settings: Settings, clock: Clock) -> AsyncIterator[Resources]:
    """Open everything a server needs, and close it at the end.

    Raises:
        ConfigurationError: the configuration of the cluster is wrong.
    """
    async with AsyncExitStack() as stack:
        cluster = await stack.enter_async_context(AsyncCluster.from_file(settings.config))
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
        redis_url = _services(settings.config).get("redis")
        redis = open_client(redis_url) if redis_url else None
        if redis is not None:
            stack.push_async_callback(redis.aclose)
        yield Resources(
            settings=settings,
            cluster=cluster,
            passwords=await asyncio.to_thread(Passwords, settings.hash_workers),
            blobs=blobs,
            workers=workers,
            uploads=uploads,
            clock=clock,
            redis_url=redis_url,
            legacy_photos=None if redis is None else open_map(redis),
        )


def _services(config: Path) -> Mapping[str, str]:
    """Return `[services]` of a configuration file that the cluster has accepted already."""
    services: Mapping[str, str] = tomllib.loads(config.read_text("utf-8")).get("services", {})
    return services
