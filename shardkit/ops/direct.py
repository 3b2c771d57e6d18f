"""Connections for commands: straight to a primary, with the login that owns the schemas.

Called by the modules of `shardkit.ops`. A session lock does not survive a pooler, so these
never go through PgBouncer; they are opened per command and never pooled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import psycopg

from shardkit.errors import EndpointUnavailableError
from shardkit.topology import PhysicalShard

__all__ = ["connect"]

CONNECT_TIMEOUT = 5
"""Seconds a server has to accept a connection."""


def connect(shard: PhysicalShard, *, application: str) -> psycopg.Connection[tuple[Any, ...]]:
    """Open a connection in autocommit mode to the primary of a physical shard.

    Args:
        shard: whose `admin_url` is used.
        application: what `pg_stat_activity` shows.

    Raises:
        EndpointUnavailableError: it does not accept the connection (retryable).
    """
    url = shard.admin_url
    parameters: Mapping[str, Any] = {
        "connect_timeout": CONNECT_TIMEOUT,
        "application_name": application,
        **url.query,
        "host": url.host,
        "port": url.port or 5432,
        "dbname": url.database,
        "user": url.username,
        "password": url.password,
    }
    try:
        return psycopg.connect(autocommit=True, **parameters)
    except psycopg.OperationalError as error:
        raise EndpointUnavailableError(
            f"physical shard {shard.name!r} does not accept the admin login",
            hint=str(error).strip().splitlines()[-1],
            endpoint=str(shard.primary),
        ) from error
