"""Notifications over HTTP: the list, what is unread, and the stream."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Header, Request, Response
from fastapi.responses import StreamingResponse

from app.addresses import API
from app.deps import (
    Keyed,
    Notifications,
    ResourcesDep,
    SignedIn,
)
from app.ids import Id
from app.notifications.schemas import GroupOut, ReadIn, UnreadOut
from app.notifications.stream import events
from app.paging import Cursor, Limit, Page
from shardkit.errors import ShardkitError

__all__ = ["router"]

log = logging.getLogger("app")

router = APIRouter(prefix=f"{API}/me/notifications", tags=["notifications"])

_EXAMPLE = (
    "id: 42\nevent: notification\n"
    'data: {"seq":"42","kind":"like","actor":{"id":"1903344051200000","username":"ana",'
    '"display_name":"Ana"},"photo_id":"1903344051200001","comment_id":null,'
    '"created_at":"2026-11-21T11:00:00Z"}\n\n'
)


@router.get("")
async def page(
    viewer: SignedIn, notifications: Notifications, cursor: Cursor = None, limit: Limit = 30
) -> Page[GroupOut]:
    """Return what happened to one's photos and oneself, grouped, newest first."""
    return await notifications.page(viewer, cursor, limit)


@router.get("/unread")
async def unread(viewer: SignedIn, notifications: Notifications) -> UnreadOut:
    """Return how many notifications are unread."""
    return await notifications.unread(viewer)


@router.put("/read", dependencies=[Keyed])
async def read(given: ReadIn, viewer: SignedIn, notifications: Notifications) -> UnreadOut:
    """Mark everything up to a notification as read."""
    return await notifications.read(viewer, given.seq)


@router.get(
    "/stream",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "events as they come, for as long as the connection is open",
            "content": {"text/event-stream": {"example": _EXAMPLE}},
        }
    },
)
async def stream(
    *,
    request: Request,
    viewer: SignedIn,
    notifications: Notifications,
    resources: ResourcesDep,
    last_event_id: Annotated[
        Id | None,
        Header(description="`id` of the last event seen; leave out to hear of what comes from now"),
    ] = None,
) -> Response:
    """Tell of notifications as they come, by Server-Sent Events."""
    headers = {"x-accel-buffering": "no", "cache-control": "no-store"}
    if request.scope.get("is_head"):
        return Response(media_type="text/event-stream", headers=headers)

    async def chunks() -> AsyncIterator[str]:
        found = events(resources.hub, notifications, viewer, last_event_id)
        try:
            async for text in found:
                yield text
        except ShardkitError as error:  # the client comes back, and says where it was
            log.warning("a stream of notifications ends: %s", error)

    return StreamingResponse(chunks(), media_type="text/event-stream", headers=headers)
