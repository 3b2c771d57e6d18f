"""What the transaction of a writer takes and gives up of unique values.

Before a flush writes anything, every new value is reserved; after the transaction has ended, what
does not count any more is released. In between the transaction holds its ticket, which makes
whoever wants one of the values wait for it. Called by `WriteSession`; how a value is reserved is
`shardkit.reserving`. Source: docs/lookup.md.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Protocol, cast

from sqlalchemy import Connection, Delete, Insert, Update, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import InstanceState, Session
from sqlalchemy.orm.attributes import instance_state

from shardkit import ids
from shardkit.changes import Change, added, changed, inserted, label_of, rows_of
from shardkit.errors import (
    ShardkitError,
    UniqueViolationError,
    UnsupportedStatementError,
)
from shardkit.lookup import Lookups, Task, new_ticket, quoted, stored_value, value_or_none
from shardkit.participants import Ending, Participant
from shardkit.parts import Part
from shardkit.reserving import Pair, release, reserve
from shardkit.shapes import base_table
from shardkit.topology import schema_name
from shardkit.uniques import GIVEN_UP, Lookup, Value, given_up, lookups_of

__all__ = ["Claims"]

Connect = Callable[[int], Connection]
"""Returns the session's connection to a logical shard."""


class Servers(Protocol):
    """What claims need of the cluster."""

    lookups: Lookups


_LOG: Final = logging.getLogger("shardkit.lookup")

# RowShareLock, and locks rows in the order of their ids: nobody else changes what they hold while
# it is told whether their values stay. The snapshot of the statement is newer than any lock.
_LOCK: Final = "SELECT {1} FROM {0} WHERE {2} = ANY(%(ids)s::bigint[]) ORDER BY {2} FOR UPDATE"

# An advisory lock that nobody else asks for before it is written down, so it is had at once.
_HOLD: Final = "SELECT pg_catalog.pg_advisory_xact_lock(%(ticket)s)"


