"""`shardkit status`: what every endpoint is, does and lags, asked of all at the same time.

Each is asked with the application's login, so that the answer is what clients would get. Called by
the command line; changes nothing. A server that does not answer in time is shown as unreachable
and keeps nobody else waiting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import psycopg

from shardkit import deadlines
from shardkit.breaker import Breaker
from shardkit.ops.direct import parameters
from shardkit.parallel import run
from shardkit.topology import Endpoint, PhysicalShard, Role, Topology, like
from shardkit.waits import Connection
from shardkit.windows import BreakerRules

__all__ = ["EndpointStatus", "is_healthy", "read_status"]

TIMEOUT: Final = 3.0
"""Seconds that all servers together have to answer."""

# Takes no lock. The epoch is the highest of the logical shards that it owns; a replica's lag in
# seconds is the age of what it replayed last, unless it has replayed all it received.
_ASK: Final = """
SELECT pg_is_in_recovery() AS in_recovery,
    CASE WHEN pg_is_in_recovery() THEN coalesce(pg_last_wal_replay_lsn(), '0/0')
        ELSE pg_current_wal_flush_lsn() END - '0/0'::pg_lsn AS position,
    CASE WHEN NOT pg_is_in_recovery() THEN NULL
        WHEN pg_last_wal_replay_lsn() >= pg_last_wal_receive_lsn() THEN 0.0
        ELSE extract(epoch FROM clock_timestamp() - pg_last_xact_replay_timestamp())
        END::float8 AS lag,
    (SELECT count(*) FROM pg_stat_activity
        WHERE datname = current_database() AND pid <> pg_backend_pid()) AS connections,
    (SELECT max(epoch) FROM shardkit.ownership WHERE state = 'active') AS epoch,
    current_setting('server_version') AS version
"""


@dataclass(frozen=True, slots=True)
class EndpointStatus:
    """One endpoint as it answered.

    Attributes:
        endpoint: the server as `physical/role@host:port`.
        physical: name of its physical shard.
        role: what the configuration says it is: `primary` or `replica`.
        is_reachable: whether it answered in time.
        actual_role: what it says it is, or None when it did not answer.
        lag_bytes: log of the primary that a replica has not replayed; 0 for a primary, None when
            one of the two did not answer.
        lag: seconds that a replica is behind what it has received; 0 for a primary, None when
            unknown.
        epoch: the highest epoch of the logical shards it holds, or None.
        connections: other connections to the database, or None.
        breaker: what the breaker of a client that asks now would be: `closed` or `open`. Those of
            running programs are their own, and tell their listeners.
        version: of the server, or None.
        error: why it did not answer, in one line, or None.
    """

    endpoint: str
    physical: str
    role: str
    is_reachable: bool
    actual_role: str | None
    lag_bytes: int | None
    lag: float | None
    epoch: int | None
    connections: int | None
    breaker: str
    version: str | None
    error: str | None


def read_status(topology: Topology, *, timeout: float = TIMEOUT) -> list[EndpointStatus]:
    """Return the status of every endpoint, in the order of the configuration.

    Args:
        topology: the cluster.
        timeout: seconds that all of them have to answer, above 0.
    """
    endpoints = topology.endpoints
    # One failure opens it: a command asks once.
    breakers = [Breaker(str(e), rules=BreakerRules(consecutive=1)) for e in endpoints]
    with deadlines.deadline(timeout):
        answers = run(
            [
                partial(_ask, topology.physical[e.physical], e, breaker)
                for e, breaker in zip(endpoints, breakers, strict=True)
            ]
        )
    positions = {
        endpoint: answer["position"]
        for endpoint, answer in zip(endpoints, answers, strict=True)
        if not isinstance(answer, Exception)
    }
    return [
        _status(topology, endpoint, answer, positions, breaker.current_state)
        for endpoint, answer, breaker in zip(endpoints, answers, breakers, strict=True)
    ]


def is_healthy(found: Sequence[EndpointStatus]) -> bool:
    """Tell whether every endpoint answers and is what the configuration says."""
    return all(each.is_reachable and each.actual_role == each.role for each in found)


def _ask(shard: PhysicalShard, endpoint: Endpoint, guard: Breaker) -> dict[str, Any]:
    # Where applications connect, through a pooler or not; as the monitor, where there is one.
    url = endpoint.url if shard.monitor_url is None else like(shard.monitor_url, endpoint.url)
    options = parameters(url, application="shardkit status")
    connection = Connection.open("", patience=TIMEOUT, guard=guard, autocommit=True, **options)
    try:
        cursor = connection.execute(_ASK)
        assert cursor.description is not None, "a SELECT has columns"
        names = [column.name for column in cursor.description]
        row = cursor.fetchone()
        assert row is not None, "it selects no table"
        return dict(zip(names, row, strict=True))
    finally:
        connection.close()


def _status(
    topology: Topology,
    endpoint: Endpoint,
    answer: dict[str, Any] | Exception,
    positions: dict[Endpoint, Any],
    breaker: str,
) -> EndpointStatus:
    found: dict[str, Any] = {} if isinstance(answer, Exception) else answer
    is_replica = found.get("in_recovery")
    primary = positions.get(topology.physical[endpoint.physical].primary)
    lag_bytes = None
    if is_replica is False:
        lag_bytes = 0
    elif is_replica and primary is not None:
        # The replica is asked at the same time, so it may have replayed more by now.
        lag_bytes = max(0, int(primary - found["position"]))
    return EndpointStatus(
        endpoint=str(endpoint),
        physical=endpoint.physical,
        role=str(endpoint.role),
        is_reachable=bool(found),
        actual_role=None
        if is_replica is None
        else str(Role.REPLICA if is_replica else Role.PRIMARY),
        lag_bytes=lag_bytes,
        lag=0.0 if is_replica is False else found.get("lag"),
        epoch=found.get("epoch"),
        connections=found.get("connections"),
        breaker=breaker,
        version=found.get("version"),
        error=_reason(answer) if isinstance(answer, Exception) else None,
    )


def _reason(error: Exception) -> str:
    if isinstance(error, psycopg.errors.UndefinedTable | psycopg.errors.InsufficientPrivilege):
        return "not migrated; run shardkit migrate apply"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
