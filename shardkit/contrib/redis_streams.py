"""Hands events to Redis Streams: a handler for the relay that adds an entry for each.

    relay.on("photo.added", batch=200)(to_stream(redis_client, "photos"))

Entries of one logical shard are added in the order of the events. One may be added twice, when a
relay dies in between, so consumers go by the field `id`: `session.once` does. Needs no extra of
its own: any client with `pipeline`, `xadd` and `execute` will do, such as redis-py.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable, Mapping
from typing import Any

from shardkit.outbox import Event

__all__ = ["event_of", "to_stream"]


def to_stream(
    client: Any, stream: str, *, max_entries: int | None = 100_000
) -> Callable[[Event | list[Event]], None]:
    """Return a handler that adds events to a stream, all of a call in one round trip.

    Args:
        client: of Redis.
        stream: its key.
        max_entries: about how many entries are kept; None keeps all.
    """

    def add(given: Event | list[Event]) -> None:
        # A transaction: all of them or none, and in this order.
        pipeline = client.pipeline(transaction=True)
        for event in given if isinstance(given, list) else [given]:
            fields = {
                "id": str(event.id),
                "topic": event.topic,
                "key": event.key or "",
                "payload": json.dumps(event.payload, separators=(",", ":")),
                "created": event.created.isoformat(),
                "logical_shard": str(event.logical_shard),
            }
            if event.key is None:
                del fields["key"]
            pipeline.xadd(stream, fields, maxlen=max_entries, approximate=True)
        pipeline.execute()

    return add


def event_of(fields: Mapping[Any, Any]) -> Event:
    """Return the event of a stream's entry, for `session.once`.

    Args:
        fields: of the entry, as text or as bytes.
    """
    text = {_text(name): _text(value) for name, value in fields.items()}
    return Event(
        id=int(text["id"]),
        topic=text["topic"],
        key=text.get("key"),
        payload=json.loads(text["payload"]),
        created=dt.datetime.fromisoformat(text["created"]),
        attempts=0,
        logical_shard=int(text["logical_shard"]),
    )


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
