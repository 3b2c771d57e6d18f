"""What happens to every request, as plain ASGI so that responses can be streamed.

From the outside in: `HeadAsGet` spares every route a HEAD; `RequestScope` gives each request an
id, counts it and turns what nobody caught into a bare 500; `SecurityHeaders`; `BodyLimit` ends
requests that are too large or too slow; `OriginCheck` refuses writes from other sites' pages;
`ServerTiming`, `CrossOrigin` and `RateLimit` have modules of their own;
`FreshReads` hands the token of a write back to the client. `main.create_app` stacks them.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Collection, Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import (
    AppError,
    BodyTooLargeError,
    CrossOriginError,
    InvalidInputError,
    SlowBodyError,
)
from app.metrics import Metrics
from app.origins import is_listed

__all__ = [
    "BodyLimit",
    "HeadAsGet",
    "OriginCheck",
    "RequestScope",
    "Respond",
    "SecurityHeaders",
]

log = logging.getLogger("app")

Respond = Callable[[Scope, Exception], Response]
"""Makes the response for an exception: a problem document, or a page for people."""

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})

CLIENT_LEFT = 499
"""Status counted when the client went away before an answer; the number nginx logs."""

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)

HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",  # `no-referrer` would turn our own Origin into `null`
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
"""Sent with every response that does not set its own."""


class RequestScope:
    """Names, counts and, as the last resort, answers a request.

    Args:
        app: the application inside.
        metrics: where to count.
        respond: how to answer an exception nobody caught.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, respond: Respond) -> None:
        self._app = app
        self._metrics = metrics
        self._respond = respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection scope."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id
        status = CLIENT_LEFT
        started = time.perf_counter()

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        self._metrics.in_flight.inc()
        try:
            await self._app(scope, receive, tagged)
        except Exception as error:
            log.exception("request %s failed", request_id)
            if status != CLIENT_LEFT:
                raise  # too late for a status: the server cuts the connection
            await self._respond(scope, error)(scope, receive, tagged)
        finally:
            self._metrics.in_flight.dec()
            route = getattr(scope.get("route"), "path", None) or "unmatched"
            self._metrics.observe(scope["method"], route, status, time.perf_counter() - started)


class HeadAsGet:
    """Answers HEAD as GET; the server leaves the body out.

    Args:
        app: the application inside.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection scope."""
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET", "is_head": True}  # for what would never end
        await self._app(scope, receive, send)


class SecurityHeaders:
    """Adds the headers that keep browsers careful.

    Args:
        app: the application inside.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection scope."""

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, guarded if scope["type"] == "http" else send)


class BodyLimit:
    """Ends requests whose body is too large or takes too long.

    What is over the limit is read and thrown away for a while, so that a browser gets to see
    the reason instead of a cut connection.

    Args:
        app: the application inside.
        default: bytes allowed.
        paths: bytes allowed by path, where more is.
        timeout: seconds for the whole body, counted from its first read.
        respond: how to refuse.
    """

    PATIENCE = 4
    """How many times the limit is read and thrown away before the connection is cut."""

    def __init__(
        self,
        app: ASGIApp,
        default: int,
        paths: Mapping[str, int],
        timeout: float,
        respond: Respond,
    ) -> None:
        self._app = app
        self._default = default
        self._paths = paths
        self._timeout = timeout
        self._respond = respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection scope."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _Body(receive, self._paths.get(scope["path"], self._default), self._timeout)
        headers = Headers(scope=scope)
        announced = headers.get("content-length", "")
        if announced and "transfer-encoding" in headers:
            # Source: RFC 9112, section 6.1: a proxy that goes by the length sees other requests
            # on this line than we do, so none that follows is believed.
            refused: AppError = InvalidInputError("content-length", "Give no length with chunks.")
            response = self._respond(scope, refused)
            response.headers["connection"] = "close"
            await response(scope, receive, send)
            return
        if announced.isdigit() and int(announced) > body.limit:
            await body.discard()
            refused = BodyTooLargeError(body.reason)
            await self._respond(scope, refused)(scope, receive, send)
            return
        await self._app(scope, body.receive, send)


class _Body:
    """The body of one request, counted while it is read."""

    def __init__(
        self,
        receive: Receive,
        limit: int,
        timeout: float,
    ) -> None:
        self.limit = limit
        self.reason = f"The request is larger than the {_size(limit)} allowed here."
        self._receive = receive
        self._timeout = timeout
        self._deadline: float | None = None
        self._n_bytes = 0
        self._is_complete = False

    async def receive(self) -> Message:
        """Return the next message; a limit passed is raised as an error."""
        if self._is_complete:
            return await self._receive()
        message = await self._next()
        if self._n_bytes > self.limit:
            await self.discard()
            raise BodyTooLargeError(self.reason)
        return message

    async def discard(self) -> None:
        """Read on without keeping anything, within reason."""
        try:
            while not self._is_complete and self._n_bytes <= self.limit * BodyLimit.PATIENCE:
                await self._next()
        except SlowBodyError:
            return

    async def _next(self) -> Message:
        loop = asyncio.get_running_loop()
        if self._deadline is None:
            self._deadline = loop.time() + self._timeout
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise SlowBodyError from None
        self._n_bytes += len(message.get("body", b""))
        self._is_complete = not message.get("more_body", False)
        return message


class OriginCheck:
    """Refuses writes that a page of another site makes a browser send.

    Browsers say where a write comes from in `Origin` or `Sec-Fetch-Site`; both cannot be set by
    a page. A request with neither does not come from a browser's page. The cookies' `SameSite`
    is the second line.

    Args:
        app: the application inside.
        respond: how to refuse.
        origins: sites whose pages may write without cookies, see `app.origins`.
    """

    def __init__(self, app: ASGIApp, respond: Respond, origins: Collection[str] = ()) -> None:
        self._app = app
        self._respond = respond
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection scope."""
        if scope["type"] == "http" and scope["method"] not in SAFE_METHODS:
            headers = Headers(scope=scope)
            if not (_is_own(headers) or is_listed(headers, self._origins)):
                await self._respond(scope, CrossOriginError())(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _is_own(headers: Headers) -> bool:
    origin = headers.get("origin")
    if origin is None:
        return headers.get("sec-fetch-site", "none") in {"none", "same-origin"}
    try:
        netloc = urlsplit(origin).netloc
    except ValueError:
        return False
    return bool(netloc) and netloc.lower() == headers.get("host", "").lower()


def _size(n_bytes: int) -> str:
    for unit, factor in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if n_bytes >= factor:
            return f"{n_bytes / factor:.0f} {unit}"
    return f"{n_bytes} bytes"
