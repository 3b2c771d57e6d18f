"""What PgBouncer and PostgreSQL say last, and what becomes of it."""

from __future__ import annotations

import psycopg
import pytest
from psycopg import errors as pg
from sqlalchemy import URL
from sqlalchemy import exc as sa

from shardkit import errors
from shardkit.checks import connection_error, is_unsent
from shardkit.failures import is_failure
from shardkit.farewells import RETRY_AFTER, Farewell, farewell
from shardkit.topology import Endpoint, Role

HERE = Endpoint("alpha", Role.PRIMARY, URL.create("postgresql", host="127.0.0.1", port=6432))
REFUSED = 'connection failed: connection to server at "127.0.0.1", port 6432 failed: FATAL:  '


def lost(text: str) -> sa.DBAPIError:
    """Return an error as SQLAlchemy wraps it: by SQLSTATE in a conversation, none at a login."""
    kind = psycopg.OperationalError if text.startswith(REFUSED) else pg.ProtocolViolation
    return sa.OperationalError("SELECT 1", {}, kind(text), connection_invalidated=True)


# Said by PgBouncer 1.18 when provoked, except the three marked as of other versions.
SAID = [
    ("query_wait_timeout", Farewell.NO_SERVER_IN_TIME),
    (f"{REFUSED}query_wait_timeout", Farewell.NO_SERVER_IN_TIME),
    (f"{REFUSED}client_login_timeout (server down)", Farewell.NO_SERVER_IN_TIME),
    (
        "server login has been failing, try again later (server_login_retry)",
        Farewell.SERVER_GONE,
    ),
    (  # later versions
        "server login has been failing, cached error: connect failed (server_login_retry)",
        Farewell.SERVER_GONE,
    ),
    ("pgbouncer cannot connect to server", Farewell.SERVER_GONE),  # earlier versions
    (
        f"{REFUSED}server login failed: FATAL the database system is starting up",
        Farewell.SERVER_GONE,
    ),
    (f"{REFUSED}no more connections allowed (max_client_conn)", Farewell.SERVER_GONE),
    (f'{REFUSED}database "shardkit" is disabled', Farewell.SERVER_GONE),
    ("server conn crashed?", Farewell.SERVER_LOST),
    ("database removed", Farewell.SERVER_LOST),
    ("idle transaction timeout", Farewell.SERVER_LOST),
    (f"{REFUSED}no such database: none", Farewell.LOGIN_REFUSED),
    (f"{REFUSED}SASL authentication failed", Farewell.LOGIN_REFUSED),
    (f"{REFUSED}unsupported startup parameter: options", Farewell.LOGIN_REFUSED),
]


@pytest.mark.parametrize(("text", "meaning"), SAID)
def test_what_a_pooler_says_is_told_apart(text: str, meaning: Farewell) -> None:
    error = lost(text)
    assert farewell(text) is meaning
    found: errors.ShardkitError = connection_error(error, HERE)
    kinds = {
        Farewell.NO_SERVER_IN_TIME: errors.PoolTimeoutError,
        Farewell.LOGIN_REFUSED: errors.ConfigurationError,
    }
    assert type(found) is kinds.get(meaning, errors.EndpointUnavailableError)
    is_refused = meaning is Farewell.LOGIN_REFUSED
    assert found.retryable is not is_refused
    assert found.retry_after == (None if is_refused else RETRY_AFTER)
    assert is_failure(error.orig or error) is not is_refused, "the breaker counts it"
    assert is_unsent(error) is (meaning in {Farewell.NO_SERVER_IN_TIME, Farewell.SERVER_GONE})


@pytest.mark.parametrize(
    "text", ["terminating connection due to administrator command", "", "connection refused"]
)
def test_other_words_say_nothing_of_a_pooler(text: str) -> None:
    assert farewell(text) is None
    found: errors.ShardkitError = connection_error(lost(text), HERE)
    assert isinstance(found, errors.EndpointUnavailableError)
    assert found.retry_after is None
    assert not is_unsent(lost(text))


def test_the_programs_own_pool_is_no_failure_of_a_server() -> None:
    found = connection_error(sa.TimeoutError("QueuePool limit"), HERE)
    assert isinstance(found, errors.PoolTimeoutError)
    assert found.retry_after is None
    assert not is_failure(found)
