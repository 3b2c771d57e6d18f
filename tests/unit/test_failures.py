"""Which exceptions say that a server is failing."""

from __future__ import annotations

import asyncio
import errno
import socket
from typing import Any

import psycopg
import pytest
import redis.exceptions
from psycopg import errors as pg
from sqlalchemy import exc as sa

from shardkit import errors
from shardkit.failures import is_failure


def wrapped(error: Exception, *, invalidated: bool = False) -> sa.DBAPIError:
    return sa.OperationalError("SELECT 1", {}, error, connection_invalidated=invalidated)


def raised_from(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


def foreign(module: str, name: str, *parents: type[Exception]) -> Exception:
    """An exception of a client that is not installed here."""
    kind: Any = type(name, parents or (Exception,), {"__module__": module})
    made: Exception = kind("from a client")
    return made


UNEXPECTED_CLOSE = foreign("pymemcache.exceptions", "MemcacheUnexpectedCloseError")
SERVER_ERROR = foreign("pymemcache.exceptions", "MemcacheServerError")
POOL_TIMEOUT = foreign("psycopg_pool.errors", "PoolTimeout", psycopg.OperationalError)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError(), ConnectionResetError(), BrokenPipeError(), TimeoutError(),
        OSError(errno.EHOSTUNREACH, "no route"), OSError(errno.ETIMEDOUT, "timed out"),
        socket.gaierror(socket.EAI_AGAIN, "try again"),
        psycopg.OperationalError("connection failed"), pg.ConnectionTimeout("timeout expired"),
        pg.ConnectionFailure("08006"), pg.SqlclientUnableToEstablishSqlconnection("08001"),
        pg.ProtocolViolation("08P01"), pg.AdminShutdown("57P01"), pg.CrashShutdown("57P02"),
        pg.CannotConnectNow("57P03"), pg.TooManyConnections("53300"),
        wrapped(psycopg.OperationalError("server closed the connection unexpectedly")),
        wrapped(pg.QueryCanceled("57014"), invalidated=True),
        errors.EndpointUnavailableError(),
        raised_from(errors.OutcomeUnknownError(), wrapped(pg.AdminShutdown("57P01"))),
        raised_from(errors.UnavailableError(), TimeoutError()),
        redis.exceptions.ConnectionError(), redis.exceptions.TimeoutError(),
        redis.exceptions.BusyLoadingError(),
        UNEXPECTED_CLOSE,
    ],
    ids=repr,
)  # fmt: skip
def test_a_server_that_cannot_be_talked_to_is_failing(error: BaseException) -> None:
    assert is_failure(error)


@pytest.mark.parametrize(
    "error",
    [
        wrapped(pg.UniqueViolation("23505")), sa.IntegrityError("INSERT", {}, Exception("dup")),
        pg.SerializationFailure("40001"), wrapped(pg.DeadlockDetected("40P01")),
        wrapped(pg.QueryCanceled("57014")), pg.LockNotAvailable("55P03"),
        pg.DiskFull("53100"), pg.DatabaseDropped("57P04"), pg.UndefinedTable("42P01"),
        psycopg.InterfaceError("the cursor is closed"),
        sa.TimeoutError("QueuePool limit"), POOL_TIMEOUT,
        errors.PoolTimeoutError(), errors.StatementTimeoutError(), errors.OverloadedError(),
        errors.BreakerOpenError(), errors.NoShardKeyError(),
        raised_from(errors.PoolTimeoutError(), sa.TimeoutError("QueuePool limit")),
        raised_from(errors.StatementTimeoutError(), wrapped(pg.QueryCanceled("57014"))),
        raised_from(errors.ConfigurationError(), wrapped(psycopg.OperationalError("password"))),
        redis.exceptions.MaxConnectionsError(), redis.exceptions.AuthenticationError(),
        redis.exceptions.ResponseError("WRONGTYPE"), redis.exceptions.WatchError(),
        SERVER_ERROR, OSError(errno.EMFILE, "too many open files"), FileNotFoundError("config"),
        ValueError(), KeyError("user"),
        asyncio.CancelledError(), KeyboardInterrupt(), SystemExit(), GeneratorExit(),
    ],
    ids=repr,
)  # fmt: skip
def test_everything_else_is_neutral(error: BaseException) -> None:
    assert not is_failure(error)


def test_a_real_refusal_is_a_failure_and_so_is_a_real_reset() -> None:
    here, there = socket.socketpair()
    there.close()
    with here, pytest.raises(BrokenPipeError) as caught:
        here.sendall(b"hello")
    assert is_failure(caught.value)
    with pytest.raises(psycopg.OperationalError) as refused:
        psycopg.connect("host=/nonexistent dbname=x", connect_timeout=2)
    assert is_failure(refused.value)
