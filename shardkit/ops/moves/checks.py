"""What is looked at before a move changes anything, and refused with what to do about it.

Each check is a line of the plan that `shardkit move plan` prints. Called by `shardkit.ops.moves`;
changes nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psycopg

from shardkit.clock import SYSTEM
from shardkit.ops.moves import transactions
from shardkit.ops.moves.copying import size_of, tables_of
from shardkit.ops.moves.replication import name_of
from shardkit.topology import PhysicalShard, schema_name

__all__ = ["LONG", "ROOM", "Check", "Side", "checks"]

LONG: Final = 60.0
"""Seconds after which a writing transaction of the source is too long for a move to begin: the slot
waits for it, and so would the fence."""

ROOM: Final = 1.3
"""Room wanted on the target, in sizes of the copy: tables, indexes, and the log of writing both."""

_OLDEST: Final = 160000
"""First version that keeps what it has received from going back, and lets others than superusers
subscribe. Source: release notes of PostgreSQL 16."""

_IDLE: Final = 3600
"""Seconds for which nobody may use the slot of a copy, or of a way back."""

_TRANSIENT: Final = 2.0
"""Seconds that a prepared transaction may be there: atomic commits over servers prepare and go."""

# AccessShareLock on catalogues and settings.
_FACTS: Final = """
SELECT pg_is_in_recovery(), current_setting('server_version_num')::int,
    (SELECT system_identifier FROM pg_control_system()),
    current_setting('wal_level'), current_setting('synchronous_standby_names'),
    current_setting('max_replication_slots')::int
        - (SELECT count(*) FROM pg_replication_slots)::int,
    current_setting('max_wal_senders')::int - (SELECT count(*) FROM pg_stat_replication)::int,
    pg_size_bytes(current_setting('max_slot_wal_keep_size')),
    current_setting('max_logical_replication_workers')::int
        - (SELECT count(*) FROM pg_stat_subscription WHERE pid IS NOT NULL)::int,
    r.rolsuper OR r.rolreplication,
    r.rolsuper OR (pg_has_role(r.oid, 'pg_create_subscription', 'MEMBER')
        AND has_database_privilege(r.oid, current_database(), 'CREATE')),
    current_setting('data_directory', true),
    (SELECT count(*) FROM pg_stat_replication)::int,
    current_setting('max_active_replication_origins', true)::int
        - (SELECT count(*) FROM pg_replication_origin)::int,
    coalesce((SELECT setting::int FROM pg_settings
        WHERE name = 'idle_replication_slot_timeout' AND unit = 's'), 0)
FROM pg_roles AS r WHERE r.rolname = session_user
"""

_PREPARED: Final = """
SELECT gid, owner, date_part('epoch', now() - prepared) FROM pg_prepared_xacts
WHERE database = current_database() ORDER BY prepared LIMIT 3
"""

_OLD: Final = """
SELECT pid, usename, date_part('epoch', clock_timestamp() - xact_start), left(query, 80)
FROM pg_stat_activity WHERE datname = current_database() AND backend_xid IS NOT NULL
    AND clock_timestamp() - xact_start > make_interval(secs => %s) AND pid <> pg_backend_pid()
ORDER BY xact_start LIMIT 3
"""

# Catalogues of one schema.
_ODD: Final = """
SELECT format('%%s is unlogged', relname) FROM pg_class
WHERE relnamespace = %(schema)s::regnamespace AND relkind = 'r' AND relpersistence <> 'p'
UNION ALL
SELECT format('%%s is a materialized view', relname) FROM pg_class
WHERE relnamespace = %(schema)s::regnamespace AND relkind = 'm'
UNION ALL
SELECT format('%%s is a foreign table', relname) FROM pg_class
WHERE relnamespace = %(schema)s::regnamespace AND relkind = 'f'
UNION ALL
SELECT format('%%s.%%s is an oid, of a large object perhaps', c.relname, a.attname)
FROM pg_class AS c JOIN pg_attribute AS a ON a.attrelid = c.oid AND attnum > 0
WHERE relnamespace = %(schema)s::regnamespace AND relkind IN ('r', 'p')
    AND atttypid = 'oid'::regtype
"""

_ALWAYS: Final = """
SELECT c.relname || '.' || t.tgname FROM pg_trigger AS t JOIN pg_class AS c ON c.oid = t.tgrelid
WHERE c.relnamespace = %s::regnamespace AND NOT tgisinternal AND tgenabled IN ('A', 'R')
"""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what.
        found: what was found, in a few words.
        problem: why the move is refused; None where all is well.
        hint: what to do about it.
    """

    name: str
    found: str
    problem: str | None = None
    hint: str | None = None


@dataclass(frozen=True, slots=True)
class Side:
    """One server of a move, with an open connection to its primary."""

    shard: PhysicalShard
    connection: psycopg.Connection[Any]


