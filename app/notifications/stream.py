"""One client's stream of notifications: Server-Sent Events, resumed where the client says.

Source: the EventSource chapter of the HTML standard. Each event has the number of the
notification as its id, which a client sends back as `Last-Event-ID`; what came since is read from
the inbox. A client that says nothing hears of what comes from now on.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final

from app.notifications.hub import Hub
from app.notifications.service import NotificationService

__all__ = ["HEARTBEAT", "events"]

HEARTBEAT: Final = 15.0
"""Seconds between two comments that keep proxies from closing, and two checks of the log-in."""

RETRY: Final = "retry: 2000\n\n"
_PAGE: Final = 100


async def events(
    hub: Hub,
    notifications: NotificationService,
    user_id: int,
    last: int | None,
    *,
    is_welcome: Callable[[], Awaitable[bool]],
    heartbeat: float = HEARTBEAT,
    clock: Callable[[], float] = time.monotonic,
) -> AsyncIterator[str]:
    """Yield a client's events until it leaves, its log-in ends or the server stops.

    Args:
        hub: tells what comes.
        notifications: the inbox.
        user_id: whose.
        last: the number the client has seen last; None for what there is now.
        is_welcome: whether the log-in is still good.
        heartbeat: seconds between two looks at it, and two signs of life.
        clock: monotonic time in seconds.
    """
    with hub.subscribed(user_id) as subscription:  # before the inbox is read: nothing in between
        newest = await notifications.newest(user_id)
        # A number that was never given is no place: the client hears of what comes.
        subscription.seq = newest if last is None or last > newest else last
        if subscription.seq < newest:
            subscription.fall_behind()
        yield RETRY
        checked = clock()
        while not subscription.is_closed:
            while subscription.is_behind:
                subscription.is_behind = False
                news = await notifications.since(user_id, subscription.seq, _PAGE)
                for item in news.items:
                    yield event_text(item.seq, item.model_dump_json())
                subscription.seq = news.last
                if not news.is_all:
                    subscription.fall_behind()
            for message in subscription.taken():
                if message.seq == subscription.seq + 1:
                    subscription.seq = message.seq
                    yield event_text(message.seq, message.text)
                elif message.seq > subscription.seq:  # something is missing, or was withdrawn
                    subscription.fall_behind()
            if not subscription.is_behind:
                await subscription.wait(max(0.0, checked + heartbeat - clock()))
            if clock() >= checked + heartbeat:
                checked = clock()
                if not await is_welcome():
                    return
                yield ": still here\n\n"


def event_text(seq: int, text: str) -> str:
    """Return an event as it goes over the line."""
    return f"id: {seq}\nevent: notification\ndata: {text}\n\n"
