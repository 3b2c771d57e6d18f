"""Carries what was written into inboxes from the relay to the servers, over Redis Pub/Sub.

Redis forgets a message nobody listens to, and that is allowed: inboxes have it, and the hub
looks there now and then (`app.notifications.hub`). So a Redis that is away costs seconds, and no
notification. A message says for whom it is, its number, and the text that streams send.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final, Protocol

import redis
import redis.asyncio
from redis.exceptions import RedisError

__all__ = ["Bus", "Message", "Publisher", "listen"]

log = logging.getLogger("app")

CHANNEL: Final = "app:notifications"
TIMEOUT: Final = 1.0
"""Seconds that a call of Redis may take."""


@dataclass(frozen=True, slots=True)
class Message:
    """A notification on its way.

    Attributes:
        user_id: for whom.
        seq: its number.
        text: the notification as JSON; of one line.
    """

    user_id: int
    seq: int
    text: str


class Publisher(Protocol):
    """Tells servers of what was committed."""

    def publish(self, message: Message) -> None:
        """Tell them; what cannot be told is not worth an error."""


class Bus:
    """A publisher over Redis.

    Args:
        url: of Redis; None publishes nothing.
    """

    def __init__(self, url: str | None) -> None:
        self._client = None
        if url is not None:
            self._client = redis.Redis.from_url(
                url, socket_timeout=TIMEOUT, socket_connect_timeout=TIMEOUT
            )

    def publish(self, message: Message) -> None:
        """Tell every server; see `Publisher`."""
        if self._client is None:
            return
        text = json.dumps([message.user_id, message.seq, message.text])
        try:
            self._client.publish(CHANNEL, text)
        except (RedisError, OSError) as error:
            log.warning("a notification was not published: %s", error)


async def listen(url: str) -> AsyncIterator[Message | None]:
    """Yield what is published from now on, until cancelled; first None, when it has begun.

    Raises:
        RedisError: Redis is gone; what is published meanwhile is missed.
    """
    client = redis.asyncio.Redis.from_url(url, socket_connect_timeout=TIMEOUT)
    try:
        async with client.pubsub() as channel:
            await channel.subscribe(CHANNEL)
            async for message in channel.listen():
                if message["type"] != "message":
                    yield None
                    continue
                user_id, seq, text = json.loads(message["data"])
                yield Message(user_id, seq, text)
    finally:
        await client.aclose()
