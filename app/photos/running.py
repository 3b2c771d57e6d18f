"""Uploads that are worked on in this process, also when their client was answered already.

Held by the process, not by a request: a client that leaves ends nothing. When the process stops,
they have a moment to finish; what is left then shows as interrupted once it has expired.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from app.errors import AppError

__all__ = ["RunningUploads", "Ticket"]

T = TypeVar("T")

log = logging.getLogger("app")

STOP_TIMEOUT: Final = 10.0
"""Seconds that uploads have to finish when the process stops."""


@dataclass(slots=True)
class Ticket:
    """What an upload under way and the request that waits for it tell each other.

    Attributes:
        lock: held while the photo is committed, and while its status is made; not both.
        upload_id: the status, if the request has made one.
        is_over: whether it is too late to make one: the photo is there, or refused.
    """

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    upload_id: int | None = None
    is_over: bool = False


class RunningUploads:
    """The tasks of one process."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Work on an upload until it is done, whoever waits for it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def close(self) -> None:
        """Wait for what is under way, for a while; idempotent."""
        if self._tasks:
            _, left = await asyncio.wait(self._tasks, timeout=STOP_TIMEOUT)
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, AppError):
            log.error("an upload failed: %r", error)
