"""Which pages of other sites may use the API, and how: only with a bearer, never with cookies.

A browser asks before such a page sends anything that is not plain (a preflight), and hides
answers that do not name the page's origin. Origins are listed in the settings; none is by default.
Cookies are never allowed over sites (`Access-Control-Allow-Credentials` is not sent), so a log-in
of this site's pages is of no use to another's: it needs a token of its own. Source: Fetch
standard, section 3.2, "CORS protocol".
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.addresses import API

__all__ = ["CrossOrigin", "is_listed"]

METHODS: Final = "GET, HEAD, POST, PUT, PATCH, DELETE"
SENT: Final = (
    "authorization, content-type, idempotency-key, prefer, x-shardkit-token, last-event-id"
)
SHOWN: Final = (
    "etag, location, ratelimit, ratelimit-policy, retry-after, server-timing, x-request-id, "
    "x-shardkit-token"
)
KEPT: Final = 600
"""Seconds for which a browser remembers what it was allowed."""


def is_listed(headers: Headers, origins: Collection[str]) -> bool:
    """Tell whether a request comes from a listed site's page, and brings no cookies."""
    return headers.get("origin") in origins and "cookie" not in headers


class CrossOrigin:
    """Answers preflights, and lets pages of listed sites see answers of the API.

    Args:
        app: the application inside.
        origins: such as `https://photos.example`; compared as they are.
    """

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        self._app = app
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection scope."""
        is_api = scope["type"] == "http" and scope["path"].startswith(f"{API}/")
        if not is_api or not self._origins:
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin", "")
        allowed = {"vary": "Origin"}
        if origin in self._origins:
            allowed["access-control-allow-origin"] = origin
        if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            if origin in self._origins:
                allowed["access-control-allow-methods"] = METHODS
                allowed["access-control-allow-headers"] = SENT
                allowed["access-control-max-age"] = str(KEPT)
            await Response(status_code=204, headers=allowed)(scope, receive, send)
            return
        if origin in self._origins:
            allowed["access-control-expose-headers"] = SHOWN

        async def telling(message: Message) -> None:
            if message["type"] == "http.response.start":
                told = MutableHeaders(scope=message)
                told.add_vary_header(allowed["vary"])
                told.update({name: value for name, value in allowed.items() if name != "vary"})
            await send(message)

        await self._app(scope, receive, telling)
