"""Removes bytes that no photo shows, and finds photos whose bytes are gone.

A process that dies between storing a picture and committing its photo leaves such bytes. The
store is listed first and the rows are read afterwards, so an upload under way can only look like an
orphan, never the other way round; and only what was an orphan in an earlier sweep too, a while
ago, is removed. Reads primaries, all of them or nothing. Called by `python -m app.photos sweep`.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sqlalchemy import delete, select

from app.photos.models import Photo, Upload
from app.photos.store import BlobStore
from app.scan import pages
from app.stories.models import Story
from shardkit import Cluster

__all__ = ["Swept", "sweep"]

UPLOADS_KEPT: Final = dt.timedelta(days=7)
"""For how long one can ask what has become of an upload."""

PAGE: Final = 1000
SMALLEST: Final = "150.jpg"


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep found.

    Attributes:
        stored: pictures in the store.
        shown: photos.
        orphans: pictures that no photo shows, and that are left for a later sweep.
        removed: those that were orphans for long enough.
        missing: keys of photos whose bytes are gone: restore them from a copy.
        uploads_forgotten: statuses of old uploads.
    """

    stored: int
    shown: int
    orphans: int
    removed: int
    missing: list[str]
    uploads_forgotten: int


async def sweep(
    cluster: Cluster,
    blobs: BlobStore,
    notes: Path,
    now: dt.datetime,
    *,
    grace: dt.timedelta,
    dry_run: bool = False,
) -> Swept:
    """Compare the store with the photos, and remove what has been an orphan for the grace.

    Args:
        cluster: whose photos.
        blobs: the store.
        notes: file that says since when which key is an orphan; made when missing.
        now: the time.
        grace: longer than any upload takes.
        dry_run: change nothing.

    Raises:
        EndpointUnavailableError: a primary does not answer; nothing was removed (retryable).
    """
    stored = {key async for key in blobs.iterate_keys()}
    shown = await asyncio.to_thread(_shown, cluster)
    since = _read(notes)
    orphans = {key: since.get(key, now) for key in stored - shown}
    old = [key for key, first in orphans.items() if now - first >= grace]
    # Photos made after the store was listed are no loss.
    missing = [key for key in sorted(shown - stored) if await blobs.get(key, SMALLEST) is None]
    forgotten = 0
    if not dry_run:
        for key in old:
            await blobs.delete(key)
            del orphans[key]
        _write(notes, orphans)
        forgotten = await asyncio.to_thread(_forget_uploads, cluster, now - UPLOADS_KEPT)
    removed = 0 if dry_run else len(old)
    return Swept(len(stored), len(shown), len(orphans), removed, missing, forgotten)


def _shown(cluster: Cluster) -> set[str]:
    return {
        key
        for owner in (Photo, Story)
        for shard in range(cluster.topology.n_logical_shards)
        for page in pages(cluster, shard, _keys_of(owner), [owner.id], PAGE)
        for _, key in page
    }


def _keys_of(owner: Any) -> Any:
    return select(owner.id, owner.blob_key)


def _forget_uploads(cluster: Cluster, before: dt.datetime) -> int:
    n = 0
    for shard in range(cluster.topology.n_logical_shards):
        with cluster.writer() as session:
            statement = delete(Upload).where(Upload.expires_at < before).returning(Upload.id)
            here = {"logical_shard": shard}
            n += len(session.execute(statement, bind_arguments=here).all())
            session.commit()
    return n


def _read(notes: Path) -> dict[str, dt.datetime]:
    try:
        found = json.loads(notes.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    return {key: dt.datetime.fromisoformat(since) for key, since in found.items()}


def _write(notes: Path, orphans: dict[str, dt.datetime]) -> None:
    notes.parent.mkdir(parents=True, exist_ok=True)
    draft = notes.with_suffix(".draft")
    draft.write_text(json.dumps({key: since.isoformat() for key, since in orphans.items()}))
    draft.replace(notes)
