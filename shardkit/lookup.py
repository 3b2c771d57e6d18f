"""Keeps, for every unique value, the ids of the rows that may have it, and answers who they are.

The row of a value lies on the logical shard that its hash names, in the table `shardkit_lookup`.
What is done to it, and in which order, is `shardkit.reserving`; here its requests become
statements, each committed by itself on connections that no session holds, and every wait is
bounded. `shardkit.claims` calls it for what a session writes, sessions for what they read,
`shardkit.ops.lookup` to fill and to check. Source: docs/lookup.md.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import psycopg
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from shardkit import ids
from shardkit.errors import (
    InvalidUniqueValueError,
    UniqueViolationError,
    ValueBusyError,
)
from shardkit.reserving import (
    Busy,
    Insert,
    Own,
    Pair,
    Pairs,
    Read,
    Request,
    Steps,
    Swap,
    Taken,
    Verify,
)
from shardkit.timeouts import waiting
from shardkit.topology import schema_name
from shardkit.uniques import Lookup, Value

__all__ = ["Lookups", "Task", "new_ticket", "quoted", "stored_value", "value_or_none"]

LOCK_TIMEOUT: Final = 2.0
"""Seconds to queue for a lookup row, which others hold for one statement only."""

WAIT_TIMEOUT: Final = (2.0, 3.0)
"""Seconds to wait for another transaction's end, at random between these: no server sees a
deadlock that spans two, and two that wait for each other should not give up together."""

# The settings last as long as the statement's own transaction. A committed reservation must not
# be forgotten in a crash, or a row would lack its pair.
_BOUNDED: Final = f"""
WITH bounded AS MATERIALIZED (
    SELECT set_config('lock_timeout', '{int(LOCK_TIMEOUT * 1000)}', true),
        set_config('synchronous_commit', CASE current_setting('synchronous_commit')
            WHEN 'off' THEN 'local' ELSE current_setting('synchronous_commit') END, true)
)
"""

# RowExclusiveLock; one row at a time in the order of the values, so that two who add the same
# ones wait for each other and never both ways round.
_INSERT: Final = (
    _BOUNDED
    + """
INSERT INTO {0}.shardkit_lookup AS l (lookup, value, ids, tickets)
SELECT n.lookup, n.value, ARRAY[n.id], ARRAY[n.ticket]
FROM bounded, unnest(%(lookups)s::text[], %(values)s::bytea[], %(ids)s::bigint[],
    %(tickets)s::bigint[]) AS n (lookup, value, id, ticket)
ORDER BY n.lookup, n.value
ON CONFLICT DO NOTHING RETURNING l.lookup, l.value, l.ids[1]
"""
)

# RowExclusiveLock and the lock of one row.
_UPDATE: Final = (
    _BOUNDED
    + """
UPDATE {0}.shardkit_lookup AS l SET ids = %(new_ids)s::bigint[], tickets = %(new_tickets)s::bigint[]
FROM bounded WHERE l.lookup = %(lookup)s AND l.value = %(value)s
AND l.ids = %(old_ids)s::bigint[] AND l.tickets = %(old_tickets)s::bigint[] RETURNING 1
"""
)
_DELETE: Final = (
    _BOUNDED
    + """
