"""What is checked of connections, and what is said when one cannot be had.

A new connection must reach the server that the configuration says: cluster, physical shard,
role. One that leaves the pool must still be alive. Called by the pools of
`shardkit.connections`.
"""

from __future__ import annotations

import select
from collections.abc import Callable
from typing import Any, cast

import psycopg
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError, DisconnectionError
from sqlalchemy.exc import TimeoutError as PoolExhaustedError

from shardkit import deadlines
from shardkit.errors import (
    ConfigurationError,
    DeadlineExceededError,
    EndpointUnavailableError,
    PoolTimeoutError,
    StatementTimeoutError,
)
from shardkit.farewells import RETRY_AFTER, Farewell, farewell
from shardkit.fingerprints import Fingerprints
from shardkit.gates import Gated
from shardkit.ids import EPOCH_MS
from shardkit.ownership import Answer, is_lawful
from shardkit.secret import without_frames
from shardkit.topology import Endpoint, Role, Topology
from shardkit.waits import WaitedTooLongError

__all__ = [
    "checks_server",
    "connection_error",
    "end_transaction",
    "is_idle",
    "is_unsent",
    "late_error",
    "replace_if_dead",
]

_IDLE = psycopg.pq.TransactionStatus.IDLE

# Takes no lock; one round trip for each connection opened, none for each use.
_CHECK = """
SELECT (SELECT jsonb_object_agg(table_name, rule) FROM shardkit.placement),
    pg_catalog.current_setting('transaction_read_only') = 'on',
    pg_catalog.pg_is_in_recovery(), pg_catalog.pg_backend_pid(),
    (SELECT system_identifier FROM pg_catalog.pg_control_system()),
    (to_jsonb(i) ->> 'timeline')::bigint, CASE WHEN NOT pg_catalog.pg_is_in_recovery() THEN
        ('x' || pg_catalog.substr(pg_catalog.pg_walfile_name(
            pg_catalog.pg_current_wal_insert_lsn()), 1, 8))::bit(32)::bigint END,
    cluster, physical, logical_shards, id_epoch_ms
FROM shardkit.identity AS i
"""

_CLOSE_TO_IT = 0.1
"""Seconds before the deadline in which the server's own timeout may be the first to notice."""


def connection_error(
    error: Exception, endpoint: Endpoint
) -> PoolTimeoutError | EndpointUnavailableError | ConfigurationError | DeadlineExceededError:
    """Return the shardkit error for a connection that could not be had, or that was lost."""
    without_frames(error)  # the driver's hold the password
    if deadlines.is_over():
        return DeadlineExceededError(endpoint=str(endpoint))
    if isinstance(error, PoolExhaustedError):
        return PoolTimeoutError(endpoint=str(endpoint), hint="raise pool.size or try again")
    cause = error.orig if isinstance(error, DBAPIError) else error
    reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
    found = farewell(reason)
    if found is Farewell.LOGIN_REFUSED:
        _, _, told = reason.partition("FATAL:")
        return ConfigurationError(
            f"refuses the login: {told.strip()}",
            endpoint=str(endpoint),
            hint="correct its address in shardkit.toml",
        )
    if found is Farewell.NO_SERVER_IN_TIME:
        return PoolTimeoutError(
            "PgBouncer had no server connection to lend in time",
            endpoint=str(endpoint),
            hint="its server is gone, or raise its default_pool_size; try again",
            retry_after=RETRY_AFTER,
        )
    return EndpointUnavailableError(
        f"no connection: {reason}",
        endpoint=str(endpoint),
        retry_after=None if found is None else RETRY_AFTER,
    )


