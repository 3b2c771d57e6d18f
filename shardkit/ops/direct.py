"""Connections for commands: straight to a primary, with the login that owns the schemas.

Called by the modules of `shardkit.ops`. A session lock does not survive a pooler, so these
never go through PgBouncer; they are opened per command and never pooled.
"""

from __future__ import annotations

from typing import Any

import psycopg
from sqlalchemy import URL

from shardkit.errors import EndpointUnavailableError
from shardkit.topology import PhysicalShard
from shardkit.waits import Connection

__all__ = ["Unguarded", "connect", "parameters"]

CONNECT_TIMEOUT = 5
"""Seconds a server has to accept a connection."""


class Unguarded:
    """A guard that nobody listens to: a command asks once and reports what it hears."""

    def succeeded(self, seconds: float) -> None:
        """Ignore it."""

    def failed(self, error: BaseException, seconds: float) -> None:
        """Ignore it."""


def parameters(url: URL, *, application: str) -> dict[str, Any]:
    """Return what psycopg connects with to reach an address.

    Args:
        url: the address.
        application: what `pg_stat_activity` shows.
    """
    return {
        "connect_timeout": CONNECT_TIMEOUT,
        "application_name": application,
        **url.query,
        "host": url.host,
        "port": url.port or 5432,
        "dbname": url.database,
        "user": url.username,
        "password": url.password,
    }


def connect(
    shard: PhysicalShard, *, application: str, patience: float | None = None
) -> psycopg.Connection[tuple[Any, ...]]:
    """Open a connection in autocommit mode to the primary of a physical shard.

    Args:
        shard: whose `admin_url` is used.
        application: what `pg_stat_activity` shows.
        patience: seconds it waits for an answer; None for ever.

    Raises:
        EndpointUnavailableError: it does not accept the connection (retryable).
    """
    options = parameters(shard.admin_url, application=application)
    try:
        if patience is not None:
            return Connection.open("", patience=patience, guard=_GUARD, autocommit=True, **options)
        return psycopg.connect(autocommit=True, **options)
    except psycopg.OperationalError as error:
        raise EndpointUnavailableError(
            f"physical shard {shard.name!r} does not accept the admin login",
            hint=str(error).strip().splitlines()[-1],
            endpoint=str(shard.primary),
        ) from error


_GUARD = Unguarded()