DELETE FROM {0}.shardkit_lookup AS l USING bounded
WHERE l.lookup = %(lookup)s AND l.value = %(value)s
AND l.ids = %(old_ids)s::bigint[] AND l.tickets = %(old_tickets)s::bigint[] RETURNING 1
"""
)

# AccessShareLock; one branch a logical shard.
_READ: Final = (
    "SELECT lookup, value, ids, tickets FROM {0}.shardkit_lookup WHERE (lookup, value) IN "
    "(SELECT * FROM unnest(%(l{1})s::text[], %(v{1})s::bytea[]))"
)

# A shared advisory lock, granted when the transaction that holds the ticket has ended, and then,
# as a statement with a snapshot of its own, AccessShareLock on the table of the row.
_WAIT: Final = "SELECT pg_catalog.pg_advisory_xact_lock_shared({0})"
_ROW: Final = "SELECT {1} FROM {0} WHERE {2} = %(id)s"

_BUSY: Final = (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected)

Ask = Callable[[int, str, Mapping[str, Any]], Sequence[Sequence[Any]]]
"""Runs one statement on the server of a logical shard and returns its rows."""


class Servers(Protocol):
    """What lookups need of the cluster."""

    def physical_of(self, logical_shard: int, /) -> str:
        """Return the name of the physical shard that holds a logical shard."""

    def group(self, logical_shards: Sequence[int], /) -> Mapping[str, tuple[int, ...]]:
        """Return logical shards by physical shard."""

    def borrow(self, logical_shard: int, *, waits: bool) -> AbstractContextManager[Connection]:
        """Lend a connection to the primary of a logical shard, apart from any session."""


@dataclass(slots=True)
class Task:
    """Steps that concern one value.

    Attributes:
        value: the value.
        steps: of `shardkit.reserving`.
        own: tells whether a row has the value as the session's own transaction sees it.
        pending: what they wait for.
    """

    value: Value
    steps: Steps
    own: Callable[[Value, int], bool] | None = None
    pending: Request | None = field(default=None, init=False)


class Lookups:
    """The lookup rows of one cluster.

    Args:
        servers: the cluster.
        total: how many logical shards there are.
    """

    def __init__(self, servers: Servers, total: int) -> None:
        self._servers = servers
        self.total = total

    # -- reading

    def read(self, values: Iterable[Value], ask: Ask | None = None) -> dict[Value, Pairs]:
        """Return the pairs of every value; none for one that nobody has.

        Args:
            values: what to look up; one statement per physical shard.
            ask: who runs the statements; None for the primaries.

        Raises:
            UnavailableError: a server does not answer (retryable).
        """
        by_home: dict[int, list[Value]] = {}
        found: dict[Value, Pairs] = {}
        for value in values:
            found[value] = ()
            by_home.setdefault(value.home(self.total), []).append(value)
        for homes in self._servers.group(sorted(by_home)).values():
            query = " UNION ALL ".join(_READ.format(schema_name(h), h) for h in homes)
            parameters: dict[str, Any] = {}
            by_key: dict[tuple[str, bytes], Value] = {}
            for home in homes:
                parameters[f"l{home}"] = [value.lookup.name for value in by_home[home]]
                parameters[f"v{home}"] = [value.key for value in by_home[home]]
                by_key |= {(value.lookup.name, value.key): value for value in by_home[home]}
            for name, key, row_ids, tickets in (ask or self._ask)(homes[0], query, parameters):
                value = by_key[name, bytes(key)]
                found[value] = tuple(map(Pair, row_ids, tickets))
        return found

    def shards(
        self, values: Iterable[Value], ask: Ask | None = None
    ) -> dict[Value, frozenset[int]]:
        """Return the logical shards of the rows that may have each value; see `read`."""
        return {
            value: frozenset(ids.shard_of(pair.id) for pair in pairs)
            for value, pairs in self.read(values, ask).items()
        }

    # -- writing

    def run(self, tasks: Sequence[Task]) -> None:
        """Run the steps of several tasks, those of one kind together.

        Raises:
            UniqueViolationError: another row has a value.
            ValueBusyError: another transaction does not end (retryable).
            UnavailableError: a server does not answer (retryable).
        """
        for task in tasks:
            self._go_on(task, None)
        while pending := [task for task in tasks if task.pending is not None]:
            inserts = [task for task in pending if isinstance(task.pending, Insert)]
            for task, answer in self._inserted(inserts):
                self._go_on(task, answer)
            for task in pending:
                if task not in inserts:
                    try:
                        answer = self._answer(task)
                    except Busy as busy:
                        raise _busy(task.value) from busy
                    self._go_on(task, answer)

    def _go_on(self, task: Task, answer: Any) -> None:
        try:
            task.pending = task.steps.send(answer)
        except StopIteration:
            task.pending = None
        except Taken as taken:
            raise UniqueViolationError(
                f"another row has the value of {task.value.lookup.name}",
                column=task.value.lookup.name,
                hint="give another value",
            ) from taken
        except Busy as busy:
            raise _busy(task.value) from busy

    def _answer(self, task: Task) -> Any:
        value, request = task.value, task.pending
        home = value.home(self.total)
        match request:
            case Read():
                return self.read([value])[value]
            case Swap(old, new):
                query = (_UPDATE if new else _DELETE).format(schema_name(home))
                parameters = {
                    "lookup": value.lookup.name,
                    "value": value.key,
                    "old_ids": [pair.id for pair in old],
                    "old_tickets": [pair.ticket for pair in old],
                    "new_ids": [pair.id for pair in new],
                    "new_tickets": [pair.ticket for pair in new],
                }
                return bool(self._ask(home, query, parameters))
            case Verify(pair):
                return self.verified(value, pair)
            case Own(id_):
                return task.own is None or task.own(value, id_)
        raise AssertionError(request)

    def _inserted(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, bool]]:
        """Add lookup rows, one statement per logical shard; tell which were not there."""
        by_home: dict[int, list[Task]] = {}
        for task in tasks:
            by_home.setdefault(task.value.home(self.total), []).append(task)
        for home in sorted(by_home):
            mine = by_home[home]
            pairs = [_pair_of(task) for task in mine]
            parameters = {
                "lookups": [task.value.lookup.name for task in mine],
                "values": [task.value.key for task in mine],
                "ids": [pair.id for pair in pairs],
                "tickets": [pair.ticket for pair in pairs],
            }
            try:
                rows = self._ask(home, _INSERT.format(schema_name(home)), parameters)
            except Busy as busy:
                raise _busy(mine[0].value) from busy
            added = {(name, bytes(key), id_) for name, key, id_ in rows}
            for task, pair in zip(mine, pairs, strict=True):
                yield task, (task.value.lookup.name, task.value.key, pair.id) in added

    def verified(self, value: Value, pair: Pair) -> bool:
        """Tell whether a row has a value, once the transaction of its ticket has ended.

        Raises:
            Busy: it does not end.
            UnavailableError: the server of the row does not answer (retryable).
        """
        shard = ids.shard_of(pair.id)
        if shard >= self.total:
            return False
        timeout = random.uniform(*WAIT_TIMEOUT)  # noqa: S311 - keeps two apart, guards nothing
        with self._servers.borrow(shard, waits=True) as connection:
            try:
                with waiting(connection, timeout, _WAIT.format(pair.ticket)):
                    return stored_value(connection, value.lookup, pair.id) == value
            except DBAPIError as error:
                if isinstance(error.orig, _BUSY):
                    raise Busy from error
                raise

    def _ask(
        self, logical_shard: int, query: str, parameters: Mapping[str, Any]
    ) -> Sequence[Sequence[Any]]:
        with self._servers.borrow(logical_shard, waits=False) as connection:
            try:
                return connection.exec_driver_sql(query, dict(parameters)).all()
            except DBAPIError as error:
                if isinstance(error.orig, _BUSY):
                    raise Busy from error
                raise


def stored_value(connection: Connection, lookup: Lookup, row_id: int) -> Value | None:
    """Return the value of a row as a connection sees it, or None when there is none."""
    query = _ROW.format(
        f"{schema_name(ids.shard_of(row_id))}.{quoted(lookup.table)}",
        quoted(lookup.column),
        quoted(lookup.id_column),
    )
    row = connection.exec_driver_sql(query, {"id": row_id}).first()
    return None if row is None else value_or_none(lookup, row[0])


def value_or_none(lookup: Lookup, given: Any) -> Value | None:
    """Return the one form of a stored value; None for one that could not be taken today."""
    if given is None:
        return None
    try:
        return lookup.value(bytes(given) if isinstance(given, memoryview) else given)
    except InvalidUniqueValueError:
        return None


def quoted(name: str) -> str:
    """Return an identifier for a statement with parameters."""
    return '"{}"'.format(name.replace('"', '""').replace("%", "%%"))


def new_ticket() -> int:
    """Return a number that no other transaction has."""
    return secrets.randbits(63)


def _pair_of(task: Task) -> Pair:
    assert isinstance(task.pending, Insert), "the caller has looked"
    return task.pending.pair


def _busy(value: Value) -> ValueBusyError:
    return ValueBusyError(
        f"another transaction is about to take or give up a value of {value.lookup.name}",
        hint="roll back and try again",
    )
