"""The part of a writer that emits events and notes their effects.

`shardkit.writer` builds on it; what is stored, and how, is `shardkit.emitting`.
Source: docs/outbox.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import InstanceState

from shardkit import emitting
from shardkit.connections import AsyncConnections, Connections
from shardkit.errors import InvalidEventError, NoShardKeyError
from shardkit.participants import Ending, Participant
from shardkit.placing import sharding_of_mapper
from shardkit.reach import ReachingSession
from shardkit.strategies import EMBEDDED, Rule

__all__ = ["EmittingSession", "Events"]

_E = TypeVar("_E", bound=emitting.HasId)


class EmittingSession(ReachingSession):
    """What `WriteSession` is, as far as events are concerned."""

    def __init__(self, connections: Connections | AsyncConnections, **options: Any) -> None:
        super().__init__(connections, **options)
        self._events = Events(self)

    def emit(self, topic: str, payload: Any = None, *, key: Any = None, near: Any = None) -> None:
        """Write an event to the outbox, in this transaction.

        It is stored with COMMIT, in one logical shard, and a relay delivers it to the handler of
        its topic: at least once, and events of one key of that logical shard one after the other
        in the order in which their transactions committed.

        Args:
            topic: names the handler, up to `emitting.MAX_TOPIC` characters.
            payload: what JSON can hold, up to `emitting.MAX_PAYLOAD` bytes of it.
            key: number, text or UUID whose events keep their order, such as the id of the object
                they are about; transactions with events of one key commit one after the other.
                None asks for no order.
            near: an object of a sharded class, or an id, beside which the event is stored. None
                for the place of the key, when that is an id; else for the only logical shard that
                the transaction writes to.

        Raises:
            InvalidEventError: topic, key or payload cannot be stored.
            EventTooLargeError: the payload is too large.
            CrossShardWriteError: its place is on another physical shard than what was written.
            InvalidShardKeyError: an id names no logical shard of this cluster.
        """
        event_ = emitting.pending(topic, payload, key=key, near=near)
        if near is None and type(key) is int:
            near = event_.near = key
        if near is not None:
            event_.shard = self._shard_near(near)
            if event_.shard is not None:
                self._note_written((event_.shard,))
        if not self.in_transaction():
            self.begin()
        self._events.emissions.pending.append(event_)

    def once(self, event: emitting.HasId, *, near: Any, consumer: str = "") -> bool:
        """Note that an event has its effect in this transaction; return False if it had it before.

        To be called before the effect is written, in the transaction that writes it: a second
        delivery waits for the first one's transaction and is then told that there is nothing to
        do. Notes are kept for as long as the relay's `retention`.

        Args:
            event: what a handler was given.
            near: an object of a sharded class, or an id, on whose logical shard the effect is.
            consumer: tells apart several effects of one event.

        Raises:
            CrossShardWriteError: the effect is on another physical shard than what was written.
            InvalidShardKeyError: an id names no logical shard of this cluster.
        """
        return bool(self.once_many((event,), near=near, consumer=consumer))

    def once_many(self, events: Iterable[_E], *, near: Any, consumer: str = "") -> list[_E]:
        """Note that events have their effects; return those that had none before, in their order.

        `once` for the lists that batch handlers are given; see there.

        Args:
            events: of which all effects are on one logical shard.
            near: an object of a sharded class, or an id, on that logical shard.
            consumer: tells apart several effects of one event.
        """
        shard = self._shard_near(near)
        if shard is None:  # an object that this flush places
            self.flush()
            shard = self._shard_near(near)
        assert shard is not None, "a flushed object has a place"
        given = list(events)
        self._note_written((shard,))
        try:
            fresh = emitting.mark_effects(
                self._connection_to(shard), shard, [event.id for event in given], consumer
            )
        except DBAPIError as error:
            self._raise(error)
        return [event for event in given if event.id in fresh]

    def _shard_near(self, near: Any) -> int | None:
        """Return the logical shard of an object or id; None for an object without an identity."""
        if isinstance(near, int):
            return self._named(EMBEDDED, near)
        state: InstanceState[Any] | None = getattr(near, "_sa_instance_state", None)
        if state is None or sharding_of_mapper(state.mapper) is None:
            raise InvalidEventError(
                f"{type(near).__name__} says no place", hint="give an object of a sharded class"
            )
        return None if state.key is None else self._shard_of_identity(near)

    def _only_shard(self) -> int:
        if len(self._written_shards) != 1:
            raise NoShardKeyError(
                f"an event without a place, in a transaction that writes to "
                f"{len(self._written_shards)} logical shards",
                hint="say where with near=, an object or an id",
            )
        return next(iter(self._written_shards))

    # -- of the writer

    def _named(self, rule: Rule, key: Any) -> int:
        raise NotImplementedError

    def _shard_of_identity(self, obj: Any) -> int | None:
        raise NotImplementedError


class Events(Participant):
    """The events of one session's transaction.

    Args:
        session: whose transaction it is.
    """

    def __init__(self, session: EmittingSession) -> None:
        self._session = session
        self.emissions = emitting.Emissions()

    def send(self, *, with_commit: bool = True) -> None:
        """Store what was emitted, as the last thing before COMMIT or together with it."""
        events = self.emissions.pending
        if not events:
            return
        session = self._session
        groups: dict[int, list[emitting.Pending]] = {}
        for event_ in events:
            shard = event_.shard
            if shard is None:
                near = event_.near
                shard = session._only_shard() if near is None else session._shard_near(near)
            if shard is None:
                raise InvalidEventError("the object that an event is about was never written")
            groups.setdefault(shard, []).append(event_)
        session._note_written(groups)
        prepares = session._prepares()
        ids = session._cluster.ids.mint({shard: len(some) for shard, some in groups.items()})
        try:
            for shard in sorted(groups):
                emitting.send(
                    session._connection_to(shard),
                    shard,
                    groups[shard],
                    ids[shard],
                    with_commit=with_commit and not prepares,
                    notifies=not prepares,
                )
        except DBAPIError as error:
            if refusal := emitting.refusal(error):
                raise refusal from error
            session._raise(error)
        self.emissions.clear()

    def settle(self, ending: Ending) -> None:
        """Forget what was not sent: the transaction is over."""
        self.emissions.clear()

    def began(self, savepoint: object) -> None:
        """Note where a savepoint begins."""
        self.emissions.begin(savepoint)

    def undone(self, transaction: object) -> None:
        """Forget the events since a savepoint."""
        self.emissions.undo(transaction)
