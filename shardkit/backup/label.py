"""One point in the logs of all servers at which nothing between two servers is half done.

A restore point is a name in the log of one server. Taken on all servers one after the other, such
points cut through what runs meanwhile: a commit may be decided before the cut of its coordinator
while its participant prepares after its own. What shardkit does over several servers is ordered by
few writes, and every such order has a write to one of four tables in the middle:

    decisions            prepared there  →  decided here  →  committed there  →  forgotten here
    shardkit_lookup      reserved there  →  the row commits here; the row goes  →  released there
    shardkit_directory   entered there   →  the first row commits here
    shardkit_effects     emitted there   →  noted here with the effect  →  delivered, deleted there

While nobody can write to these, a cut through all servers has the earlier step of each order
wherever it has the later one. So they are locked on every server (SHARE: writers wait, readers do
not), the restore points are written, the locks are let go. What is prepared at the cut is restored
so, and the decision record, restored with it or not there, says how it ends.

Source: consistent cuts, K. M. Chandy, L. Lamport, "Distributed Snapshots: Determining Global
States of Distributed Systems", 1985. Called by `create` and `archive`.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import psycopg
from psycopg import sql

from shardkit.backup.rows import Connection
from shardkit.clock import SYSTEM, Clock
from shardkit.errors import BackupError, TryAgainError
from shardkit.ops.ddllocks import MIGRATION_KEY

__all__ = ["Label", "Point", "no_migration", "segment_of", "take"]

_TABLES: Final = ("shardkit_directory", "shardkit_effects", "shardkit_lookup")

LOCK_TIMEOUT: Final = 0.3
"""Seconds to queue for the locks; those who commit queue behind. Then all are let go."""

LONG_LOCK_TIMEOUT: Final = 1.5
"""The same for every eighth attempt: autovacuum lets go of a table, but only for those who have
waited for `deadlock_timeout`, a second. Source: PostgreSQL manual, 24.1.6."""

ATTEMPTS: Final = 40
"""With a pause of up to half a second in between: some twenty seconds, longer than handlers and
commits take."""

SETTLING: Final = 5.0
"""Seconds the second snapshots wait for transactions that were under way at the label. Longer ones
have not begun their COMMIT, or not in vain: their rows are not known, which the drill tells."""

# SHARE: conflicts with writers, not with readers. Always in the same order.
_LOCK: Final = "SET LOCAL lock_timeout = {}; LOCK TABLE {} IN SHARE MODE"

_LOCKED: Final = """
SELECT n.nspname, c.relname FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE c.relkind = 'r' AND (n.nspname = 'shardkit' AND c.relname = 'decisions'
    OR n.nspname ~ '^shard_[0-9]{4}$' AND c.relname = ANY (%s))
ORDER BY 1, 2
"""

# The end of the restore point, its timeline, the time, and who was at work.
_POINT: Final = """
SELECT pg_create_restore_point(%s), substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8),
    clock_timestamp(), ARRAY(SELECT x::text FROM pg_snapshot_xip(pg_current_snapshot()) AS x
        WHERE NOT EXISTS (SELECT FROM pg_prepared_xacts AS p
            WHERE p.transaction::text::bigint = x::text::bigint %% 4294967296))
