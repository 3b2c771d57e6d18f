"""Events on their way into the outbox: what a session has been told, and the SQL that stores it.

A writer collects events and sends them as the last thing before COMMIT: one INSERT for each
logical shard. So an event costs one statement however many there are, nobody waits behind its
locks for longer than a commit takes, and locks are taken last and in one order, which is why
emitting cannot deadlock. Called by `shardkit.writer`. Source: docs/outbox.md.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import psycopg
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import object_session
from sqlalchemy.orm.attributes import instance_state

from shardkit.errors import EventTooLargeError, InvalidEventError, ShardFencedError
from shardkit.topology import schema_name

__all__ = [
    "CHANNEL",
    "EPOCH_SHIFT",
    "MAX_KEY",
    "MAX_PAYLOAD",
    "MAX_TOPIC",
    "POSITION",
    "SLEEPING",
    "Announcement",
    "Emissions",
    "HasId",
    "Pending",
    "after_delete",
    "after_insert",
    "after_update",
    "announces",
    "key_text",
    "mark_effects",
    "pending",
    "refusal",
    "send",
    "unmark_effects",
]

MAX_PAYLOAD: Final = 65_536
"""Bytes of JSON an event may carry; larger things are rows, and the event names them."""

MAX_TOPIC, MAX_KEY = 200, 500
"""Characters of a topic and of a key."""

POSITION: Final = "shardkit.outbox_position"
EPOCH_SHIFT: Final = 44
"""A position is `epoch << 44 | number`; the number counts on each server by itself."""

CHANNEL: Final = "shardkit_outbox"
"""What relays listen to; the payload is the number of a logical shard."""

SLEEPING: Final = 0x7368_6F75_7462_6F78
"""Advisory lock that a relay holds while it sleeps: "shoutbox" in ASCII. Writers notify only
while it is held, since NOTIFY makes transactions commit one after the other."""

# Row locks on what is inserted. In this order: the locks of the keys, to the end of the
# transaction; then positions, which are therefore those of the order of commit, key by key; then
# the note to a relay that sleeps. At any isolation level: sequences and locks know no snapshot.
_INSERT = """
INSERT INTO {schema}.shardkit_outbox (position, id, key, topic, payload)
SELECT {place} + nextval('shardkit.outbox_position'), e.id, e.key, e.topic, e.payload
FROM (SELECT count(pg_advisory_xact_lock(h)) FROM unnest(%s::bigint[]) AS h) AS locked (n),
    unnest(%s::bigint[], %s::text[], %s::text[], %s::json[]) AS e (id, key, topic, payload)
