"""Bounds how long a server works on statements, for those statements only.

PostgreSQL keeps the bound itself, as `statement_timeout` local to a transaction, so that it ends
with the transaction whatever happens and the next user of a pooled connection never meets it.
Used by sessions and `shardkit.scatter` where a statement asks for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from shardkit.errors import StatementTimeoutError

__all__ = ["limited", "waiting"]

# A reader has no transaction: it gets one. A writer keeps its own, and what it has written, by a
# savepoint. One round trip before and one after; none takes a lock.
_BEGIN = "BEGIN; SET LOCAL statement_timeout = {0}"
_END, _UNDO = "COMMIT", "ROLLBACK"
_MARK = "SHOW statement_timeout; SAVEPOINT shardkit_timeout; SET LOCAL statement_timeout = {0}"
_UNMARK = "RELEASE SAVEPOINT shardkit_timeout; SET LOCAL statement_timeout = '{0}'"
_WAIT = "BEGIN; SET LOCAL lock_timeout = {0}; {1}"
_RETURN = "ROLLBACK TO SAVEPOINT shardkit_timeout; RELEASE SAVEPOINT shardkit_timeout"


@contextmanager
def limited(connection: Connection, timeout: float) -> Iterator[None]:
    """Bound each statement that runs inside.

    After a timeout the transaction of a writer stands where it stood before.

    Args:
        connection: of a reader, outside a transaction, or of a writer, inside one.
        timeout: seconds, above 0.

    Raises:
        StatementTimeoutError: the server gave up in time (retryable).
    """
    milliseconds = max(1, math.ceil(timeout * 1000))
    driver: Any = connection.connection.driver_connection
    # A reader has a transaction, which is not to end here, while it streams.
    is_reader = (
        driver.autocommit and driver.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
    )
    try:
        if is_reader:
            end = _END
            connection.exec_driver_sql(_BEGIN.format(milliseconds))
        else:
            before = connection.exec_driver_sql(_MARK.format(milliseconds)).scalar_one()
            end = _UNMARK.format(before)
        yield
        connection.exec_driver_sql(end)
    except BaseException as error:
        _undo(connection, _UNDO if is_reader else _RETURN)
        if isinstance(error, DBAPIError) and isinstance(error.orig, psycopg.errors.QueryCanceled):
            raise StatementTimeoutError(
                f"no answer within {timeout:g} seconds", hint="try again or allow more"
            ) from error
        raise


@contextmanager
def waiting(connection: Connection, timeout: float, lock: str) -> Iterator[None]:
    """Take a lock in a short transaction of its own; it is let go at the end.

    Args:
        connection: outside a transaction.
        timeout: seconds to wait for the lock and for any other, above 0.
        lock: the statement that takes it; what runs inside sees what was committed before.

    Raises:
        sqlalchemy.exc.DBAPIError: of LockNotAvailable, when it was not granted in time.
    """
    try:
        connection.exec_driver_sql(_WAIT.format(max(1, math.ceil(timeout * 1000)), lock))
        yield
        connection.exec_driver_sql(_END)
    except BaseException:
        _undo(connection, _UNDO)
        raise


def _undo(connection: Connection, undo: str) -> None:
    """Leave nothing open on a connection, or leave the connection."""
    if connection.closed or connection.invalidated:
        return
    driver: Any = connection.connection.driver_connection
    if driver.info.transaction_status == psycopg.pq.TransactionStatus.IDLE:
        return  # SQLAlchemy did it
    try:
        connection.exec_driver_sql(undo)
    except BaseException as error:
        if not connection.invalidated:
            connection.invalidate(error)
        if not isinstance(error, Exception):
            raise
