"""One client's stream of notifications: Server-Sent Events, resumed where the client says.

Source: the EventSource chapter of the HTML standard. Each event has the number of the
notification as its id, which a client sends back as `Last-Event-ID`; what came since is read from
the inbox. A client that says nothing hears of what comes from now on.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final

from app.accounts.service import Viewer
from app.notifications.hub import Hub
from app.notifications.service import NotificationService

__all__ = ["HEARTBEAT", "events"]

HEARTBEAT: Final = 15.0
"""Seconds of silence after which a comment keeps proxies from closing."""

RETRY: Final = "retry: 2000\n\n"
_PAGE: Final = 100


async def events(
    hub: Hub,
    notifications: NotificationService,
    viewer: Viewer,
    last: int | None,
    *,
    heartbeat: float = HEARTBEAT,
) -> AsyncIterator[str]:
    """Yield a client's events until it leaves, its log-in ends or the server stops.

    Args:
        hub: tells what comes, and ends it with its log-in.
        notifications: the inbox.
        viewer: whose.
        last: the number the client has seen last; None for what there is now.
        heartbeat: seconds of silence after which there is a sign of life.
    """
    user_id = viewer.id
    with hub.subscribed(
        user_id, viewer.login_id
    ) as subscription:  # before the inbox is read: nothing in between
        newest = await notifications.newest(user_id)
        # A number that was never given is no place: the client hears of what comes.
        subscription.seq = newest if last is None or last > newest else last
        if subscription.seq < newest:
            subscription.fall_behind()
        yield RETRY
        while not subscription.is_closed:
            while subscription.is_behind:
                subscription.is_behind = False
                news = await notifications.since(user_id, subscription.seq, _PAGE)
                for item in news.items:
                    yield event_text(item.seq, item.model_dump_json())
                subscription.seq = news.last
                if not news.is_all:
                    subscription.fall_behind()
            is_missing = False
            for message in subscription.taken():
                if message.seq == subscription.seq + 1:
                    subscription.seq = message.seq
                    yield event_text(message.seq, message.text)
                elif message.seq > subscription.seq:  # something is missing, or was withdrawn
                    is_missing = True
                    break
            if is_missing:
                subscription.fall_behind()
            elif not await subscription.wait(heartbeat):
                yield ": still here\n\n"


def event_text(seq: int, text: str) -> str:
    """Return an event as it goes over the line."""
    return f"id: {seq}\nevent: notification\ndata: {text}\n\n"
