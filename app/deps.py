"""What endpoints ask for: services made for one request, and who is asking."""

from __future__ import annotations

import datetime as dt
from typing import Annotated, cast

from fastapi import Depends, Request, Response

from app.accounts.service import AccountService, LogIn, SessionLimits, Viewer
from app.database import Database
from app.errors import NotSignedInError
from app.feed.service import FeedService
from app.graph.service import GraphService
from app.photos.service import PhotoService
from app.resources import Resources
from app.settings import Settings

__all__ = [
    "TOKEN_HEADER",
    "Accounts",
    "Feed",
    "Graph",
    "MaybeViewer",
    "Photos",
    "SignedIn",
    "begin_login",
    "end_login",
    "get_resources",
    "session_limits",
]

TOKEN_HEADER = "shardkit-token"  # noqa: S105 - the name, not a token
"""Cookie and header that carry what a client's readers must have seen."""

MAX_TOKEN_BYTES = 1024


async def get_resources(request: Request) -> Resources:
    """Return what the process holds open."""
    return cast("Resources", request.state.resources)


async def get_database(request: Request) -> Database:
    """Return the client's database; the middleware hands its token back to the client."""
    resources = await get_resources(request)
    token = request.headers.get(TOKEN_HEADER) or request.cookies.get(TOKEN_HEADER)
    if token is not None and not (token.isascii() and len(token) <= MAX_TOKEN_BYTES):
        token = None
    database = Database(resources.cluster, token or None)
    request.state.database = database
    return database


ResourcesDep = Annotated[Resources, Depends(get_resources)]
DatabaseDep = Annotated[Database, Depends(get_database)]


async def get_accounts(resources: ResourcesDep, database: DatabaseDep) -> AccountService:
    """Return the account service."""
    return AccountService(
        database,
        resources.passwords,
        resources.clock,
        session_limits(resources.settings),
    )


def session_limits(settings: Settings) -> SessionLimits:
    """Return when log-ins end."""
    return SessionLimits(
        idle=dt.timedelta(seconds=settings.session_idle),
        absolute=dt.timedelta(seconds=settings.session_absolute),
    )


async def get_photos(resources: ResourcesDep, database: DatabaseDep) -> PhotoService:
    """Return the photo service."""
    return PhotoService(database, resources.blobs, resources.workers, resources.clock)


async def get_graph(resources: ResourcesDep, database: DatabaseDep) -> GraphService:
    """Return the graph service."""
    return GraphService(database, resources.clock, resources.settings.max_followees)


async def get_feed(resources: ResourcesDep, database: DatabaseDep) -> FeedService:
    """Return the feed service."""
    return FeedService(database, resources.settings.max_followees)


Accounts = Annotated[AccountService, Depends(get_accounts)]
Photos = Annotated[PhotoService, Depends(get_photos)]
Graph = Annotated[GraphService, Depends(get_graph)]
Feed = Annotated[FeedService, Depends(get_feed)]


async def get_maybe_viewer(request: Request, accounts: Accounts) -> Viewer | None:
    """Return who is asking, or None; a bearer header counts before the cookie."""
    scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
    token = bearer.strip() if scheme.lower() == "bearer" else request.cookies.get(_cookie(request))
    return await accounts.viewer(token)


MaybeViewer = Annotated[Viewer | None, Depends(get_maybe_viewer)]


async def get_viewer(viewer: MaybeViewer) -> Viewer:
    """Return who is asking.

    Raises:
        NotSignedInError: nobody we know.
    """
    if viewer is None:
        raise NotSignedInError
    return viewer


SignedIn = Annotated[Viewer, Depends(get_viewer)]


def begin_login(request: Request, response: Response, login: LogIn) -> None:
    """Give the browser the cookie of a log-in."""
    response.set_cookie(
        _cookie(request),
        login.token,
        max_age=int(request.state.resources.settings.session_absolute),
        httponly=True,
        secure=_is_secure(request),
        samesite="lax",
        path="/",
    )


def end_login(request: Request, response: Response) -> None:
    """Take the cookie of a log-in back."""
    response.delete_cookie(
        _cookie(request), httponly=True, secure=_is_secure(request), samesite="lax", path="/"
    )


def _is_secure(request: Request) -> bool:
    return request.url.scheme == "https"


def _cookie(request: Request) -> str:
    """Name the cookie; over TLS browsers then refuse it from other hosts and plain HTTP."""
    return "__Host-session" if _is_secure(request) else "session"
