"""The part of a writer that emits events and notes their effects.

`shardkit.writer` builds on it; what is stored, and how, is `shardkit.emitting`.
Source: docs/outbox.md.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import psycopg
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import InstanceState

from shardkit import emitting
from shardkit.connections import AsyncConnections, Connections
from shardkit.errors import InvalidEventError, NoShardKeyError, UnsupportedStatementError
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
        self._is_unit = False  # of somebody else, who commits
        self._drivers: list[Any] = []
        self._deferred: list[InstanceState[Any]] = []
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
        fresh = self._note_effects([(event, shard) for event in given], consumer)
        return [event for event in given if event.id in fresh]

    def place_of(self, near: Any) -> tuple[int, str]:
        """Return the logical and the physical shard of a stored object or an id.

        Raises:
            InvalidEventError: it is an object that was not stored.
        """
        shard = self._shard_near(near)
        if shard is None:
            raise InvalidEventError("an object that was not stored has no place yet")
        return shard, self._physical_of(shard)

    def handle(
        self,
        placed: Sequence[tuple[_E, int]],
        handler: Callable[[_E], None],
        *,
        consumer: str,
        begin: Callable[[_E], None],
        is_late: Callable[[], bool],
    ) -> list[_E]:
        """Have effects of events in one transaction and commit it; see `Once.run_together`.

        Args:
            placed: events, in order, and the logical shards of their effects.
            handler: writes the effect of an event with this session.
            consumer: tells apart several effects of one event.
            begin: told of each event before it is handled.
            is_late: asked between two events whether to commit what has been done.

        Returns:
            the events that have their effect now, and perhaps had it before.

        Raises:
            UnsupportedStatementError: the handler ended the transaction.
        """
        fresh = self._note_effects(placed, consumer)
        self._is_unit = True  # refuses commit()
        transaction = self.get_transaction()
        n = 0
        for event_, _ in placed:
            if n and is_late():
                break
            begin(event_)
            if event_.id in fresh:
                handler(event_)
                if self.get_transaction() is not transaction or self.in_nested_transaction():
                    raise UnsupportedStatementError(
                        "a handler ended the transaction of its session, which others share",
                        hint="leave COMMIT and ROLLBACK to once(), or give it together=1",
                    )
                self._between_effects()
            n += 1
        for shard, some in _by_shard(placed[n:]).items():
            late = [each.id for each in some if each.id in fresh]
            if late:
                emitting.unmark_effects(self._connection_to(shard), shard, late, consumer)
        self._flush_deferred()
        self._commit_unit()
        return [event_ for event_, _ in placed[:n]]

    def sever(self) -> None:
        """Cut its connections, from any thread: servers roll back what it holds at once."""
        for driver in list(self._drivers):
            with (
                suppress(OSError, psycopg.Error),
                socket.socket(fileno=os.dup(driver.pgconn.socket)) as line,
            ):
                line.shutdown(socket.SHUT_RDWR)

    def _note_effects(self, placed: Sequence[tuple[_E, int]], consumer: str) -> set[int]:
        """Note that events have their effects; return those that had none before."""
        fresh: set[int] = set()
        for shard, some in _by_shard(placed).items():
            self._note_written((shard,))
            try:
                fresh |= emitting.mark_effects(
                    self._connection_to(shard), shard, [each.id for each in some], consumer
                )
            except DBAPIError as error:
                self._raise(error)
        return fresh

    def _between_effects(self) -> None:
        """Make the next handler find what it would find in a transaction of its own.

        New rows of one class wait, to be sent in one statement: until somebody looks.
        """
        states = list(self._new)
        mapper: Any = states[0].mapper if states else None
        if (
            mapper is not None
            and not self._deleted
            and not self.identity_map.check_modified()
            and all(state.mapper is mapper for state in states)
            and not mapper.relationships
            and not mapper.dispatch.before_insert
            and not mapper.dispatch.after_insert  # announces: events keep the order of effects
        ):
            self._deferred = states
            return
        self._flush_deferred()
        self.flush()
        self.expire_all()

    def _flush_deferred(self) -> None:
        """Send the rows that wait, before anything else is sent."""
        if not self._deferred:
            return
        states, self._deferred = self._deferred, []
        self.flush()
        for state in states:
            if state.key is None:
                raise UnsupportedStatementError(
                    "a handler took objects out of its session, which others share",
                    hint="give once() together=1",
                )
            if state.session is self:
                self._expire_state(state, None)

    def connection(self, *args: Any, **options: Any) -> Connection:
        """Return a connection; see SQLAlchemy's `Session.connection`."""
        self._flush_deferred()
        return super().connection(*args, **options)

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

    def _commit_unit(self) -> None:
        raise NotImplementedError

    def _named(self, rule: Rule, key: Any) -> int:
        raise NotImplementedError

    def _shard_of_identity(self, obj: Any) -> int | None:
        raise NotImplementedError


def _by_shard(placed: Iterable[tuple[_E, int]]) -> dict[int, list[_E]]:
    """Return events by logical shard, ascending: notes are locked in one order."""
    found: dict[int, list[_E]] = {}
    for event_, shard in placed:
        found.setdefault(shard, []).append(event_)
    return dict(sorted(found.items()))


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
