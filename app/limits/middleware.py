"""Takes a token for every request before anything is read of it: plain ASGI."""

from __future__ import annotations

from typing import cast

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import BusyError, TooManyRequestsError
from app.limits.rates import group_of
from app.middleware import Respond
from app.resources import Resources

__all__ = ["RateLimit"]


class RateLimit:
    """Refuses requests of who asks too often, and tells everybody what is left.

    Args:
        app: the application inside.
        respond: how to refuse.
    """

    def __init__(self, app: ASGIApp, respond: Respond) -> None:
        self._app = app
        self._respond = respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection scope."""
        group = group_of(scope["method"], scope["path"]) if scope["type"] == "http" else None
        if group is None:
            await self._app(scope, receive, send)
            return
        resources = cast("Resources", scope["state"]["resources"])
        host, _ = scope.get("client") or ("", 0)
        try:
            told = await resources.limiter.admit(group, host)
        except (TooManyRequestsError, BusyError) as error:
            await self._respond(scope, error)(scope, receive, send)
            return

        async def telling(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in told.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, telling)
