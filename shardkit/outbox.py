"""Events as handlers are given them, and when a failed one is tried again.

What `shardkit.relay` delivers and handlers work with. Writers emit with `session.emit`, see
`shardkit.emitting`. Decides; never talks to a database but through a session it is given.
Source: docs/outbox.md.
"""

from __future__ import annotations

import datetime as dt
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Concatenate, Generic, ParamSpec

from shardkit.emitter import EmittingSession
from shardkit.errors import UnsupportedStatementError

__all__ = ["Backoff", "Event", "Once", "once"]

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


class Once(Generic[P]):
    """A handler whose effect happens exactly once; `once` makes it.

    Attributes:
        together: the most events whose effects share a transaction.
    """

    def __init__(
        self,
        handler: Callable[Concatenate[Any, Event, P], None],
        writer: Callable[[], Any],
        *,
        near: Callable[[Any], Any],
        consumer: str,
        together: int,
    ) -> None:
        self._handler: Callable[..., None] = handler
        self._writer = writer
        self._near = near
        self._consumer = consumer
        self.together = together
        functools.update_wrapper(self, handler)

    def __call__(self, event: Event, *args: P.args, **options: P.kwargs) -> None:
        """Handle one event in a transaction of its own."""
        with self._writer() as session:
            if session.once(event, near=self._near(event), consumer=self._consumer):
                self._handler(session, event, *args, **options)
                session.commit()

    def run_together(
        self,
        events: Sequence[Event],
        *,
        begin: Callable[[EmittingSession, Event], None],
        is_late: Callable[[], bool],
    ) -> list[Event]:
        """Handle some events of a list, one after the other, in one transaction.

        Either all that it returns have their effect, or it raises and none has. It chooses those
        whose effects are on the physical shard of the first one's; of a key, never one before an
        earlier one. Each sees what those before it did, and reads anew what others have committed.

        Args:
            events: in order.
            begin: told of the session and of each event before it is handled.
            is_late: asked between two events whether to commit what has been done.

        Raises:
            UnsupportedStatementError: a handler ended the transaction, which is not its own.
        """
        with self._writer() as session:
            if not isinstance(session, EmittingSession):
                raise UnsupportedStatementError(f"{type(session).__name__} is no shardkit writer")
            return session.handle(
                _alike(session, events, self._near),
                partial(self._handler, session),
                consumer=self._consumer,
                begin=partial(begin, session),
                is_late=is_late,
            )


def _alike(
    session: EmittingSession, events: Sequence[Event], near: Callable[[Any], Any]
) -> list[tuple[Event, int]]:
    """Return events of one physical shard and the logical shards of their effects."""
    found: list[tuple[Event, int]] = []
    where: str | None = None
    left: set[tuple[int, str | None]] = set()
    for event in events:
        shard, physical = session.place_of(near(event))
        where = where or physical
        stream = (event.logical_shard, event.key)
        if physical == where and stream not in left:
            found.append((event, shard))
        elif event.key is not None:
            left.add(stream)
    return found


def once(
    writer: Callable[[], Any],
    *,
    near: Callable[[Any], Any],
    consumer: str = "",
    together: int = 100,
) -> Callable[[Callable[Concatenate[Any, Event, P], None]], Once[P]]:
    """Make a handler whose effect happens exactly once, however often it is called.

    The handler is given a session and the event, writes its effect, and leaves COMMIT to this
    decorator, which notes the event in the same transaction and skips one that is noted already.

    A relay that has several events has them handled one after the other in one transaction, for
    a twentieth of a second at most, or as long as one takes; when anything fails it is rolled
    back and each is handled alone. What a handler does outside its session may so happen again,
    as after any failure.

    Args:
        writer: makes the session, such as `cluster.writer`.
        near: function of the event; returns an object or id on whose logical shard the effect is.
        consumer: tells apart several effects of one event.
        together: the most events of one transaction; 1 for handlers that also write with
            sessions of their own what their effect has locked.

    Example:
        >>> @relay.on("follow.added")  # doctest: +SKIP
        ... @once(cluster.writer, near=lambda event: event.payload["followee"])
        ... def add_inverse(session, event):
        ...     session.add(Follower(**event.payload))
    """

    def decorate(handler: Callable[Concatenate[Any, Event, P], None]) -> Once[P]:
        return Once(handler, writer, near=near, consumer=consumer, together=together)

    return decorate
