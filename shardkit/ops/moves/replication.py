"""What carries changes from one server to another during a move: publication, slot, subscription.

All three have one name for a logical shard, `shardkit_move_0042`: a server publishes it in one
direction and subscribes to it in the other, so the way back needs no names of its own. Everything
here can be done again, and says nothing where it was done. Changes that the other side has sent
are not sent back (`origin = none`, PostgreSQL 16). Called by the driver; decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, LiteralString

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo
from sqlalchemy import URL

from shardkit.errors import TryAgainError
from shardkit.topology import libpq_options, schema_name

__all__ = [
    "NAMES",
    "Progress",
    "advance_slot",
    "conninfo",
    "drop_slot",
    "enable",
    "exported_slot",
    "is_following",
    "make_slot",
    "name_of",
    "progress",
    "publish",
    "subscribe",
    "unpublish",
    "unsubscribe",
]

Connection = psycopg.Connection[Any]

NAMES: Final = "shardkit_move_"
"""What the names of publications, slots and subscriptions begin with."""

# AccessShareLock on catalogues.
_TABLES: Final = """
SELECT relname FROM pg_catalog.pg_class
WHERE relnamespace = %s::regnamespace AND relkind IN ('r', 'p') AND NOT relispartition
ORDER BY relname
"""

# No lock.
_SLOT: Final = """
SELECT s.active_pid, s.wal_status, to_jsonb(s) ->> 'invalidation_reason',
    pg_catalog.pg_wal_lsn_diff(pg_catalog.pg_current_wal_flush_lsn(),
        coalesce(r.replay_lsn, s.confirmed_flush_lsn)),
    coalesce(r.replay_lsn, s.confirmed_flush_lsn)::text
FROM pg_catalog.pg_replication_slots AS s
    LEFT JOIN pg_catalog.pg_stat_replication AS r ON r.pid = s.active_pid
WHERE s.slot_name = %s AND s.database = current_database()
"""

# AccessShareLock on catalogues. Counters of conflicts came with PostgreSQL 18.
_FOLLOWING: Final = """
SELECT s.subenabled, t.apply_error_count,
    (SELECT string_agg(key || ' ' || value, ', ') FROM jsonb_each_text(to_jsonb(t))
     WHERE key LIKE 'confl\\_%%' AND value <> '0')
FROM pg_catalog.pg_subscription AS s
    LEFT JOIN pg_catalog.pg_stat_subscription_stats AS t ON t.subid = s.oid
WHERE s.subname = %s
    AND s.subdbid = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database())
"""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a subscriber is.

    Attributes:
        has_slot: whether the publisher keeps the log for it.
        lag_bytes: of log that it has not confirmed; 0 without a slot.
        position: how far it is, as text; None without a slot.
        lost: why the slot can be used no more; None while it can.
        is_enabled: whether there is a subscription, and it is to run.
        errors: times that the apply has failed, ever.
        conflicts: of which kinds, as far as the server counts them.
    """

    has_slot: bool
    lag_bytes: int
    position: str | None
    lost: str | None
    is_enabled: bool
    errors: int
    conflicts: str | None


def name_of(logical_shard: int) -> str:
    """Return the name of publication, slot and subscription."""
    return f"{NAMES}{logical_shard:04d}"


def conninfo(url: URL, logical_shard: int) -> str:
    """Return how a subscriber connects to the other server; it has the password."""
    options = {
        "application_name": name_of(logical_shard),
        "connect_timeout": "5",
        "keepalives_idle": "5",
        "keepalives_interval": "2",
        "keepalives_count": "3",
    }
    return make_conninfo(**{**options, **libpq_options(url)})


def publish(connection: Connection, logical_shard: int) -> None:
    """Publish the tables of a logical shard, by name."""
    name = sql.Identifier(name_of(logical_shard))
    schema = schema_name(logical_shard)
    tables = [str(table) for (table,) in connection.execute(_TABLES, (schema,))]
    with connection.transaction():
        _drop_publication(connection, name)
        # ShareUpdateExclusiveLock on each table, as the owner of all. Partitions are published by
        # their parent.
        connection.execute(
            sql.SQL(
                "CREATE PUBLICATION {} FOR TABLE {} WITH (publish_via_partition_root = true)"
            ).format(name, sql.SQL(", ").join(sql.Identifier(schema, table) for table in tables))
        )


def unpublish(connection: Connection, logical_shard: int) -> None:
    """Publish no more."""
    _drop_publication(connection, sql.Identifier(name_of(logical_shard)))


def _drop_publication(connection: Connection, name: sql.Identifier) -> None:
    connection.execute(sql.SQL("DROP PUBLICATION IF EXISTS {}").format(name))


def exported_slot(connection: Connection, logical_shard: int) -> str:
    """Make the slot anew, and return the name of the snapshot where it begins.

    Waits for every transaction that is writing now.

    Args:
        connection: of the replication protocol; the snapshot lasts until its next command.
        logical_shard: which.
    """
    row = connection.execute(
        sql.SQL("CREATE_REPLICATION_SLOT {} LOGICAL pgoutput (SNAPSHOT 'export')").format(
            sql.Identifier(name_of(logical_shard))
        )
    ).fetchone()
    assert row is not None, "the command answers"
    return str(row[2])


