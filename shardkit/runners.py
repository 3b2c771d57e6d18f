"""What runs beside the sessions of a cluster: a thread with a loop of its own, or a task.

`Background` is for clusters of threads, `AsyncBackground` for those of an event loop. Both run one
coroutine function from the first `start` on, until `close`. Used by `shardkit.probes` and
`shardkit.mapwatch`.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress

__all__ = ["AsyncBackground", "Background"]

Work = Callable[[], Awaitable[None]]


class Background:
    """One daemon thread with an event loop. Thread-safe; a fork starts anew.

    Args:
        work: runs until it is cancelled.
        name: of the thread.
    """

    def __init__(self, work: Work, name: str) -> None:
        self._work = work
        self._name = name
        self._lock = threading.Lock()
        self._process: int | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False

    @property
    def is_closed(self) -> bool:
        """Whether it has ended for good."""
        return self._is_closed

    def start(self) -> None:
        """Start, unless it has been started in this process."""
        if self._process == os.getpid() or self._is_closed:
            return
        with self._lock:
            if self._process == os.getpid():
                return
            started = threading.Event()
            self._thread = threading.Thread(
                target=self._run, args=(started,), name=self._name, daemon=True
            )
            self._thread.start()
            started.wait()
            self._process = os.getpid()

    def forget(self) -> None:
        """Leave the parent's thread and sockets to the parent, in the child of a fork."""
        self._lock = threading.Lock()
        self._process = None

    def call(self, function: Callable[[], object]) -> None:
        """Run a function in the loop, soon; nothing happens when it has not been started."""
        if self._process == os.getpid() and self._loop is not None:
            with suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(function)

    def close(self) -> None:
        """Stop and wait for the end of it."""
        with self._lock:
            self._is_closed = True
            if self._process != os.getpid() or self._loop is None or self._thread is None:
                return
            self._process = None
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._cancel)
        self._thread.join()

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _run(self, started: threading.Event) -> None:
        async def work() -> None:
            self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
            started.set()
            await self._work()

        with suppress(asyncio.CancelledError):
            asyncio.run(work())


class AsyncBackground:
    """One task of the running event loop.

    Args:
        work: runs until it is cancelled.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start, unless it has been started."""
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())

    def forget(self) -> None:
        """Leave the parent's task to the parent, in the child of a fork."""
        self._task = None

    async def close(self) -> None:
        """Stop and wait for the end of it."""
        task, self._task = self._task, None
        if task is not None and not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _run(self) -> None:
        await self._work()