WHERE locked.n + {woken} >= 0
"""

# The same for one event, which most transactions have.
_INSERT_ONE = """
INSERT INTO {schema}.shardkit_outbox (position, id, key, topic, payload)
SELECT {place} + nextval('shardkit.outbox_position'), %s, %s, %s, %s
FROM (SELECT pg_advisory_xact_lock(%s) OFFSET 0) AS locked (n)
WHERE locked.n IS NOT NULL AND {woken} >= 0
"""

# Null, which no position may be, while the logical shard is not this server's to write.
_PLACE = """(
    SELECT epoch << {shift} FROM shardkit.ownership
    WHERE logical_shard = {shard} AND state = 'active')"""

_WOKEN = """(CASE WHEN pg_try_advisory_xact_lock_shared({sleeping}) THEN 0
        ELSE octet_length(pg_notify('{channel}', '{shard}')::text) END)"""

# Row locks on the new rows, in ascending order, so that two callers cannot deadlock; waits for a
# transaction that is about to insert the same.
_EFFECTS = """
INSERT INTO {schema}.shardkit_effects (event_id, consumer) SELECT id, %s FROM unnest(%s::bigint[])
AS id ON CONFLICT DO NOTHING RETURNING event_id
"""


# Row locks on rows of this transaction.
_NO_EFFECTS = """
DELETE FROM {schema}.shardkit_effects WHERE consumer = %s AND event_id = ANY (%s::bigint[])
"""


class HasId(Protocol):
    """An event as it was delivered, as far as its effect is concerned."""

    @property
    def id(self) -> int:
        """What tells it from every other event, for ever."""


_ENCODE: Final = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


@dataclass(slots=True)
class Pending:
    """An event that is not stored yet.

    Attributes:
        topic: names the handler.
        payload: JSON text.
        key: events of one key are delivered in order of commit; None for no order.
        near: an object or id that says which logical shard; None for the only one written.
        shard: the logical shard, once it is known.
    """

    topic: str
    payload: str
    key: str | None
    near: Any
    shard: int | None = None


class Emissions:
    """The events of one transaction, in the order in which they were emitted.

    *Invariant:* a savepoint that is rolled back takes the events emitted since it with it.
    """

    __slots__ = ("_marks", "pending")

    def __init__(self) -> None:
        self.pending: list[Pending] = []
        self._marks: dict[Any, int] = {}

    def begin(self, savepoint: object) -> None:
        """Note that a savepoint begins."""
        self._marks[savepoint] = len(self.pending)

    def undo(self, savepoint: object) -> None:
        """Forget the events since a savepoint."""
        if savepoint in self._marks:
            del self.pending[self._marks.pop(savepoint) :]

    def clear(self) -> None:
        """Forget everything: the transaction is over."""
        self.pending.clear()
        self._marks.clear()


def pending(topic: str, payload: Any, *, key: Any, near: Any) -> Pending:
    """Return an event that can be stored.

    Raises:
        InvalidEventError: topic, key or payload cannot be stored.
        EventTooLargeError: the payload is larger than `MAX_PAYLOAD`.
    """
    if not _is_topic(topic):
        raise InvalidEventError(f"a topic is text of 1 to {MAX_TOPIC} characters, without NUL")
    try:
        text = _ENCODE(payload)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidEventError(f"the payload of {topic!r} is not JSON: {error}") from error
    if len(text) > MAX_PAYLOAD:
        raise EventTooLargeError(
            f"the payload of {topic!r} has {len(text):,} bytes, at most {MAX_PAYLOAD:,} are allowed"
        )
    return Pending(topic, text, None if key is None else key_text(key), near)


def _is_topic(topic: object) -> bool:
    return isinstance(topic, str) and bool(topic) and _storable(topic, MAX_TOPIC)


def key_text(key: Any) -> str:
    """Return a key as it is stored.

    Raises:
        InvalidEventError: it is no number, text or UUID, or too long.
    """
    if isinstance(key, bool) or not isinstance(key, int | str | uuid.UUID):
        raise InvalidEventError(
            f"an event's key is a number, text or UUID, not {type(key).__name__}",
            hint="name an object's place with near=",
        )
    text = str(key)
    if not _storable(text, MAX_KEY):
        raise InvalidEventError(f"an event's key has up to {MAX_KEY} characters, without NUL")
    return text


def _storable(text: str, longest: int) -> bool:
    try:
        return len(text) <= longest and b"\0" not in text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def send(
    connection: Connection,
    shard: int,
    events: Sequence[Pending],
    ids: Sequence[int],
    *,
    with_commit: bool,
    notifies: bool = True,
) -> None:
    """Store events in the outbox of a logical shard, in the transaction of a connection.

    Args:
        connection: to the logical shard.
        shard: its number.
        events: in the order in which they were emitted.
        ids: one for each.
        with_commit: whether they may be sent together with COMMIT.
        notifies: whether a relay that sleeps is woken; what is to be prepared must not, so that
            the relay finds those events when it looks again by itself.

    Raises:
        sqlalchemy.exc.DBAPIError: of which some are a `refusal`.
    """
    locks = sorted({_lock(shard, event.key) for event in events if event.key is not None})
    if len(events) == 1 and locks:
        event = events[0]
        template = _INSERT_ONE
        parameters: tuple[Any, ...] = (
            ids[0], event.key, event.topic, event.payload, locks[0],
        )  # fmt: skip
    else:
        template = _INSERT
        parameters = (
            locks,
            list(ids),
            [event.key for event in events],
            [event.topic for event in events],
            [event.payload for event in events],
        )
    statement = _statement(template, shard, notifies=notifies)
    driver: Any = connection.connection.driver_connection
    if not (with_commit and driver.say_last(statement, parameters)):
        connection.exec_driver_sql(statement, parameters)


def refusal(error: DBAPIError) -> ShardFencedError | None:
    """Return the error of an outbox that takes no events now, or None when it is another one."""
    if not isinstance(error.orig, psycopg.errors.NotNullViolation):
        return None
    if error.orig.diag.table_name != "shardkit_outbox":
        return None
    schema = error.orig.diag.schema_name or ""
    found = ShardFencedError("it takes no events now", hint="it is being moved; try again")
    found.logical_shard = int(schema.removeprefix("shard_"))
    return found


def mark_effects(
    connection: Connection, shard: int, event_ids: Sequence[int], consumer: str
) -> set[int]:
    """Note effects of events in a logical shard; return the events that had none before."""
    statement = _EFFECTS.format(schema=schema_name(shard))
    found = connection.exec_driver_sql(statement, (consumer, sorted(event_ids)))
    return {row[0] for row in found}


def unmark_effects(
    connection: Connection, shard: int, event_ids: Sequence[int], consumer: str
) -> None:
    """Take back notes that this transaction made, of effects that it will not have."""
    statement = _NO_EFFECTS.format(schema=schema_name(shard))
    connection.exec_driver_sql(statement, (consumer, list(event_ids)))


_TEXTS: dict[tuple[str, int, bool], str] = {}


def _statement(template: str, shard: int, *, notifies: bool) -> str:
    text = _TEXTS.get((template, shard, notifies))
    if text is None:
        woken = _WOKEN if notifies else "0"
        text = _TEXTS[template, shard, notifies] = template.format(
            schema=schema_name(shard),
            place=_PLACE.format(shift=EPOCH_SHIFT, shard=shard),
            woken=woken.format(sleeping=SLEEPING, channel=CHANNEL, shard=shard),
        )
    return text


def _lock(shard: int, key: str) -> int:
    """Return the advisory lock of a key: 64 bits, which others' keys meet with luck only."""
    digest = hashlib.blake2b(f"outbox {shard} {key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


# -- declared on models


@dataclass(frozen=True, slots=True)
class Announcement:
    """An event that a model emits by itself; made by `after_insert` and its like.

    Attributes:
        moment: `insert`, `update` or `delete`.
        topic: of the event.
        payload: function of the object, or names of attributes; None for all columns.
        key: function of the object or name of an attribute; None for the row itself.
        columns: attributes of which one must have changed; None for any. Updates only.
    """

    moment: str
    topic: str
    payload: Callable[[Any], Any] | Sequence[str] | None
    key: Callable[[Any], Any] | str | None
    columns: tuple[str, ...] | None = None

    def emit(self, obj: Any) -> None:
        """Emit the event of an object that a flush has just written."""
        session: Any = object_session(obj)
        if session is None or (self.moment == "update" and not self._has_changed(session, obj)):
            return
        session.emit(self.topic, self._payload(obj), key=self._key(obj), near=obj)

    def _has_changed(self, session: Any, obj: Any) -> bool:
        if self.columns is None:
            return bool(session.is_modified(obj, include_collections=False))
        attributes = instance_state(obj).attrs
        return any(attributes[name].history.has_changes() for name in self.columns)

    def _payload(self, obj: Any) -> Any:
        if callable(self.payload):
            return self.payload(obj)
        mapper = instance_state(obj).mapper
        names = self.payload or [attribute.key for attribute in mapper.column_attrs]
        values = ((name, getattr(obj, name)) for name in names)
        return {name: value if isinstance(value, _PLAIN) else str(value) for name, value in values}

    def _key(self, obj: Any) -> Any:
        if callable(self.key):
            return self.key(obj)
        if self.key is not None:
            return getattr(obj, self.key)
        mapper: Any = instance_state(obj).mapper
        parts = mapper.primary_key_from_instance(obj)
        return ":".join(map(str, (mapper.local_table.name, *parts)))


_PLAIN: Final = (int, float, str, bool, type(None), list, dict)


def after_insert(
    topic: str,
    payload: Callable[[Any], Any] | Sequence[str] | None = None,
    *,
    key: Callable[[Any], Any] | str | None = None,
) -> Announcement:
    """Have a model emit an event for every object that a flush inserts.

    Like SQLAlchemy's own events of mappers it is about objects: `session.execute(insert(…))`
    emits nothing.

    Args:
        topic: of the event.
        payload: function of the object, or names of attributes; None for all columns. Values
            that JSON does not have become text.
        key: function of the object or name of an attribute whose value orders the events; None
            for the row itself.

    Example:
        >>> class Follow(Sharded, Base):  # doctest: +SKIP
        ...     __events__ = (after_insert("follow.added", key="followee_id"),)
    """
    return Announcement("insert", topic, payload, key)


def after_update(
    topic: str,
    payload: Callable[[Any], Any] | Sequence[str] | None = None,
    *,
    key: Callable[[Any], Any] | str | None = None,
    columns: Sequence[str] | None = None,
) -> Announcement:
    """Have a model emit an event for every object that a flush changes; see `after_insert`.

    Args:
        topic: of the event.
        payload: as for `after_insert`.
        key: as for `after_insert`.
        columns: attributes of which one must have changed; None for any.
    """
    return Announcement("update", topic, payload, key, None if columns is None else tuple(columns))


def after_delete(
    topic: str,
    payload: Callable[[Any], Any] | Sequence[str] | None = None,
    *,
    key: Callable[[Any], Any] | str | None = None,
) -> Announcement:
    """Have a model emit an event for every object that a flush deletes; see `after_insert`."""
    return Announcement("delete", topic, payload, key)


def announces(announcement: Announcement) -> Callable[[Any, Any, Any], None]:
    """Return the listener that SQLAlchemy calls for each object."""

    def listener(_mapper: Mapping[str, Any], _connection: Connection, obj: Any) -> None:
        announcement.emit(obj)

    return listener