"""

_LEFT: Final = (
    "SELECT count(*) FROM pg_snapshot_xip(pg_current_snapshot()) AS x WHERE x::text = ANY (%s)"
)


@dataclass(frozen=True, slots=True)
class Point:
    """The label on one server.

    Attributes:
        lsn: end of the restore point, as PostgreSQL writes log positions.
        timeline: of the log.
        running: transactions that were under way, prepared ones left out.
    """

    lsn: str
    timeline: int
    running: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Label:
    """One consistent point over all servers.

    Attributes:
        name: of the restore points.
        at: when the first was taken, by that server's clock.
        window: seconds between the first and the last. What one client commits on two servers
            within them, one after the other and by itself, may be cut apart.
        points: by name of the physical shard.
    """

    name: str
    at: dt.datetime
    window: float
    points: Mapping[str, Point]


def segment_of(lsn: str, timeline: int, segment_bytes: int) -> str:
    """Return the name of the file of log that has the last byte before a position.

    Source: PostgreSQL, access/xlog_internal.h, XLogFileName.
    """
    high, low = (int(part, 16) for part in lsn.split("/"))
    number = ((high << 32) + low - 1) // segment_bytes
    per_id = (1 << 32) // segment_bytes
    return f"{timeline:08X}{number // per_id:08X}{number % per_id:08X}"


@contextlib.contextmanager
def no_migration(sessions: Mapping[str, Connection]) -> Iterator[None]:
    """Keep `shardkit migrate` away on every server, beside others who do.

    Raises:
        TryAgainError: a migration runs (retryable).
    """
    held: list[Connection] = []
    try:
        for physical in sorted(sessions):
            row = (
                sessions[physical]
                .execute("SELECT pg_try_advisory_lock_shared(%s)", (MIGRATION_KEY,))
                .fetchone()
            )
            if row != (True,):
                raise TryAgainError(
                    f"a migration is at work on physical shard {physical!r}",
                    hint="wait for it to end",
                )
            held.append(sessions[physical])
        yield
    finally:
        for connection in held:
            if not connection.closed:
                connection.execute("SELECT pg_advisory_unlock_shared(%s)", (MIGRATION_KEY,))


def take(
    sessions: Mapping[str, Connection],
    name: str,
    *,
    snapshots: Mapping[str, tuple[Connection, Connection]] | None = None,
    clock: Clock = SYSTEM,
) -> Label:
    """Take a label on all servers.

    Args:
        sessions: a connection of the admin's to every primary, in autocommit mode; with
            `no_migration`.
        name: of the restore points; never used before.
        snapshots: two connections to every primary. On return each is in a transaction: the first
            saw the last moment before the label, the second one after it. What both see alike is
            what a restore to the label brings back.
        clock: what pauses between two attempts.

    Raises:
        TryAgainError: the tables were in use all the time (retryable).
        BackupError: the login may not do this.
    """
    label = None
    for attempt in range(1, ATTEMPTS + 1):
        timeout = LOCK_TIMEOUT if attempt % 8 else LONG_LOCK_TIMEOUT
        try:
            with contextlib.ExitStack() as stack:
                for physical in sorted(sessions):
                    stack.enter_context(sessions[physical].transaction())
                    _lock(sessions[physical], timeout)
                label = _points(sessions, name, snapshots)
            break
        except psycopg.errors.LockNotAvailable:
            clock.sleep(0.05 + secrets.randbelow(450) / 1000)
        except psycopg.errors.InsufficientPrivilege as error:
            raise BackupError(
                f"the admin login may not take a label: {str(error).splitlines()[0]}",
                hint="GRANT EXECUTE ON FUNCTION pg_create_restore_point(text), pg_switch_wal() "
                "TO the admin, in the database of the cluster",
            ) from error
    if label is None:
        raise TryAgainError(
            "commits over several servers, or handlers, held their locks all the time",
            hint="see shardkit twophase status and shardkit outbox status",
        )
    for physical, (_, after) in (snapshots or {}).items():
        _settled(sessions[physical], label.points[physical].running, clock)
        _begin(after)
    return label


def _points(
    sessions: Mapping[str, Connection],
    name: str,
    snapshots: Mapping[str, tuple[Connection, Connection]] | None,
) -> Label:
    """Write the restore points; every lock is held."""
    for before, _ in (snapshots or {}).values():
        _begin(before)
    started = SYSTEM.monotonic()
    points: dict[str, Point] = {}
    at: dt.datetime | None = None
    for physical in sorted(sessions):
        row = sessions[physical].execute(_POINT, (name,)).fetchone()
        assert row is not None
        points[physical] = Point(str(row[0]), int(row[1], 16), tuple(row[3]))
        at = at or row[2]
    window = SYSTEM.monotonic() - started
    for connection in sessions.values():
        # A session that was ended meanwhile has lost its locks; this raises then.
        connection.execute("SELECT 1")
    assert at is not None
    return Label(name, at.astimezone(dt.UTC), window, points)


def _lock(connection: Connection, timeout: float) -> None:
    tables = connection.execute(_LOCKED, (list(_TABLES),)).fetchall()
    if tables:
        connection.execute(
            sql.SQL(_LOCK).format(
                round(timeout * 1000), sql.SQL(", ").join(sql.Identifier(*t) for t in tables)
            )
        )


def _begin(connection: Connection) -> None:
    """Open a transaction whose snapshot is that of now."""
    connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
    connection.execute("SELECT 1 FROM pg_catalog.pg_class LIMIT 1")


def _settled(connection: Connection, running: tuple[str, ...], clock: Clock) -> None:
    """Wait for transactions whose COMMIT may be in the log before others can see it."""
    deadline = clock.monotonic() + SETTLING
    while clock.monotonic() < deadline:
        if connection.execute(_LEFT, (list(running),)).fetchone() == (0,):
            return
        clock.sleep(0.01)
