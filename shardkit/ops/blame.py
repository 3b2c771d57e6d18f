"""What a failed transaction of a migration means, and whose fault it is.

Called by `shardkit.ops.physical`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import psycopg
from psycopg import errors as pg

from shardkit.ops.ledger import shard_script
from shardkit.ops.revisions import Revision
from shardkit.ops.steps import at_once, render
from shardkit.topology import RoleNames, schema_name

__all__ = ["blockers", "culprit", "first_line", "holders"]

Connection = psycopg.Connection[tuple[Any, ...]]

_ATTEMPTS = 5


def culprit(
    connection: Connection,
    revisions: Sequence[Revision],
    logical_shard: int | None,
    *,
    begin: str,
    roles: RoleNames,
) -> str:
    """Return which revision fails, by trying them one at a time and rolling back.

    Args:
        connection: outside a transaction.
        revisions: that were run in one transaction.
        logical_shard: where, or None for the admin schema and reference tables.
        begin: SQL that opens a transaction with its limits.
        roles: who gets which rights.
    """
    if logical_shard is None:
        about = f"revision {revisions[0].id} of reference tables" if revisions else ""
        return about or "the admin schema"
    if len(revisions) == 1:
        return f"revision {revisions[0].id}"
    for _ in range(_ATTEMPTS):
        name = "the objects of shardkit itself"
        try:
            connection.execute(begin.encode())
            own = shard_script(logical_shard, own=True, roles=roles, revisions=())
            connection.execute(own.encode())
            for revision in revisions:
                name = f"revision {revision.id}"
                text = "\n;\n".join(at_once(revision.statements))
                connection.execute(render(text, logical_shard).encode())
        except (pg.LockNotAvailable, pg.DeadlockDetected):
            continue  # somebody is in the way, which is not what failed
        except psycopg.Error:
            return name
        finally:
            if not connection.broken:
                connection.rollback()
        break
    return f"one of the revisions {', '.join(revision.id for revision in revisions)}"


def holders(connection: Connection, logical_shard: int | None) -> str | None:
    """Return who holds locks on a logical shard's tables, for the error's hint."""
    if logical_shard is None:
        return None
    # AccessShareLock on catalogues only.
    rows = connection.execute(
        "SELECT DISTINCT a.pid, a.usename, coalesce(nullif(a.application_name, ''), '?') "
        "FROM pg_locks AS l JOIN pg_class AS c ON c.oid = l.relation "
        "JOIN pg_stat_activity AS a ON a.pid = l.pid "
        "WHERE c.relnamespace = to_regnamespace(%s) AND l.granted AND a.pid <> pg_backend_pid() "
        "ORDER BY a.pid LIMIT 3",
        (schema_name(logical_shard),),
    ).fetchall()
    held = ", ".join(f"process {pid} ({user}, {name})" for pid, user, name in rows)
    return f"locks are held by {held}" if held else "the holder has gone meanwhile; try again"


def blockers(connection: Connection, logical_shard: int) -> str:
    """Return who keeps the tables of a logical shard from being fenced, and by what statement."""
    # AccessShareLock on catalogues only. Locks of a prepared transaction have no process.
    rows = connection.execute(
        "SELECT DISTINCT coalesce(format('process %%s (%%s, %%s), for %%s s: %%s', a.pid, "
        "a.usename, coalesce(nullif(a.application_name, ''), '?'), "
        "round(date_part('epoch', clock_timestamp() - a.xact_start)), left(a.query, 80)), "
        "format('prepared transaction %%s of %%s', p.gid, p.owner), 'a transaction that is over') "
        "FROM pg_locks AS l JOIN pg_class AS c ON c.oid = l.relation "
        "LEFT JOIN pg_stat_activity AS a ON a.pid = l.pid "
        "LEFT JOIN pg_locks AS x ON x.virtualtransaction = l.virtualtransaction AND l.pid IS NULL "
        "AND x.locktype = 'transactionid' "
        "LEFT JOIN pg_prepared_xacts AS p ON p.transaction = x.transactionid "
        "WHERE c.relnamespace = to_regnamespace(%s) AND l.granted AND "
        "l.pid IS DISTINCT FROM pg_backend_pid() AND l.mode <> 'AccessShareLock' LIMIT 3",
        (schema_name(logical_shard),),
    ).fetchall()
    held = "; ".join(str(text) for (text,) in rows)
    return f"locks are held by {held}" if held else "the holder has gone meanwhile; try again"


def first_line(error: Exception) -> str:
    """Return the first line of an error, or its kind when it says nothing."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
