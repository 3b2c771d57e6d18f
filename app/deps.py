"""What endpoints ask for: services made for one request, and who is asking."""

from __future__ import annotations

import datetime as dt
from typing import Annotated, cast

from fastapi import Depends, Header, Request, Response

from app.accounts.service import AccountService, LogIn, SessionLimits, Viewer
from app.comments.service import CommentService
from app.database import Database
from app.errors import NotSignedInError
from app.feed.service import FeedService
from app.graph.service import GraphService
from app.notifications.service import NotificationService
from app.photos.service import PhotoService
from app.photos.uploads import UploadService
from app.resources import Resources
from app.saves.service import SaveService
from app.search.service import SearchService
from app.settings import Settings
from app.stories.service import StoryService
from app.tags.service import TagService
from shardkit.contrib.asgi import fresh_of

__all__ = [
    "Accounts",
    "Comments",
    "DatabaseDep",
    "Feed",
    "Graph",
    "Keyed",
    "MaybeViewer",
    "Notifications",
    "Photos",
    "Saves",
    "Search",
    "SignedIn",
    "Stories",
    "Tags",
    "Uploads",
    "begin_login",
    "end_login",
    "get_resources",
    "session_limits",
]


async def get_resources(request: Request) -> Resources:
    """Return what the process holds open."""
    return cast("Resources", request.state.resources)


async def get_database(request: Request) -> Database:
    """Return the client's database; the middleware hands its token back to the client."""
    resources = await get_resources(request)
    return Database(
        resources.cluster,
        fresh_of(request.scope),
        key=request.headers.get("idempotency-key") if request.method != "GET" else None,
        timeout=resources.settings.database_timeout,
    )


async def check_key(
    idempotency_key: Annotated[
        str | None,
        Header(
            min_length=1,
            max_length=255,
            description="a random text of your own; within a day, a repetition with the same one "
            "does nothing more and gets the answer of the first",
        ),
    ] = None,
) -> None:
    """Refuse an Idempotency-Key that cannot be one; `get_database` takes it from the request."""


Keyed = Depends(check_key)
"""Put on endpoints that change something."""

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
    return PhotoService(database, resources.blobs, resources.clock, resources.likes)


async def get_uploads(resources: ResourcesDep, database: DatabaseDep) -> UploadService:
    """Return the upload service."""
    return UploadService(
        database,
        resources.blobs,
        resources.workers,
        resources.uploads,
        clock=resources.clock,
        lifetime=resources.settings.upload_lifetime,
    )


async def get_graph(resources: ResourcesDep, database: DatabaseDep) -> GraphService:
    """Return the graph service."""
    return GraphService(database, resources.clock, resources.settings.max_followees)


async def get_feed(resources: ResourcesDep, database: DatabaseDep) -> FeedService:
    """Return the feed service."""
    return FeedService(
        database,
        resources.clock,
        resources.cursors,
        resources.ranked,
        max_followees=resources.settings.max_followees,
        timelines=resources.timelines,
    )


async def get_comments(resources: ResourcesDep, database: DatabaseDep) -> CommentService:
    """Return the comment service."""
    return CommentService(database, resources.clock)


async def get_stories(resources: ResourcesDep, database: DatabaseDep) -> StoryService:
    """Return the story service."""
    return StoryService(
        database,
        resources.blobs,
        resources.workers,
        resources.clock,
        resources.settings.max_followees,
    )


async def get_saves(resources: ResourcesDep, database: DatabaseDep) -> SaveService:
    """Return the service of saved photos."""
    return SaveService(database, resources.clock)


async def get_tags(database: DatabaseDep) -> TagService:
    """Return the service of tags."""
    return TagService(database)


async def get_notifications(database: DatabaseDep) -> NotificationService:
    """Return the notification service."""
    return NotificationService(database)


async def get_search(resources: ResourcesDep, database: DatabaseDep) -> SearchService:
    """Return the search service."""
    return SearchService(database, resources.search)


Accounts = Annotated[AccountService, Depends(get_accounts)]
Photos = Annotated[PhotoService, Depends(get_photos)]
Uploads = Annotated[UploadService, Depends(get_uploads)]
Graph = Annotated[GraphService, Depends(get_graph)]
Feed = Annotated[FeedService, Depends(get_feed)]
Comments = Annotated[CommentService, Depends(get_comments)]
Stories = Annotated[StoryService, Depends(get_stories)]
Saves = Annotated[SaveService, Depends(get_saves)]
Tags = Annotated[TagService, Depends(get_tags)]
Notifications = Annotated[NotificationService, Depends(get_notifications)]
Search = Annotated[SearchService, Depends(get_search)]


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