def is_unsent(error: BaseException | None) -> bool:
    """Tell whether PgBouncer ended a call before any server was given it."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    if not isinstance(cause, psycopg.OperationalError):
        return False
    return farewell(str(cause)) in {Farewell.NO_SERVER_IN_TIME, Farewell.SERVER_GONE}


def late_error(
    error: Exception, endpoint: Endpoint | None = None
) -> DeadlineExceededError | StatementTimeoutError | None:
    """Return the shardkit error of a statement that was given up in time, or None.

    Its connection may be as good as before.

    Args:
        error: of the driver, as SQLAlchemy wraps it.
        endpoint: which server was asked.
    """
    cause = error.orig if isinstance(error, DBAPIError) else error
    where = None if endpoint is None else str(endpoint)
    found = deadlines.current()
    if isinstance(cause, psycopg.errors.QueryCanceled):
        if found is not None and found.left() < _CLOSE_TO_IT:
            return DeadlineExceededError(endpoint=where)
        return None
    if not isinstance(cause, WaitedTooLongError):
        return None
    if cause.by_deadline:
        return DeadlineExceededError(endpoint=where)
    return StatementTimeoutError(
        f"no answer within {cause.patience:g} seconds",
        endpoint=where,
        hint="raise limits.statement_timeout, or bound the call with shardkit.deadline()",
    )


def checks_server(
    topology: Topology,
    endpoint: Endpoint,
    fingerprints: Fingerprints,
    meets: Callable[[int], None],
    believed: Callable[[], Answer | None],
    *,
    is_reader: bool,
) -> Callable[[Any, Any], None]:
    """Return the check of a new connection: the right cluster, physical shard and role.

    It notes how the rows of tables were placed, and whose log the connection reads. Behind a
    pooler it looks at one of the servers' connections, and another one, after a failover to
    another server, may serve the next transaction: it finds mistakes of configuration, and does
    not replace a check per transaction.

    Args:
        topology: what is expected.
        endpoint: where the connections go.
        fingerprints: told how the rows of tables were placed.
        meets: told the system identifier of the server.
        believed: returns what is believed of the primary, None before it has answered.
        is_reader: whether the server itself must refuse to write.
    """
    expected = (topology.name, endpoint.physical, topology.n_logical_shards, EPOCH_MS)

    def check(connection: Any, _record: Any) -> None:
        cursor = connection.cursor()
        try:
            cursor.execute(_CHECK)
            row = cursor.fetchone()
        except (psycopg.errors.UndefinedTable, psycopg.errors.InsufficientPrivilege):
            row = None
        finally:
            cursor.close()
            if not getattr(connection, "driver_connection", connection).closed:
                connection.rollback()
        if row is None:
            if endpoint.role is Role.REPLICA:  # it may not have replayed the first migration yet
                raise EndpointUnavailableError("not migrated yet", endpoint=str(endpoint))
            raise ConfigurationError(
                "holds no shardkit schema, or one of an older version",
                endpoint=str(endpoint),
                hint="run shardkit migrate apply",
            )
        stored, is_read_only, in_recovery, pid, system, registered, timeline, *found = row
        _refuse_successors(endpoint, believed(), system, registered, timeline)
        if in_recovery is not (endpoint.role is Role.REPLICA):
            # Nobody has told this process yet who the primary is; a pooler will lead to it.
            is_pooled = topology.physical[endpoint.physical].pooler is not None
            if is_pooled and in_recovery and believed() is None:
                raise EndpointUnavailableError(
                    "is a replica, but the configuration says primary",
                    endpoint=str(endpoint),
                    hint="a failover is under way, or its pooler leads to the wrong server",
                )
            raise ConfigurationError(
                f"is a {'replica' if in_recovery else 'primary'}, "
                f"but the configuration says {endpoint.role}",
                endpoint=str(endpoint),
                hint="correct its place in shardkit.toml",
            )
        if tuple(found) != expected:
            raise ConfigurationError(
                "belongs to cluster {!r}, physical shard {!r}, {} logical shards, "
                "id epoch {}".format(*found),
                endpoint=str(endpoint),
                hint="expected {!r}, {!r}, {}, {}; correct shardkit.toml".format(*expected),
            )
        if is_reader and not is_read_only:
            raise ConfigurationError(
                f"lets readers of physical shard {endpoint.physical!r} write",
                endpoint=str(endpoint),
                hint="give physical.reader an address whose connections are read-only, in "
                "pgbouncer.ini by connect_query='SET default_transaction_read_only = on'",
            )
        fingerprints.note(stored)
        driver: Gated = getattr(connection, "driver_connection", connection)
        driver.system = system
        # A pooler gives its clients numbers of its own.
        driver.is_direct = pid == cast("Any", driver).pgconn.backend_pid
        meets(system)

    def check_or_close(connection: Any, record: Any) -> None:
        try:
            check(connection, record)
        except BaseException:  # the pool forgets a connection that it could not finish
            connection.close()
            raise

    return check_or_close


def _refuse_successors(
    endpoint: Endpoint,
    believed: Answer | None,
    system: int,
    registered: int | None,
    timeline: int | None,
) -> None:
    """Refuse a server whose role has changed, or is about to; another one may do.

    Args:
        endpoint: the server, in the role that it is asked for.
        believed: what is believed of the primary.
        system: its system identifier.
        registered: the timeline that is registered there.
        timeline: of a primary; None for a replica.
    """
    if endpoint.role is Role.PRIMARY and timeline is not None:
        found = Answer(system, timeline, {}, registered)
        if registered not in {None, timeline}:
            raise EndpointUnavailableError(
                f"was promoted to timeline {timeline}, which is not registered",
                endpoint=str(endpoint),
                hint="run shardkit failover adopt, or leave it to shardkit failover watch",
            )
        if believed is not None and believed.system == system and not is_lawful(believed, found):
            raise EndpointUnavailableError(
                f"is on timeline {timeline}, and {believed.timeline} is the newest",
                endpoint=str(endpoint),
                hint="another server has been promoted instead of it",
            )
    if believed is None or believed.system != system:
        return
    is_demoted = endpoint.role is Role.PRIMARY and timeline is None
    is_raised = endpoint.role is Role.REPLICA and timeline not in {None, believed.timeline}
    if is_demoted or is_raised:
        raise EndpointUnavailableError(
            "is a replica now" if is_demoted else "is no replica now", endpoint=str(endpoint)
        )


def replace_if_dead(connection: Any, record: Any, _proxy: Any) -> None:
    """Have the pool replace a connection whose socket already says goodbye.

    An idle server connection is silent; anything to read is the end of the stream or a notice
    of shutdown. Costs one system call and no round trip.
    """
    if "poll" not in record.info:
        driver = getattr(connection, "driver_connection", connection)
        poll = select.poll()
        poll.register(driver.fileno(), select.POLLIN)
        record.info["poll"] = (driver, poll)
    driver, poll = record.info["poll"]
    if driver.closed or poll.poll(0):
        raise DisconnectionError


def is_idle(connection: Connection) -> bool:
    """Tell whether a connection is open, in no transaction, and no answer is on its way."""
    if connection.closed or connection.invalidated:
        return False
    driver: Any = connection.connection.driver_connection
    return not driver.closed and bool(driver.pgconn.transaction_status == _IDLE)


def end_transaction(connection: Any, _record: Any, state: Any) -> None:
    """End what a stream left open on a connection that returns to its pool.

    Sessions that are closed leave nothing; this is for those that are forgotten.
    """
    driver = getattr(connection, "driver_connection", connection)
    if state.asyncio_safe and not driver.closed and driver.pgconn.transaction_status != _IDLE:
        connection.rollback()
