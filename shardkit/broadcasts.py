"""Copies rows of reference tables from one server to the others, within their transactions.

A broadcast writes on its home, the first physical shard by name. What the home's defaults and
triggers made of the rows is read back there, and put as it is, by primary key, on every other
server. `Broadcast` does so after each flush, `shardkit reference repair` for what differs.

Broadcasts take turns: each locks the home first and then the others. A lock belongs to the
transaction on its server, so that it is held until that server has committed, prepared or not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Final

import psycopg
from sqlalchemy import (
    ColumnElement,
    Connection,
    Table,
    delete,
    literal_column,
    select,
    text,
    tuple_,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import InstanceState, Session
from sqlalchemy.orm.attributes import instance_state
from sqlalchemy.sql.ddl import sort_tables

from shardkit.errors import (
    CrossShardWriteError,
    StatementTimeoutError,
    UnsupportedStatementError,
)
from shardkit.models import REFERENCE_SCHEMA
from shardkit.participants import Ending, Participant

__all__ = ["LOCK_KEY", "Broadcast", "copy", "is_reference", "lock", "ordered"]

LOCK_KEY: Final = 0x7265_6665_7265_6E63
"""Key of the lock that broadcasts take turns by: "referenc" in ASCII."""

LOCK_TIMEOUT: Final = 5
"""Seconds to wait for it. It also ends a wait in a circle over servers, which none can see."""

# An exclusive advisory lock until the end of the transaction, and no longer a wait than said.
_LOCK = (
    f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}s'; "
    f"SELECT pg_catalog.pg_advisory_xact_lock({LOCK_KEY}); SET LOCAL lock_timeout TO DEFAULT"
)

# AccessShareLock on catalogues only.
_COLUMNS = text(
    "SELECT attname FROM pg_catalog.pg_attribute WHERE attrelid = CAST(:table AS regclass) "
    "AND attnum > 0 AND NOT attisdropped AND attgenerated = '' ORDER BY attnum"
)

Key = tuple[Any, ...]


class Broadcast(Participant):
    """The copies of reference tables that one session's transaction makes.

    Args:
        session: whose transaction it is.
        physical: names of all physical shards.
        connect: returns the session's connection to a physical shard.
        note: is told that every server is written to.
        is_atomic: whether the session may write to several servers.
    """

    def __init__(
        self,
        session: Session,
        physical: Callable[[], Iterable[str]],
        connect: Callable[[str], Connection],
        note: Callable[[], None],
        *,
        is_atomic: bool,
    ) -> None:
        self._session = session
        self._physical = physical
        self._connect = connect
        self._note = note
        self._is_atomic = is_atomic
        self._flushed: dict[int, tuple[InstanceState[Any], Any]] = {}
        self._is_locked = False

    def flushing(self) -> None:
        """Take the turn of this transaction if a flush is about to write reference tables."""
        session = self._session
        self._flushed.clear()
        changed = (obj for obj in session.dirty if session.is_modified(obj))
        if any(
            is_reference(instance_state(o).mapper.local_table)
            for o in (*session.new, *changed, *session.deleted)
        ):
            self.begin()

    def begin(self) -> None:
        """Take the turn of this transaction to write reference tables, if it has not yet.

        Raises:
            CrossShardWriteError: the session is not atomic, and there are several physical shards.
            StatementTimeoutError: another broadcast takes too long (retryable).
        """
        servers = sorted(self._physical())
        if len(servers) > 1 and not self._is_atomic:
            raise CrossShardWriteError(
                f"reference tables are written on {', '.join(servers)} together",
                hint="use cluster.writer(atomic=True)",
            )
        if len(servers) > 1 and not self._is_locked:
            self._is_locked = True
            lock([self._connect(physical) for physical in servers])
        self._note()

    def connection(self, state: InstanceState[Any]) -> Connection:
        """Return the connection that an object of a reference table is written over."""
        self.begin()
        self._flushed.setdefault(id(state), (state, state.identity))
        return self._connect(min(self._physical()))

    def written(self) -> None:
        """Copy what was flushed on the home to the other servers."""
        flushed, self._flushed = self._flushed, {}
        if not flushed:
            return
        home, *others = sorted(self._physical())
        if not others:
            return
        changed: dict[Table, set[Any]] = {}
        for state, before in flushed.values():
            keys = {before, state.identity} - {None}
            for table in state.mapper.tables:
                assert isinstance(table, Table)
                changed.setdefault(table, set()).update(keys)
        copy(self._connect(home), [self._connect(physical) for physical in others], changed)

    def undone(self, transaction: object) -> None:
        """Note that the turn may have ended: a lock goes with what it was taken in."""
        self._is_locked = False

    def settle(self, ending: Ending) -> None:
        """Note that the turn has ended."""
        self._is_locked = False


def is_reference(table: Any) -> bool:
    """Tell whether a table is one of those copied to every physical shard."""
    return isinstance(table, Table) and table.schema == REFERENCE_SCHEMA


def ordered(tables: Iterable[Table]) -> list[Table]:
    """Return tables so that none refers by a foreign key to one after it, except in circles."""
    return sort_tables(list(tables))


def lock(connections: Sequence[Connection]) -> None:
    """Wait for our turn on every server: the home first, then the others.

    Raises:
        StatementTimeoutError: it did not come in time (retryable).
    """
    for connection in connections:
        try:
            connection.exec_driver_sql(_LOCK)
        except DBAPIError as error:
            if isinstance(error.orig, psycopg.errors.LockNotAvailable):
                raise StatementTimeoutError(
                    f"another write of reference tables holds the lock since {LOCK_TIMEOUT} s",
                    hint="try again; see shardkit twophase status for what is in doubt",
                ) from error
            raise


def copy(
    home: Connection, others: Sequence[Connection], changed: Mapping[Table, Collection[Key]]
) -> None:
    """Put the rows of primary keys on other servers as they are on the home, or remove them.

    Args:
        home: the connection that has written.
        others: connections of the other servers.
        changed: primary keys by table.

    Raises:
        UnsupportedStatementError: a trigger of another server changed what it was given.
        sqlalchemy.exc.IntegrityError: another server's rows differ, so that these do not fit in.
    """
    tables = ordered(changed)
    rows: dict[Table, list[str]] = {}
    gone: dict[Table, list[Key]] = {}
    columns: dict[Table, list[str]] = {}
    for table in tables:
        name = _quoted(home, table)
        columns[table] = list(home.execute(_COLUMNS, {"table": name}).scalars())
        image: ColumnElement[str] = literal_column(
            f"row_to_json({_quoted_alone(home, table)})::text"
        )
        found = home.execute(
            select(*table.primary_key, image).where(_is_one_of(table, changed[table]))
        ).all()
        rows[table] = [row[-1] for row in found]
        there = {tuple(row[:-1]) for row in found}
        gone[table] = [key for key in changed[table] if key not in there]
    for other in others:
        for table in tables:
            if rows[table]:
                _put(other, table, columns[table], rows[table])
        for table in reversed(tables):
            if gone[table]:
                other.execute(delete(table).where(_is_one_of(table, gone[table])))


def _put(connection: Connection, table: Table, columns: Sequence[str], rows: list[str]) -> None:
    """Insert or replace rows, given as JSON, which says any value of any type exactly."""
    name, quote = _quoted(connection, table), connection.dialect.identifier_preparer.quote
    keys = {column.name for column in table.primary_key}
    listed = ", ".join(quote(column) for column in columns)
    changed = ", ".join(
        f"{quote(column)} = excluded.{quote(column)}" for column in columns if column not in keys
    )
    target = ", ".join(quote(column.name) for column in table.primary_key)
    put = text(
        f"INSERT INTO {name} AS kept ({listed}) OVERRIDING SYSTEM VALUE SELECT {listed} "  # noqa: S608  quoted
        f"FROM json_populate_recordset(NULL::{name}, CAST(:rows AS json)) "
        f"ON CONFLICT ({target}) DO {f'UPDATE SET {changed}' if changed else 'NOTHING'} "
        "RETURNING row_to_json(kept)::text"
    )
    kept = connection.execute(put, {"rows": f"[{','.join(rows)}]"}).scalars().all()
    if changed and _comparable(kept) != _comparable(rows):
        raise UnsupportedStatementError(
            f"{name} has a trigger or a generated column that made something else of the same row",
            hint="reference rows must be the same wherever they are written; the home copies them",
        )


def _comparable(rows: Iterable[str]) -> list[str]:
    return sorted(json.dumps(json.loads(row), sort_keys=True) for row in rows)


def _is_one_of(table: Table, keys: Collection[Key]) -> ColumnElement[bool]:
    columns = list(table.primary_key)
    if len(columns) == 1:
        return columns[0].in_([key[0] for key in keys])
    return tuple_(*columns).in_(list(keys))


def _quoted(connection: Connection, table: Table) -> str:
    return connection.dialect.identifier_preparer.format_table(table)


def _quoted_alone(connection: Connection, table: Table) -> str:
    return connection.dialect.identifier_preparer.format_table(table, use_schema=False)
