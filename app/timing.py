"""Where the time of a request went, told in `Server-Timing`: cache, databases, templates, the rest.

Counted until the head of the answer leaves; of a streamed page that is before most of its work.
Source: W3C Server Timing, 2023; durations are milliseconds.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shardkit import CacheRead

__all__ = ["ServerTiming", "heard", "stage"]

SESSIONS: Final = "sessions"
CACHE: Final = "cache"
RENDER: Final = "render"

_current: ContextVar[defaultdict[str, float] | None] = ContextVar("stages", default=None)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Count the time of a `with` block to a stage of the present request, if there is one."""
    spent = _current.get()
    if spent is None:
        yield
        return
    started = time.perf_counter()
    try:
        yield
    finally:
        spent[name] += time.perf_counter() - started


def heard(event: object) -> None:
    """Count what the cache took; a listener of the cluster."""
    if isinstance(event, CacheRead) and (spent := _current.get()) is not None:
        spent[CACHE] += event.seconds


class ServerTiming:
    """Tells clients where the time went.

    Args:
        app: the application inside.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection scope."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        spent: defaultdict[str, float] = defaultdict(float)
        token = _current.set(spent)
        started = time.perf_counter()

        async def telling(message: Message) -> None:
            if message["type"] == "http.response.start":
                total = time.perf_counter() - started
                MutableHeaders(scope=message)["server-timing"] = _told(spent, total)
            await send(message)

        try:
            await self._app(scope, receive, telling)
        finally:
            _current.reset(token)


def _told(spent: defaultdict[str, float], total: float) -> str:
    """Write the stages; sessions wait for the cache too, so that is taken from them."""
    cache, render = spent[CACHE], spent[RENDER]
    database = max(0.0, spent[SESSIONS] - cache)
    route = max(0.0, total - database - cache - render)
    stages = {"route": route, "db": database, "cache": cache, "render": render, "total": total}
    return ", ".join(f"{name};dur={1000 * seconds:.1f}" for name, seconds in stages.items())