def checks(
    source: Side,
    target: Side,
    logical_shard: int,
    *,
    long: float = LONG,
    free_bytes: Callable[[Side], int | None] | None = None,
) -> list[Check]:
    """Return what was looked at, in the order in which it is shown.

    Args:
        source: the owner.
        target: where it is to go.
        logical_shard: which.
        long: seconds after which a writing transaction is too long.
        free_bytes: how much room the target has; None where nobody can say.
    """
    return [
        *_servers(source, target),
        *_tables(source, target, logical_shard),
        *_transactions(source, target, long),
        _room(source, target, logical_shard, free_bytes or _free),
    ]


def _servers(source: Side, target: Side) -> Iterator[Check]:
    facts = {side.shard.name: _facts(side) for side in (source, target)}
    (here, there) = facts.values()
    same = here["system"] == there["system"]
    yield Check(
        "servers",
        f"{source.shard.name} → {target.shard.name}",
        "both are databases of one PostgreSQL" if same else None,
        "a move goes from one server to another",
    )
    for name, fact in facts.items():
        problems = []
        if fact["replica"]:
            problems.append("it is a replica")
        if fact["version"] < _OLDEST:
            problems.append(f"PostgreSQL {fact['version'] // 10_000} is too old")
        if fact["wal_level"] != "logical":
            problems.append(f"wal_level is {fact['wal_level']}")
        if fact["slots"] < 1:
            problems.append("no replication slot is free (max_replication_slots)")
        if fact["keep"] < 0:
            problems.append("a slot that nobody reads may fill the disk (max_slot_wal_keep_size)")
        if fact["senders"] < 2:
            problems.append("no walsender is free (max_wal_senders)")
        if fact["workers"] < 1:
            problems.append("no worker is free (max_logical_replication_workers)")
        if fact["origins"] is not None and fact["origins"] < 1:
            problems.append("no origin is free (max_active_replication_origins)")
        if 0 < fact["idle"] < _IDLE:
            problems.append("idle_replication_slot_timeout would end its slots")
        if not fact["may_replicate"]:
            problems.append("the mover's login may not replicate")
        if not fact["may_subscribe"]:
            problems.append("the mover's login may not make subscriptions")
        yield Check(
            f"{name} for replication",
            f"PostgreSQL {fact['version'] // 10_000}, {fact['slots']} slots, "
            f"{fact['senders']} senders and {fact['workers']} workers free",
            "; ".join(problems) or None,
            "correct the settings, or run shardkit roles apply; the way back needs them, too",
        )
        names = [part.strip(" \"'()") for part in fact["standbys"].replace("(", ",").split(",")]
        matches = [n for n in names if n == "*" or n.lower().startswith("shardkit_move_")]
        yield Check(
            f"{name} waits for standbys",
            fact["standbys"] or "none",
            "synchronous_standby_names matches every walsender, so a mover would count as a standby"
            if matches
            else None,
            "name the standbys: synchronous_standby_names = 'ANY 1 (replica_1, replica_2)'",
        )


def _facts(side: Side) -> dict[str, Any]:
    names = (
        "replica", "version", "system", "wal_level", "standbys", "slots", "senders", "keep",
        "workers", "may_replicate", "may_subscribe", "folder", "n_senders", "origins", "idle",
    )  # fmt: skip
    row = side.connection.execute(_FACTS).fetchone()
    assert row is not None, "the login is a role"
    return dict(zip(names, row, strict=True))


def _tables(source: Side, target: Side, logical_shard: int) -> Iterator[Check]:
    tables = tables_of(source.connection, logical_shard)
    keyless = [table.name for table in tables if not table.key]
    yield Check(
        "primary keys",
        f"{len(tables)} tables",
        f"{', '.join(keyless)} has no primary key" if keyless else None,
        "add one by a migration: without it UPDATE and DELETE would fail on the source",
    )
    schema = schema_name(logical_shard)
    odd = [str(n) for (n,) in source.connection.execute(_ODD, {"schema": schema})]
    yield Check(
        "what replication leaves out",
        ", ".join(odd) or "nothing",
        ", ".join(odd) or None,
        "make it an ordinary table, or drop it",
    )
    always = [str(n) for (n,) in source.connection.execute(_ALWAYS, (schema,))]
    yield Check(
        "triggers",
        f"{len(always)} fire on replicas",
        f"{', '.join(always)} would fire again on the target" if always else None,
        "ALTER TABLE … ENABLE TRIGGER, so that it fires where rows are first written only",
    )
    there = target.connection.execute("SELECT to_regnamespace(%s) IS NOT NULL", (schema,))
    is_there = there.fetchone() == (True,)
    yield Check(
        "room for the schema",
        f"{schema} {'exists' if is_there else 'is free'} on {target.shard.name}",
        f"{schema} exists on {target.shard.name}, and no move owns it" if is_there else None,
        f"look at it and drop it there: DROP SCHEMA {schema} CASCADE",
    )
    leftovers = [
        f"{what} on {side.shard.name}"
        for side in (source, target)
        for what in _leftovers(side.connection, logical_shard)
    ]
    yield Check(
        "leftovers",
        ", ".join(leftovers) or "none",
        f"{', '.join(leftovers)}: {name_of(logical_shard)}" if leftovers else None,
        "of a move that somebody ended by hand; drop them",
    )
    app = {source.shard.roles.app, source.shard.roles.relay}
    found = transactions.writers(source.connection, logical_shard, sorted(app))
    yield Check(
        "a fence stops",
        ", ".join(sorted(app)),
        "; ".join(f"{role} {why}" for role, why in found.items()) or None,
        "give the application a login of its own that owns nothing: docs/moves.md",
    )
    ledgers = [_reference(side.connection) for side in (source, target)]
    yield Check(
        "reference tables",
        f"{len(ledgers[0])} revisions",
        None if ledgers[0] == ledgers[1] else "the two servers have not the same ones",
        "run shardkit migrate apply",
    )


