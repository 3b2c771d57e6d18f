"""Hands events to Celery: a handler for the relay that sends a task for each.

    relay.on("photo.added")(to_celery(celery_app, "photos.resize", queue="images"))

The task gets the event as keyword arguments and its id, as text, as the task's id. Once the
broker has taken it, the event is delivered: Celery's own promises hold from there on, and a task
may run more than once, so it should note its effect with `session.once`. Order ends here.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from typing import Any, Protocol

from shardkit.outbox import Event

__all__ = ["event_of", "to_celery"]


class _App(Protocol):
    def send_task(self, name: str, **options: Any) -> Any:
        """Send a task by name; Celery's."""


def to_celery(app: _App, task: str, **options: Any) -> Callable[[Event], None]:
    """Return a handler that sends each event to a task.

    Args:
        app: the Celery application.
        task: name of the task.
        **options: as for Celery's `send_task`, such as `queue`.
    """
    # Without a retry of Celery's own: a broker that is down is the relay's to wait for.
    chosen = {"retry": False, **options}

    def send(event: Event) -> None:
        app.send_task(
            task,
            kwargs={
                "id": str(event.id),
                "topic": event.topic,
                "key": event.key,
                "payload": event.payload,
                "created": event.created.isoformat(),
                "logical_shard": event.logical_shard,
            },
            task_id=f"shardkit-{event.id}",
            **chosen,
        )

    return send


def event_of(arguments: dict[str, Any]) -> Event:
    """Return the event of a task's keyword arguments, for `session.once`."""
    return Event(
        id=int(arguments["id"]),
        topic=arguments["topic"],
        key=arguments["key"],
        payload=arguments["payload"],
        created=dt.datetime.fromisoformat(arguments["created"]),
        attempts=0,
        logical_shard=arguments["logical_shard"],
    )
