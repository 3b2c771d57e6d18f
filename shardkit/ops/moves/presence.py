"""One mover at a time for a logical shard: a lock that its session holds, and a sign of life.

The lock is an advisory lock of a session on the target. A mover that has died loses it at once; one
that is frozen keeps it, but shows no life, so whoever takes the move up ends its sessions: a mover
that thaws finds all of its connections gone. Called by the driver.
"""

from __future__ import annotations

import threading
from typing import Any, Final

import psycopg

from shardkit.errors import EndpointUnavailableError, RefusedError
from shardkit.ops.direct import Unguarded, parameters
from shardkit.topology import PhysicalShard
from shardkit.waits import Connection

__all__ = ["SILENCE", "Presence", "application", "end_others", "open_connection"]

SILENCE: Final = 5.0
"""Seconds without a sign of life after which a mover is taken for frozen."""

PATIENCE: Final = 20.0
"""Seconds that a server has to answer what takes no time; the network may lose what was sent."""

_BEAT: Final = 1.0

_KEY: Final = 0x6D6F7665
"""First half of the advisory lock's key: "move" in ASCII."""

# No lock. A session of nobody's name is one that has ended meanwhile.
_HOLDER: Final = """
SELECT l.pid, date_part('epoch', clock_timestamp() - a.state_change), a.client_addr::text
FROM pg_locks AS l LEFT JOIN pg_stat_activity AS a USING (pid)
WHERE l.locktype = 'advisory' AND l.classid = %s AND l.objid = %s AND l.objsubid = 2 AND l.granted
    AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""

_END: Final = """
SELECT pg_terminate_backend(pid, 2000) FROM pg_stat_activity
WHERE application_name = %s AND pid <> pg_backend_pid() AND pid <> ALL (%s)
    AND datname = current_database()
"""

_ALIVE: Final = {
    "keepalives_idle": "5",
    "keepalives_interval": "2",
    "keepalives_count": "3",
    "tcp_user_timeout": "15000",
}


def application(logical_shard: int) -> str:
    """Return what `pg_stat_activity` shows for the sessions of a mover."""
    return f"shardkit move {logical_shard:04d}"


def open_connection(
    shard: PhysicalShard, logical_shard: int, *, patience: float | None = PATIENCE, **options: Any
) -> psycopg.Connection[Any]:
    """Open a connection of a mover in autocommit mode, to the primary of a physical shard.

    Args:
        shard: which.
        logical_shard: that is moved.
        patience: seconds it waits for an answer; None for as long as it takes.
        options: further ones of libpq.

    Raises:
        EndpointUnavailableError: it does not accept the connection (retryable).
    """
    url = shard.mover_url or shard.admin_url
    given = parameters(url, application=application(logical_shard))
    try:
        given = {**given, **_ALIVE, **options}
        if patience is None:
            connection = psycopg.connect(autocommit=True, **given)
        else:
            connection = Connection.open(
                "", patience=patience, guard=Unguarded(), autocommit=True, **given
            )
        if "replication" not in options:
            if shard.roles.owner not in {url.username, shard.roles.admin}:
                connection.execute(
                    psycopg.sql.SQL("SET ROLE {}").format(psycopg.sql.Identifier(shard.roles.owner))
                )
            # A mover that is gone is noticed in the middle of a long statement.
            connection.execute("SET client_connection_check_interval = '1s'")
    except psycopg.OperationalError as error:
        raise EndpointUnavailableError(
            f"physical shard {shard.name!r} does not answer the mover",
            hint=str(error).strip().splitlines()[-1],
            endpoint=str(shard.primary),
            logical_shard=logical_shard,
        ) from None
    return connection


def end_others(connection: psycopg.Connection[Any], logical_shard: int, *keep: int) -> None:
    """End every other session of movers of a logical shard on this server.

    Args:
        connection: of the one that goes on.
        logical_shard: which.
        keep: process ids of its further sessions here.
    """
    connection.execute(_END, (application(logical_shard), list(keep)))


class Presence:
    """The lock of one mover, and its sign of life.

    Args:
        shard: the target.
        logical_shard: that is moved.

    Raises:
        RefusedError: another mover is at work.
        EndpointUnavailableError: the target does not answer (retryable).
    """

    def __init__(self, shard: PhysicalShard, logical_shard: int) -> None:
        self._connection = open_connection(shard, logical_shard)
        self._shard = logical_shard
        self._stop = threading.Event()
        self.is_lost = False
        self._asking = threading.Lock()
        try:
            self._take()
        except BaseException:
            self._connection.close()
            raise
        self._thread = threading.Thread(target=self._beat, name="shardkit mover", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        """Process id of its session on the target."""
        return self._connection.info.backend_pid

    def check(self) -> None:
        """Make sure that this mover has the lock still.

        Raises:
            EndpointUnavailableError: it has not: another mover may have taken over.
        """
        if not self.is_lost:
            try:
                with self._asking:
                    self._connection.execute("SELECT 1")
            except psycopg.Error:
                self.is_lost = True
        if self.is_lost:
            raise EndpointUnavailableError(
                "the session that holds the mover's lock has ended",
                hint="another mover may have taken over; else: shardkit move resume",
                logical_shard=self._shard,
            )

    def close(self) -> None:
        """Give the lock back."""
        self._stop.set()
        self._thread.join()
        self._connection.close()

    def _take(self) -> None:
        for _ in range(3):
            row = self._connection.execute(
                "SELECT pg_try_advisory_lock(%s, %s)", (_KEY, self._shard)
            ).fetchone()
            if row == (True,):
                return
            holder: Any = self._connection.execute(_HOLDER, (_KEY, self._shard)).fetchone()
            if holder is None:
                continue
            pid, silent, address = holder
            if silent is not None and silent < SILENCE:
                raise RefusedError(
                    f"another mover is at work, from {address} (process {pid} of the target)",
                    hint="wait for it, or end it; shardkit move status shows how far it is",
                    logical_shard=self._shard,
                )
            end_others(self._connection, self._shard)
        raise RefusedError(
            "the lock of its mover cannot be had",
            hint="look for a session of another mover on the target",
            logical_shard=self._shard,
        )

    def _beat(self) -> None:
        while not self._stop.wait(_BEAT):
            try:
                with self._asking:
                    self._connection.execute("SELECT 1")
            except psycopg.Error:
                self.is_lost = True
                return