class Claims(Participant):
    """The unique values of one session's transaction.

    Args:
        session: whose transaction it is.
        servers: the cluster.
        physical_of: returns the physical shard that the session uses for a logical shard.
        connect: returns the session's connection to a logical shard.
    """

    def __init__(
        self,
        session: Session,
        servers: Servers,
        physical_of: Callable[[int], str],
        connect: Connect,
    ) -> None:
        self._session = session
        self._servers = servers
        self._physical_of = physical_of
        self._connect = connect
        self._flushing: dict[int, Mapping[Lookup, Value | None]] = {}
        self.ended()

    def ended(self) -> None:
        """Forget everything: the next transaction begins."""
        self._ticket = 0
        self._held_on: set[str] = set()
        self._tickets: set[int] = set()
        self._taken: dict[Value, set[int]] = {}
        self._given_up: dict[Value, set[int]] = {}
        self._is_certain = True

    @property
    def shards(self) -> set[int]:
        """The logical shards whose lookup rows a later reader must have seen."""
        total = self._servers.lookups.total
        return {value.home(total) for value in self._taken}

    @property
    def physical(self) -> set[str]:
        """Names of the physical shards whose lookup rows a later reader must have seen."""
        return {self._physical_of(shard) for shard in self.shards}

    # -- objects

    def flushing(self) -> None:
        """Reserve what a flush is about to write; see `reserve`."""
        session = self._session
        self._flushing.clear()
        changes = []
        for obj in session.new:
            if lookups := lookups_of(instance_state(obj).mapper.local_table):
                changes.append(added(obj, lookups))
                self._flushing[id(obj)] = changes[-1].values
        if session.deleted or session.identity_map.check_modified():
            deleted = {id(obj) for obj in session.deleted}
            for obj in (*session.deleted, *session.dirty):
                state: InstanceState[Any] = instance_state(obj)
                lookups = lookups_of(state.mapper.local_table)
                if not lookups or (id(obj) in deleted and id(obj) in self._flushing):
                    continue
                gone = id(obj) in deleted
                values = dict.fromkeys(lookups) if gone else changed(state, lookups)
                self._flushing[id(obj)] = values
                if values:
                    identity = cast("Any", state.identity)[0]
                    changes.append(
                        Change(identity, lookups, values, label=label_of(state), is_stored=True)
                    )
        if changes:
            self._reserve(changes)

    def flushed(self) -> None:
        """Refuse what was written without having been reserved.

        Raises:
            UnsupportedStatementError: a unique value was set while its object was flushed.
        """
        session = self._session
        for obj in (*session.new, *session.dirty):
            state: InstanceState[Any] = instance_state(obj)
            lookups = lookups_of(state.mapper.local_table)
            if not lookups:
                continue
            known = self._flushing.get(id(obj), {})
            is_new = state.key is None
            wanted = added(obj, lookups).values if is_new else changed(state, lookups)
            for lookup, value in wanted.items():
                if known.get(lookup) != value:
                    raise UnsupportedStatementError(
                        f"{label_of(state)}.{lookup.attribute} was set while it was flushed",
                        hint="set it before: what relationships and events set comes too late",
                    )
        self._flushing.clear()

    # -- statements

    def writing(self, statement: Any, found: Sequence[Part]) -> None:
        """Reserve and note what a statement, which `refuse` let pass, is about to write.

        Args:
            statement: an INSERT, UPDATE or DELETE.
            found: its parts.

        Raises:
            UniqueViolationError: another row has a value.
            InvalidUniqueValueError: a value cannot be kept unique.
        """
        lookups = lookups_of(base_table(statement.table))
        if not lookups:
            return
        if isinstance(statement, Insert):
            changes = [inserted(row, lookups, statement) for part in found for row in rows_of(part)]
            self._reserve([change for change in changes if change.values])
        elif isinstance(statement, Delete):
            cast("Any", self._session)._autoflush()
            for part in found:
                self._note_deleted(part, lookups)

    @staticmethod
    def refuse(statement: Any, params: Any, *, numbered: bool = False) -> None:
        """Refuse a statement that would set a unique column to what is not known before.

        Args:
            statement: an INSERT, UPDATE or DELETE.
            params: what is passed with it.
            numbered: whether its logical shard was given by number.

        Raises:
            UnsupportedStatementError: it would.
        """
        lookups = lookups_of(base_table(statement.table))
        names = {name for k in lookups for name in (k.attribute, k.column)}
        if isinstance(statement, Update):
            given: set[Any] = {getattr(key, "key", key) for key in statement._values or {}}
            for row in params if isinstance(params, list | tuple) else [params or {}]:
                given.update(row)
            if found := sorted(names & given):
                raise UnsupportedStatementError(
                    f"an UPDATE that sets {', '.join(found)}, which is unique",
                    hint="load the objects and set the attribute",
                )
        elif isinstance(statement, Insert) and lookups:
            if statement._post_values_clause is not None:
                raise UnsupportedStatementError(
                    "INSERT … ON CONFLICT into a table with unique columns",
                    hint="look the row up, then add or change the object",
                )
            if numbered:
                raise UnsupportedStatementError(
                    "rows with unique columns for a logical shard given by number",
                    hint="leave bind_arguments out: each row names its shard",
                )

    def _note_deleted(self, part: Part, lookups: tuple[Lookup, ...]) -> None:
        """Note the values of the rows that a DELETE is about to remove."""
        statement: Any = part.statement
        table = statement.table
        columns = table.c
        query = (
            select(columns[lookups[0].id_column], *(columns[k.column] for k in lookups))
            .where(*statement._where_criteria)
            .with_for_update(of=table)
        )
        rows = self._connect(part.shard).execute(query, cast("Any", part.params or {}))
        for row_id, *stored in rows:
            self._note_given_up(row_id, lookups, stored)

    # -- what is taken and given up

    def _reserve(self, changes: Sequence[Change]) -> None:
        """Reserve new values of rows, and note which they leave.

        Raises:
            UniqueViolationError: another row has a value, stored or about to be.
            ValueBusyError: another transaction does not end (retryable).
            UnavailableError: a server does not answer (retryable).
        """
        leaving, truth = self._locked([change for change in changes if change.is_stored])
        wanted: dict[Value, int] = {}
        for change in changes:
            for lookup, value in change.values.items():
                if value is None or truth.get((change.id, lookup)) == value:
                    continue
                if wanted.setdefault(value, change.id) != change.id:
                    raise UniqueViolationError(
                        f"two rows of one unit of work have the same {change.label}."
                        f"{lookup.attribute}",
                        column=lookup.name,
                        hint="give another value",
                    )
        if not wanted:
            return
        self._ticket = self._ticket or new_ticket()
        self._tickets.add(self._ticket)
        for row_id in wanted.values():
            shard = ids.shard_of(row_id)
            physical = self._physical_of(shard)
            if physical not in self._held_on:
                self._connect(shard).exec_driver_sql(_HOLD, {"ticket": self._ticket})
                self._held_on.add(physical)
        # Noted before it is done: whatever fails, the end of the transaction looks at them.
        for value, row_id in wanted.items():
            self._taken.setdefault(value, set()).add(row_id)
        tickets = frozenset(self._tickets)
        self._servers.lookups.run(
            [
                Task(
                    value,
                    reserve(Pair(row_id, self._ticket), tickets, leaving.get(value, frozenset())),
                    self._has,
                )
                for value, row_id in wanted.items()
            ]
        )

    def _has(self, value: Value, row_id: int) -> bool:
        """Tell whether a row has a value as this transaction sees it."""
        shard = ids.shard_of(row_id)
        if self._physical_of(shard) not in self._held_on:
            return True  # committed, and not of this transaction
        return stored_value(self._connect(shard), value.lookup, row_id) == value

    def _locked(
        self, changes: Iterable[Change]
    ) -> tuple[dict[Value, set[int]], dict[tuple[int, Lookup], Value | None]]:
        """Lock stored rows; return which ids leave each value, and the values that are stored."""
        by_table: dict[tuple[int, tuple[Lookup, ...]], list[Change]] = {}
        for change in changes:
            by_table.setdefault((ids.shard_of(change.id), change.lookups), []).append(change)
        leaving: dict[Value, set[int]] = {}
        truth: dict[tuple[int, Lookup], Value | None] = {}
        for (shard, lookups), mine in sorted(by_table.items(), key=lambda item: item[0][0]):
            by_id = {change.id: change for change in mine}
            names = [lookups[0].id_column, *(lookup.column for lookup in lookups)]
            query = _LOCK.format(
                f"{schema_name(shard)}.{quoted(lookups[0].table)}",
                ", ".join(map(quoted, names)),
                quoted(lookups[0].id_column),
            )
            rows = self._connect(shard).exec_driver_sql(query, {"ids": list(by_id)})
            for row_id, *stored in rows:
                change = by_id[row_id]
                for lookup, given in zip(lookups, stored, strict=True):
                    old = truth[row_id, lookup] = value_or_none(lookup, given)
                    if old is not None and change.values.get(lookup, old) != old:
                        leaving.setdefault(old, set()).add(row_id)
                        self._given_up.setdefault(old, set()).add(row_id)
        return leaving, truth

    def _note_given_up(
        self, row_id: int, lookups: tuple[Lookup, ...], stored: Sequence[Any]
    ) -> None:
        for lookup, given in zip(lookups, stored, strict=True):
            value = value_or_none(lookup, given)
            if value is not None:
                self._given_up.setdefault(value, set()).add(row_id)

    # -- the end

    def send(self) -> None:
        """Tell relays, with the commit, what is given up: this process may not live to release it.

        Also what a savepoint has taken back is told: whoever releases looks first.
        """
        told: dict[tuple[int, Lookup], dict[Value, list[int]]] = {}
        for value, row_ids in self._given_up.items():
            if value.lookup.relayed:
                for row_id in row_ids:
                    there = told.setdefault((ids.shard_of(row_id), value.lookup), {})
                    there.setdefault(value, []).append(row_id)
        for (_, lookup), values in told.items():
            beside = next(iter(values.values()))[0]
            for payload in given_up(lookup, values):
                cast("Any", self._session).emit(GIVEN_UP, payload, near=beside)

    def undone(self, transaction: object) -> None:
        """Note that something was rolled back, if only to a savepoint: its ticket is gone."""
        self._ticket = 0
        self._held_on = set()
        self._is_certain = False

    def settle(self, ending: Ending) -> None:
        """Release what the transaction has not taken or has given up, now that it has ended.

        What cannot be released now stays as a pair that does not count: whoever wants the value
        finds that out, and so do `shardkit lookup repair` and, where `send` has told them, relays.
        """
        concerned: dict[Value, set[int]] = {}
        is_committed = ending is Ending.COMMITTED
        if is_committed:
            for value, row_ids in self._given_up.items():
                concerned.setdefault(value, set()).update(row_ids)
        if not (is_committed and self._is_certain):
            for value, row_ids in self._taken.items():
                concerned.setdefault(value, set()).update(row_ids)
        tickets = frozenset(self._tickets)
        self.ended()
        if not concerned:
            return
        tasks = [
            Task(value, release(frozenset(row_ids), tickets))
            for value, row_ids in concerned.items()
        ]
        try:
            self._servers.lookups.run(tasks)
        except (ShardkitError, SQLAlchemyError) as error:
            _LOG.warning("%d lookup rows are left to whoever comes next: %s", len(tasks), error)
