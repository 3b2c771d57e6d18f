"""Carries a client's token over its requests, so that it sees its own writes and never goes back.

    app.add_middleware(FreshReads, keys=lambda scope: cluster.token_keys)

    fresh = fresh_of(request.scope)
    async with cluster.reader(after=fresh.token) as session: ...
    async with cluster.writer() as session:
        ...
        fresh.saw(session.token)

Plain ASGI, for any framework. Browsers get the token as a signed cookie, programs as the header
`X-Shardkit-Token`, which they send back. What comes back and was not signed by us reads the
primaries: no error, and nothing stale.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from http.cookies import SimpleCookie
from typing import Any, Final

from shardkit import tokens
from shardkit.errors import ConfigurationError
from shardkit.signatures import Signer

__all__ = ["COOKIE", "HEADER", "FreshReads", "Freshness", "fresh_of"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Keys = Sequence[str] | Callable[[Scope], Sequence[str]]

COOKIE: Final = "shardkit-token"
HEADER: Final = "x-shardkit-token"

_LOG: Final = logging.getLogger(__name__)
_KEY: Final = "shardkit_fresh_reads"
_LONGEST: Final = 16_384
"""Bytes of a cookie header that is looked into."""


class Freshness:
    """What the client of one request must see.

    Attributes:
        token: for `reader(after=…)`; None while the client has seen nothing lately.
        has_changed: whether the client is to be told.

    Args:
        token: what it sent, or None.
    """

    def __init__(self, token: str | None) -> None:
        self.token = token
        self.has_changed = False

    def saw(self, token: str) -> None:
        """Add what a session of this request has seen or written.

        Args:
            token: `session.token`; an empty text adds nothing.
        """
        merged = tokens.merge(self.token, token)
        if token and (merged != self.token or merged == tokens.ASK_PRIMARIES):
            self.token = merged
            self.has_changed = True


class FreshReads:
    """The middleware.

    Args:
        app: the application inside.
        keys: secrets of at least 16 bytes, the newest first, the same in all processes; or what
            returns them, asked at the first request. Without any, a random one is made, and only
            this process knows its tokens; others read the primaries for their clients.
        ttl: seconds that a browser keeps the cookie; replicas are past it by then.

    Raises:
        ConfigurationError: a key is too short.
    """

    def __init__(self, app: App, *, keys: Keys = (), ttl: float = 60.0) -> None:
        self._app = app
        self._ttl = ttl
        self._keys = keys
        self._signer = None if callable(keys) else _signer(keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection scope."""
        if scope["type"] not in {"http", "websocket"}:
            await self._app(scope, receive, send)
            return
        signer = self._signer
        if signer is None:
            assert callable(self._keys)
            signer = self._signer = _signer(self._keys(scope))
        fresh = Freshness(_received(signer, scope["headers"]))
        scope.setdefault("state", {})[_KEY] = fresh

        async def with_token(message: Message) -> None:
            if message["type"] == "http.response.start" and fresh.has_changed:
                signed = signer.sign(fresh.token or tokens.NOTHING)
                message["headers"] = [
                    *message.get("headers", ()),
                    (HEADER.encode(), signed.encode()),
                    (b"set-cookie", self._cookie(scope, signed).encode()),
                ]
            await send(message)

        await self._app(scope, receive, with_token)

    def _cookie(self, scope: Scope, signed: str) -> str:
        cookie: SimpleCookie = SimpleCookie({COOKIE: signed})
        morsel = cookie[COOKIE]
        morsel["max-age"] = str(int(self._ttl))
        morsel["path"] = "/"
        morsel["httponly"] = True
        morsel["samesite"] = "lax"
        if scope.get("scheme") in {"https", "wss"}:
            morsel["secure"] = True
        return morsel.OutputString()


def fresh_of(scope: Scope) -> Freshness:
    """Return what the client of a request must see; `FreshReads` put it there.

    Args:
        scope: of the request.

    Raises:
        ConfigurationError: the middleware is not installed.
    """
    found: Freshness | None = scope.get("state", {}).get(_KEY)
    if found is None:
        raise ConfigurationError(
            "no token was carried to this request", hint="add FreshReads to the middleware"
        )
    return found


def _signer(keys: Sequence[str]) -> Signer:
    if not keys:
        _LOG.info("no token keys: tokens are known to this process only")
    return Signer(keys or (secrets.token_bytes(32),))


def _received(signer: Signer, headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """Return the token of a request; what is not ours asks the primaries."""
    sent = []
    for name, value in headers:
        if name == HEADER.encode():
            sent.append(value.decode("latin-1"))
        elif name == b"cookie" and COOKIE.encode() in value:
            sent.append(_value(value))
    if not sent:
        return None
    # Both may come; the client has seen what both say.
    opened = (signer.open(text) for text in sent)
    return tokens.merge(*(tokens.ASK_PRIMARIES if text is None else text for text in opened))


def _value(header: bytes) -> str:
    """Return the cookie's value; an empty text, which nobody signed, where there is none."""
    if len(header) > _LONGEST:
        return ""
    for part in header.decode("latin-1").split(";"):
        name, _, value = part.strip().partition("=")
        if name == COOKIE:
            return value.strip('"')
    return ""