def _leftovers(connection: psycopg.Connection[Any], logical_shard: int) -> list[str]:
    """Return what is left of a move that is over.

    Not slots that nobody uses: a server that was a primary and is one again may have some of
    then, since slots are not replicated. The copy begins with dropping them.
    """
    name = name_of(logical_shard)
    rows = connection.execute(
        "SELECT 'slot' FROM pg_replication_slots WHERE slot_name = %(name)s "
        "AND (active_pid IS NOT NULL OR database IS DISTINCT FROM current_database()) UNION ALL "
        "SELECT 'publication' FROM pg_publication WHERE pubname = %(name)s UNION ALL "
        "SELECT 'subscription' FROM pg_subscription WHERE subname = %(name)s AND subdbid = "
        "(SELECT oid FROM pg_database WHERE datname = current_database())",
        {"name": name},
    )
    return [str(what) for (what,) in rows]


def _reference(connection: psycopg.Connection[Any]) -> list[Any]:
    return connection.execute(
        "SELECT revision, checksum FROM shardkit.reference_version ORDER BY 1"
    ).fetchall()


def _transactions(source: Side, target: Side, long: float) -> Iterator[Check]:
    for side in (source, target):
        prepared = _prepared(side.connection)
        yield Check(
            f"prepared transactions on {side.shard.name}",
            ", ".join(prepared) or "none",
            f"prepared transactions hold locks: {', '.join(prepared)}" if prepared else None,
            "shardkit twophase resolve settles those of shardkit; COMMIT or ROLLBACK PREPARED "
            "the others",
        )
        old = [
            f"process {pid} of {user}, for {age:.0f} s: {query}"
            for pid, user, age, query in side.connection.execute(_OLD, (long,))
        ]
        yield Check(
            f"long transactions on {side.shard.name}",
            "; ".join(old) or "none",
            f"a transaction has been writing for too long: {'; '.join(old)}" if old else None,
            "wait for it, or end it: SELECT pg_terminate_backend(pid)",
        )


def _prepared(connection: psycopg.Connection[Any]) -> list[str]:
    """Return the prepared transactions that stay."""
    until = SYSTEM.monotonic() + _TRANSIENT
    first = {row[0] for row in connection.execute(_PREPARED)}
    while True:
        rows = [row for row in connection.execute(_PREPARED).fetchall() if row[0] in first]
        if not rows or SYSTEM.monotonic() > until:
            return [f"{gid} of {owner} ({age:.0f} s)" for gid, owner, age in rows]
        SYSTEM.sleep(0.05)


def _room(
    source: Side, target: Side, logical_shard: int, free_bytes: Callable[[Side], int | None]
) -> Check:
    wanted = round(size_of(source.connection, logical_shard) * ROOM)
    free = free_bytes(target)
    return Check(
        "room on the target",
        f"{wanted:,} bytes wanted, {'unknown' if free is None else f'{free:,}'} free",
        f"{target.shard.name} has {free:,} bytes free, {wanted:,} are wanted"
        if free is not None and free < wanted
        else None,
        "make room there, or move it to another server",
    )


def _free(side: Side) -> int | None:
    """Return the free bytes where the server's data are, if that is this machine."""
    host = side.shard.admin_url.host or "localhost"
    if host not in {"localhost", "127.0.0.1", "::1"} and not host.startswith("/"):
        return None
    row = side.connection.execute("SELECT current_setting('data_directory', true)").fetchone()
    if row is None or not row[0] or not Path(row[0]).is_dir():
        return None
    return shutil.disk_usage(row[0]).free
