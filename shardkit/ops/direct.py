"""Connections for commands: straight to a primary, with the login that owns the schemas.

Called by the modules of `shardkit.ops`. A session lock does not survive a pooler, so these
never go through PgBouncer; they are opened per command and never pooled.
"""

from __future__ import annotations

from typing import Any

import psycopg
from sqlalchemy import URL

from shardkit.errors import EndpointUnavailableError
from shardkit.secret import without_frames
from shardkit.topology import PhysicalShard, libpq_options
from shardkit.waits import Connection

__all__ = ["Unguarded", "connect", "is_refused", "parameters"]

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
        **libpq_options(url),
    }


def connect(
    shard: PhysicalShard,
    *,
    application: str,
    patience: float | None = None,
    url: URL | None = None,
) -> psycopg.Connection[tuple[Any, ...]]:
    """Open a connection in autocommit mode to the primary of a physical shard.

    Args:
        shard: which is meant.
        application: what `pg_stat_activity` shows.
        patience: seconds it waits for an answer; None for ever.
        url: its address with a login; None for its `admin_url`.

    Raises:
        EndpointUnavailableError: it does not accept the connection (retryable).
    """
    login = url or shard.admin_url
    options = parameters(login, application=application)
    try:
        if patience is not None:
            return Connection.open("", patience=patience, guard=_GUARD, autocommit=True, **options)
        return psycopg.connect(autocommit=True, **options)
    except psycopg.OperationalError as error:
        reason = str(error).strip().splitlines()[-1]
        if is_refused(error) and login.username != shard.roles.admin:
            reason += "; `shardkit roles apply` makes the roles"
        raise EndpointUnavailableError(
            f"physical shard {shard.name!r} does not accept the login {login.username!r}",
            hint=reason,
            endpoint=str(shard.primary),
        ) from without_frames(error)


def is_refused(error: psycopg.Error) -> bool:
    """Tell whether a server answers, and does not let this login in.

    libpq gives no SQLSTATE for what happens before there is a connection.
    """
    text = str(error)
    return "password authentication failed" in text or (
        'FATAL:  role "' in text and "does not exist" in text
    )


_GUARD = Unguarded()
