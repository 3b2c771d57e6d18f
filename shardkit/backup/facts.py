"""What a primary says of itself before it is copied, and what is refused.

Called by `create`; copies nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import psycopg
from sqlalchemy import URL

from shardkit.backup.rows import Connection
from shardkit.backup.store import Store
from shardkit.errors import EndpointUnavailableError, RefusedError
from shardkit.topology import Topology

__all__ = ["SETTINGS", "Facts", "facts_of", "gone", "logins", "room", "where_is"]

_ROOM: Final = 1.1
"""Free space wanted, in sizes of the databases: the log of the meantime, and some."""

SETTINGS: Final = (
    "max_connections",
    "max_locks_per_transaction",
    "max_prepared_transactions",
    "max_worker_processes",
)
"""What a server needs as large to replay the log. Source: PostgreSQL manual, 26.4.4."""

_FACTS: Final = """
SELECT current_setting('server_version_num')::int,
    (SELECT system_identifier::text FROM pg_control_system()),
    pg_is_in_recovery(),
    pg_size_bytes(current_setting('wal_segment_size')),
    (SELECT sum(pg_database_size(oid))::bigint FROM pg_database),
    (SELECT array_agg(spcname) FROM pg_tablespace WHERE spcname NOT IN ('pg_default', 'pg_global')),
    (SELECT json_object_agg(name, setting::int) FROM pg_settings WHERE name = ANY (%s)),
    to_regclass('shardkit.identity') IS NOT NULL
"""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a primary says before it is copied."""

    version: int
    system_identifier: str
    segment_bytes: int
    size_bytes: int
    settings: Mapping[str, int]


def facts_of(topology: Topology, sessions: Mapping[str, Connection]) -> dict[str, Facts]:
    """Ask every primary, and refuse what cannot be backed up."""
    found: dict[str, Facts] = {}
    for physical, session in sessions.items():
        row: Any = session.execute(_FACTS, (list(SETTINGS),)).fetchone()
        version, system, is_replica, segment, size, tablespaces, settings, is_used = row
        where = where_is(topology, physical)
        identity = (
            session.execute("SELECT cluster, physical FROM shardkit.identity").fetchone()
            if is_used
            else None
        )
        if identity != (topology.name, physical):
            raise RefusedError(
                f"the server says that it is {identity}, not {(topology.name, physical)}",
                endpoint=where,
                hint="correct the address, or run shardkit migrate apply first",
            )
        if is_replica:
            raise RefusedError("the server is a replica", endpoint=where)
        if tablespaces:
            raise RefusedError(
                f"it has tablespaces {', '.join(tablespaces)}, which lie outside its folder",
                endpoint=where,
                hint="move their tables to pg_default; shardkit makes none",
            )
        found[physical] = Facts(version, system, segment, size, settings)
    return found


def room(store: Store, sizes: Mapping[str, int]) -> int:
    """Return how many bytes are free.

    Raises:
        RefusedError: too few.
    """
    place = next(p for p in (store.folder, *store.folder.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(place).free
    wanted = round(sum(sizes.values()) * _ROOM)
    if free < wanted:
        raise RefusedError(
            f"{store.folder}: {free:,} bytes are free, {wanted:,} are needed",
            hint="make room, keep fewer backups, or name another folder",
        )
    return free


def logins(topology: Topology, user: str, password: str | None) -> dict[str, URL]:
    """Return the address of every primary with the login that copies it."""
    return {
        name: shard.admin_url.set(username=user, password=password) if user else shard.admin_url
        for name, shard in topology.physical.items()
    }


def where_is(topology: Topology, physical: str) -> str:
    """Return how errors call a primary."""
    return str(topology.physical[physical].primary)


def gone(error: psycopg.Error, where: str | None = None) -> EndpointUnavailableError:
    """Return the error for a connection that broke."""
    reason = str(error).strip().splitlines()
    return EndpointUnavailableError(
        f"a server went away: {reason[-1] if reason else type(error).__name__}",
        endpoint=where,
        hint="nothing is left behind; run it again",
    )
