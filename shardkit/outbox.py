"""Events as handlers are given them, and when a failed one is tried again.

What `shardkit.relay` delivers and handlers work with. Writers emit with `session.emit`, see
`shardkit.emitting`. Decides; never talks to a database but through a session it is given.
Source: docs/outbox.md.
"""

from __future__ import annotations

import datetime as dt
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, cast

__all__ = ["Backoff", "Event", "once"]

P = ParamSpec("P")


@dataclass(frozen=True, slots=True)
class Event:
    """An event as a handler is given it.

    Attributes:
        id: what tells it from every other event, for ever, also when it is delivered again.
        topic: what it was emitted for.
        key: events of one key and logical shard come in order of commit; None for no order.
        payload: what was emitted.
        created: when it was stored, by the clock of its database.
        attempts: how often its handler failed before.
        logical_shard: whose outbox it was in.
    """

    id: int
    topic: str
    key: str | None
    payload: Any
    created: dt.datetime
    attempts: int
    logical_shard: int


@dataclass(frozen=True, slots=True)
class Backoff:
    """When a failed event is tried again, and when it is given up.

    Half of each pause is fixed and half is chance, so that events that failed together do not
    come back together. Source: Brooker, "Exponential Backoff And Jitter", AWS, 2015 (equal jitter).

    Attributes:
        first: seconds before the second attempt; each further pause is twice as long.
        longest: seconds no pause exceeds.
        attempts: after so many failures an event is a dead letter.
    """

    first: float = 1.0
    longest: float = 300.0
    attempts: int = 10

    def pause(self, failures: int, chance: float) -> float | None:
        """Return seconds until the next attempt; None when there is none.

        Args:
            failures: attempts that failed, from 1.
            chance: from 0 to 1.
        """
        if failures >= self.attempts:
            return None
        whole = min(self.first * 2.0 ** min(failures - 1, 60), self.longest)
        return whole * (1 + chance) / 2


def once(
    writer: Callable[[], Any], *, near: Callable[[Any], Any], consumer: str = ""
) -> Callable[[Callable[Concatenate[Any, Event, P], None]], Callable[Concatenate[Event, P], None]]:
    """Make a handler whose effect happens exactly once, however often it is called.

    The handler is given a session and the event, writes its effect, and leaves COMMIT to this
    decorator, which notes the event in the same transaction and skips one that is noted already.

    Args:
        writer: makes the session, such as `cluster.writer`.
        near: function of the event; returns an object or id on whose logical shard the effect is.
        consumer: tells apart several effects of one event.

    Example:
        >>> @relay.on("follow.added")  # doctest: +SKIP
        ... @once(cluster.writer, near=lambda event: event.payload["followee"])
        ... def add_inverse(session, event):
        ...     session.add(Follower(**event.payload))
    """

    def decorate(
        handler: Callable[Concatenate[Any, Event, P], None],
    ) -> Callable[Concatenate[Event, P], None]:
        @functools.wraps(handler)
        def run(event: Event, *args: P.args, **options: P.kwargs) -> None:
            with writer() as session:
                if session.once(event, near=near(event), consumer=consumer):
                    handler(session, event, *args, **options)
                    session.commit()

        return cast("Callable[Concatenate[Event, P], None]", run)

    return decorate
