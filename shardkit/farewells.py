"""What the last words of a connection mean: PostgreSQL's, and those of a PgBouncer before it.

Pure: looks at texts and at psycopg's errors. Called where errors become shardkit's own and where
breakers are told of them. Words it does not know mean nothing.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import Final

import psycopg

__all__ = ["RETRY_AFTER", "Farewell", "farewell", "is_last_word"]

RETRY_AFTER: Final = 1.0
"""Seconds after which to come back to a PgBouncer whose server is gone.

Source: its `server_login_retry`, as `shardkit.local` sets it; before that PgBouncer does not look.
"""


class Farewell(Enum):
    """Why there is no connection, or none any more."""

    LOGIN_REFUSED = "login refused"
    """Does not get better by waiting: a password, a database or a rule is wrong."""

    NO_SERVER_IN_TIME = "no server connection in time"
    """PgBouncer had none to lend: all are in use, or its server takes no new ones."""

    SERVER_GONE = "server gone"
    """PgBouncer says that its server does not answer; the statement was not sent to any."""

    SERVER_LOST = "server lost"
    """PgBouncer lost its server while this client was using it; the statement may have run."""


# Of PgBouncer those that 1.18 tells clients, each provoked (docs/faults.md) or in its program;
# later versions add the server's own words after "cached error:". The first that fits counts.
_WORDS: Final = (
    (Farewell.NO_SERVER_IN_TIME, re.compile(r"query_wait_timeout|client_login_timeout")),
    (
        Farewell.SERVER_GONE,
        re.compile(
            r"server login has been failing|server login failed|pgbouncer cannot connect to server"
            r'|server DNS lookup failed|no more connections allowed|database ".*" is disabled'
            r"|bouncer is shutting down"
        ),
    ),
    (
        Farewell.SERVER_LOST,
        re.compile(
            r"server conn crashed|server connection closed|server lifetime over|server idle timeout"
            r"|query timeout|idle transaction timeout|database removed"
            r"|database configuration changed"
        ),
    ),
    # libpq gives no SQLSTATE for a refused connection.
    (
        Farewell.LOGIN_REFUSED,
        re.compile(
            r"FATAL:\s+(password authentication failed|no pg_hba.conf entry"
            r"|permission denied for database|SASL authentication failed|no such database"
            r"|unsupported startup parameter"
            r'|(role|database) ".*" (does not exist|is not permitted))'
        ),
    ),
)


def farewell(reason: str) -> Farewell | None:
    """Return what the text of an error says about the connection, or None if it says nothing.

    Args:
        reason: the first line of the driver's error.
    """
    for found, words in _WORDS:
        if words.search(reason):
            return found
    return None


def is_last_word(error: psycopg.Error) -> bool:
    """Tell whether a server closes the connection after this error.

    libpq finds out only when it next reads, and the connection looks usable until then.

    Source: PostgreSQL manual, "Error and Notice Message Fields"; PgBouncer sends `S` without `V`.
    """
    severity = error.diag.severity_nonlocalized or error.diag.severity
    return severity in {"FATAL", "PANIC"}
