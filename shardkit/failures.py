"""Tells failures of a server from everything else that a call may raise.

Breakers and retries ask here. Pure: looks at the exception and at what it was raised from. Knows
Redis and Memcached clients by the names of their exceptions and imports neither.
"""

from __future__ import annotations

import errno
import socket
from typing import Final

import psycopg
from sqlalchemy.exc import DBAPIError

from shardkit.errors import (
    BreakerOpenError,
    EndpointUnavailableError,
    OutcomeUnknownError,
    ShardkitError,
    UnavailableError,
)
from shardkit.farewells import Farewell, farewell

__all__ = ["is_failure"]

_SERVER_GONE: Final = frozenset({"57P01", "57P02", "57P03", "53300"})
"""admin_shutdown, crash_shutdown, cannot_connect_now, too_many_connections; and class 08.

Source: PostgreSQL manual, appendix A, error codes.
"""

_CLIENTS: Final = {
    ("redis.exceptions", "MaxConnectionsError"): False,  # the program's own pool is exhausted
    ("redis.exceptions", "AuthenticationError"): False,  # does not pass by waiting
    ("redis.exceptions", "ConnectionError"): True,
    ("redis.exceptions", "TimeoutError"): True,
    ("pymemcache.exceptions", "MemcacheUnexpectedCloseError"): True,
    ("psycopg_pool.errors", "PoolTimeout"): False,
    ("psycopg_pool.errors", "TooManyRequests"): False,
}
"""Verdict by module and name of an exception; the nearest class it derives from decides."""

_NETWORK: Final = frozenset({
    errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETRESET, errno.ENETUNREACH,
    errno.ENOTCONN, errno.ETIMEDOUT,
})  # fmt: skip
"""Error numbers that speak of the way to a server; `ConnectionError` has its own classes.

Running out of files or ports (EMFILE, EADDRNOTAVAIL) is the program's own trouble.
"""

_UNREACHABLE: Final = (ConnectionError, TimeoutError, socket.gaierror)


def is_failure(error: BaseException) -> bool:
    """Tell whether an exception says that a server or the way to it is failing.

    Failures: refused, broken and timed out connections, invalidated ones, SQLSTATE 08xxx, 57P01
    to 57P03 and 53300. Of a PgBouncer also that it had no server connection to lend: when that goes
    on for so many calls that the breaker opens, nobody is served that way. Neutral: logins that
    the operator has to correct, everything the server said in good health (constraints, 40001,
    40P01, 57014 of a statement_timeout), the program's own limits (exhausted pools, an open
    breaker, a full concurrency limit) and cancellation.
    """
    if not isinstance(error, Exception):  # cancelled, interrupted
        return False
    if isinstance(error, ShardkitError):
        return _is_shardkits_failure(error)
    if isinstance(error, DBAPIError):
        return error.connection_invalidated or (error.orig is not None and is_failure(error.orig))
    for kind in type(error).__mro__:
        verdict = _CLIENTS.get((kind.__module__, kind.__name__))
        if verdict is not None:
            return verdict
    sqlstate = getattr(error, "sqlstate", None)
    if sqlstate is not None:
        return str(sqlstate).startswith("08") or sqlstate in _SERVER_GONE
    if isinstance(error, OSError):
        return isinstance(error, _UNREACHABLE) or error.errno in _NETWORK
    # libpq's own errors have no SQLSTATE: no server was there to say why, or it refused the login.
    return (
        isinstance(error, psycopg.OperationalError)
        and farewell(str(error)) is not Farewell.LOGIN_REFUSED
    )


def _is_shardkits_failure(error: ShardkitError) -> bool:
    if isinstance(error, EndpointUnavailableError):
        return not isinstance(error, BreakerOpenError)
    # A lost answer to COMMIT, or a deadline that ran out: what broke is what it came from. A
    # refused login comes from a broken connection too, and is nobody's failure but the operator's.
    cause = error.__cause__
    passes_on = isinstance(error, UnavailableError | OutcomeUnknownError)
    return passes_on and cause is not None and is_failure(cause)