def make_slot(connection: Connection, logical_shard: int) -> None:
    """Make the slot where there is none; waits for every transaction that is writing now."""
    name = name_of(logical_shard)
    found = connection.execute(_SLOT, (name,))
    if found.fetchone() is None:
        connection.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", (name,))


def advance_slot(connection: Connection, logical_shard: int) -> None:
    """Let a slot that nobody uses begin now: what came before is not sent."""
    connection.execute(
        "SELECT pg_replication_slot_advance(slot_name, pg_current_wal_flush_lsn()) "
        "FROM pg_replication_slots WHERE slot_name = %s AND active_pid IS NULL "
        "AND database = current_database()",
        (name_of(logical_shard),),
    )


def drop_slot(connection: Connection, logical_shard: int, *, attempts: int = 100) -> None:
    """Drop the slot, and end who uses it.

    Raises:
        TryAgainError: it stays in use (retryable).
    """
    name = name_of(logical_shard)
    query: LiteralString = (
        "SELECT active_pid FROM pg_replication_slots WHERE slot_name = %s "
        "AND database = current_database()"
    )
    for _ in range(attempts):
        row = connection.execute(query, (name,)).fetchone()
        if row is None:
            return
        try:
            if row[0] is None:
                connection.execute("SELECT pg_drop_replication_slot(%s)", (name,))
                return
            connection.execute("SELECT pg_terminate_backend(%s, 500)", (row[0],))
        except psycopg.errors.ObjectInUse:
            connection.execute("SELECT pg_sleep(0.05)")
        except psycopg.errors.UndefinedObject:
            return
    raise TryAgainError(
        f"the replication slot {name} stays in use",
        hint="look who uses it: pg_replication_slots.active_pid",
        logical_shard=logical_shard,
    )


# By default PostgreSQL logs every statement that fails, and this one has the password in it.
_UNLOGGED: Final = """
SELECT set_config(name, value, true) FROM (VALUES ('log_min_error_statement', 'panic'),
    ('log_statement', 'none'), ('log_min_duration_statement', '-1')) AS wanted (name, value)
WHERE has_parameter_privilege(current_user, name, 'SET')
"""


def subscribe(connection: Connection, logical_shard: int, url: URL) -> None:
    """Make a subscription that does not run yet, unless it is there.

    Its statement has the password of the mover. It is kept out of the server's log where the mover
    may say so: docs/moves.md.
    """
    name = name_of(logical_shard)
    if _following(connection, name) is not None:
        return
    # The list of tables is read over the connection; none is copied.
    statement = sql.SQL(
        "CREATE SUBSCRIPTION {} CONNECTION {} PUBLICATION {} WITH (create_slot = false, "
        "slot_name = {}, copy_data = false, enabled = false, origin = none, "
        "streaming = off, synchronous_commit = off)"
    ).format(sql.Identifier(name), conninfo(url, logical_shard), sql.Identifier(name), name)
    with connection.transaction():
        connection.execute(_UNLOGGED)
        connection.execute(statement)


def enable(connection: Connection, logical_shard: int, url: URL | None = None) -> None:
    """Let a subscription run, to an address that may have changed."""
    name = sql.Identifier(name_of(logical_shard))
    if url is not None:
        text = conninfo(url, logical_shard)
        with connection.transaction():
            connection.execute(_UNLOGGED)
            connection.execute(sql.SQL("ALTER SUBSCRIPTION {} CONNECTION {}").format(name, text))
    connection.execute(sql.SQL("ALTER SUBSCRIPTION {} ENABLE").format(name))


def is_following(connection: Connection, logical_shard: int) -> bool:
    """Return whether there is a subscription here."""
    return _following(connection, name_of(logical_shard)) is not None


def unsubscribe(connection: Connection, logical_shard: int) -> None:
    """Drop the subscription here; its slot, on the other server, stays."""
    name = name_of(logical_shard)
    if _following(connection, name) is None:
        return
    identifier = sql.Identifier(name)
    with connection.transaction():
        for text in ("DISABLE", "SET (slot_name = NONE)"):
            altered = sql.SQL("ALTER SUBSCRIPTION {} {}").format(identifier, sql.SQL(text))
            connection.execute(altered)
        connection.execute(sql.SQL("DROP SUBSCRIPTION {}").format(identifier))


def _following(connection: Connection, name: str) -> Any:
    return connection.execute(_FOLLOWING, (name,)).fetchone()


def progress(publisher: Connection, subscriber: Connection, logical_shard: int) -> Progress:
    """Return how far the subscriber is."""
    name = name_of(logical_shard)
    slot: Any = publisher.execute(_SLOT, (name,)).fetchone()
    following: Any = _following(subscriber, name)
    lost = None
    if slot is not None and (slot[1] == "lost" or slot[2] is not None):
        lost = f"the replication slot is lost: {slot[2] or 'its log was removed'}"
    return Progress(
        has_slot=slot is not None,
        lag_bytes=max(0, int(slot[3])) if slot is not None and slot[3] is not None else 0,
        position=None if slot is None else slot[4],
        lost=lost,
        is_enabled=following is not None and following[0],
        errors=0 if following is None else following[1] or 0,
        conflicts=None if following is None else following[2],
    )
