"""Removes the bytes of deleted photos when whoever deleted them could not.

Handler of the relay, see `app.workers`: the event was committed with the deletion. Mostly the
bytes are gone already, since the process that deletes a photo removes them at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from app.photos.opening import open_blobs
from app.settings import Settings
from shardkit.outbox import Event

__all__ = ["remove", "remove_keys"]


def remove(settings: Settings, events: Sequence[Event]) -> None:
    """Remove the bytes of the photos that events name.

    Raises:
        OSError: the store does not answer; the relay tries again.
    """
    remove_keys(settings, [event.payload["blob_key"] for event in events])


def remove_keys(settings: Settings, keys: Sequence[str]) -> None:
    """Remove pictures by their keys; those that are gone already are no error.

    Raises:
        OSError: the store does not answer (retryable).
    """

    async def run() -> None:
        blobs = open_blobs(settings)
        try:
            for key in keys:
                await blobs.delete(key)
        finally:
            await blobs.close()

    asyncio.run(run())
