"""What PostgreSQL and PgBouncer are asked, and the facts made of their answers.

Each function uses one connection of `shardkit.waits`, so that many run beside each other in
`shardkit.parallel` and end with the deadline. Called by `shardkit.ops.health.collect`; changes
nothing on any server and decides nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from psycopg import sql
from sqlalchemy import URL

from shardkit.clock import SYSTEM
from shardkit.ids import EPOCH_MS, SEQUENCE_BITS
from shardkit.ops import ledger
from shardkit.ops.direct import Unguarded, parameters
from shardkit.ops.health.facts import (
    AppRole,
    IdState,
    Login,
    PgBouncer,
    PooledDatabase,
    Prepared,
    Server,
    Slot,
    Standby,
    State,
)
from shardkit.ops.intervals import NOTES, intervals, note_of
from shardkit.ops.roles import decide
from shardkit.ops.rolesread import read as read_roles
from shardkit.topology import Endpoint, PhysicalShard, Topology, schema_name
from shardkit.waits import Connection

__all__ = ["ask_login", "ask_pooler", "ask_server", "ask_state"]

_APPLICATION = "shardkit doctor"

_SETTINGS: Final = (
    "autovacuum", "data_checksums", "fsync", "full_page_writes", "hot_standby", "max_connections",
    "max_locks_per_transaction", "max_prepared_transactions", "max_replication_slots",
    "max_slot_wal_keep_size", "max_wal_senders", "max_worker_processes", "password_encryption",
    "ssl", "superuser_reserved_connections", "synchronous_standby_names", "wal_level",
)  # fmt: skip

_OF_LOGIN: Final = (
    "default_transaction_isolation", "idle_in_transaction_session_timeout", "synchronous_commit",
)  # fmt: skip

# None of these takes a lock but AccessShareLock on catalogues.
_CLOCK = "SELECT extract(epoch FROM clock_timestamp())::float8"
_SERVER = """
SELECT pg_is_in_recovery(), current_setting('server_version_num')::int,
    (SELECT system_identifier FROM pg_control_system()), pg_encoding_to_char(encoding),
    coalesce(to_jsonb(d) ->> 'datlocale', to_jsonb(d) ->> 'daticulocale', datcollate)
FROM pg_database AS d WHERE datname = current_database()
"""
_SETTING = "SELECT name, setting FROM pg_settings WHERE name = ANY (%s)"
_PENDING = "SELECT name FROM pg_settings WHERE pending_restart"
_PREPARED = """
SELECT gid, extract(epoch FROM clock_timestamp() - prepared)::float8
FROM pg_prepared_xacts ORDER BY prepared
"""
# Slots that a replica keeps in step with its primary's are read there.
_SLOTS = """
SELECT slot_name, active, coalesce(pg_wal_lsn_diff(CASE WHEN pg_is_in_recovery()
    THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END, restart_lsn), 0)::bigint,
    coalesce(wal_status = 'lost', false)
FROM pg_replication_slots AS s
WHERE NOT temporary AND coalesce(to_jsonb(s) ->> 'synced', 'false') = 'false'
"""
_STANDBYS = "SELECT application_name, state = 'streaming' FROM pg_stat_replication"
_STREAMS = "SELECT EXISTS (SELECT FROM pg_stat_wal_receiver WHERE pid IS NOT NULL)"
# Before the first migration the table is not there. AccessShareLock on a small table.
_HAS_FAILOVERS = "SELECT to_regclass('shardkit.failovers') IS NOT NULL"
_PROMOTED = """
SELECT detail -> 'may_lose' FROM shardkit.failovers
WHERE kind = 'promoted' ORDER BY entry DESC LIMIT 1
"""
_EXTENSIONS = "SELECT extname, extversion FROM pg_extension"
_AVAILABLE = "SELECT name FROM pg_available_extensions"

_LOGIN = """
SELECT current_setting('transaction_read_only') = 'on',
    (SELECT system_identifier FROM pg_control_system())
"""

_SCHEMAS = """
SELECT substr(nspname, 7)::int FROM pg_namespace WHERE nspname ~ '^shard_[0-9]{4}$'
"""
_RELATIONS = """
SELECT coalesce(sum(n), 0)::bigint, coalesce(max(n), 0)::bigint FROM (
    SELECT sum(1 + (SELECT count(*) FROM pg_index AS i WHERE i.indrelid = c.oid)) AS n
    FROM pg_class AS c JOIN pg_namespace AS s ON s.oid = c.relnamespace
    WHERE s.nspname ~ '^shard_[0-9]{4}$' AND c.relkind IN ('r', 'p') GROUP BY c.relname
) AS tables
"""
_ID_TABLES = """
SELECT n FROM unnest(%s::int[]) AS n
WHERE to_regclass(format('shard_%%s.shardkit_id_state', lpad(n::text, 4, '0'))) IS NOT NULL
"""
# Which of them is set so that a failed CREATE SUBSCRIPTION, with its password, goes to the log.
_LOGGED = """
SELECT name FROM pg_settings WHERE NOT has_parameter_privilege(%(role)s, name, 'SET')
    AND CASE name WHEN 'log_min_error_statement' THEN setting NOT IN ('log', 'fatal', 'panic')
        WHEN 'log_statement' THEN setting <> 'none'
        WHEN 'log_min_duration_statement' THEN setting <> '-1' ELSE false END ORDER BY 1
"""
_POWERS = """
SELECT array_remove(ARRAY[
    CASE WHEN rolsuper THEN 'SUPERUSER' END, CASE WHEN rolcreaterole THEN 'CREATEROLE' END,
    CASE WHEN rolcreatedb THEN 'CREATEDB' END, CASE WHEN rolreplication THEN 'REPLICATION' END,
    CASE WHEN rolbypassrls THEN 'BYPASSRLS' END], NULL)
    || ARRAY(SELECT 'member of ' || g.rolname::text FROM pg_roles AS g
        WHERE NOT r.rolsuper AND g.oid <> r.oid AND pg_has_role(r.oid, g.oid, 'MEMBER')
            AND (g.rolsuper OR g.rolname IN ('pg_execute_server_program', 'pg_read_server_files',
                'pg_write_server_files', 'pg_write_all_data', 'pg_read_all_data',
                'pg_signal_backend', 'pg_maintain', 'pg_database_owner')
            OR EXISTS (SELECT FROM pg_namespace WHERE nspname = 'shardkit' AND nspowner = g.oid))
        ORDER BY 1)
FROM pg_roles AS r WHERE rolname = %s
"""
_OWNED = """
SELECT what FROM (
    SELECT 'database ' || quote_ident(datname) AS what FROM pg_database
        WHERE datname = current_database() AND datdba = %(role)s::regrole
    UNION ALL SELECT 'schema ' || quote_ident(nspname) FROM pg_namespace
        WHERE nspowner = %(role)s::regrole AND nspname !~ '^pg_'
    UNION ALL SELECT 'table ' || c.oid::regclass::text FROM pg_class AS c
        WHERE relowner = %(role)s::regrole AND relkind IN ('r', 'p', 'v', 'm', 'S', 'f')
            AND relpersistence <> 't'
    UNION ALL SELECT 'function ' || p.oid::regprocedure::text FROM pg_proc AS p
        WHERE proowner = %(role)s::regrole
) AS owned LIMIT 5
"""
_CREATES = """
SELECT what FROM (
    SELECT 'database ' || quote_ident(current_database()) AS what
        WHERE has_database_privilege(%(role)s, current_database(), 'CREATE')
    UNION ALL SELECT 'schema ' || quote_ident(nspname) FROM pg_namespace
        WHERE nspname !~ '^pg_' AND has_schema_privilege(%(role)s, oid, 'CREATE')
) AS places WHERE NOT (SELECT rolsuper FROM pg_roles WHERE rolname = %(role)s) LIMIT 5
"""

_SHARDS_PER_QUERY = 256


def ask_server(endpoint: Endpoint, url: URL) -> Server:
    """Ask one PostgreSQL server for its settings and its state.

    Args:
        endpoint: which it is.
        url: its address with the admin's login.

    Raises:
        psycopg.Error: it does not answer.
    """
    with _connected(url) as connection:
        before = SYSTEM.monotonic()
        theirs = _one(connection, _CLOCK)[0]
        took = SYSTEM.monotonic() - before
        ours = SYSTEM.unix_ms() / 1000 - took / 2
        is_replica, version, system, encoding, collation = _one(connection, _SERVER)
        return Server(
            where=str(endpoint),
            physical=endpoint.physical,
            role=endpoint.role,
            is_replica=is_replica,
            version=version,
            settings=dict(_all(connection, _SETTING, [list(_SETTINGS)])),
            pending=tuple(name for (name,) in _all(connection, _PENDING)),
            clock_offset=theirs - ours,
            clock_error=took / 2,
            system=system,
            encoding=encoding,
            collation=collation,
            host=url.host or "",
            prepared=tuple(Prepared(*row) for row in _all(connection, _PREPARED)),
            slots=tuple(Slot(*row) for row in _all(connection, _SLOTS)),
            standbys=tuple(Standby(*row) for row in _all(connection, _STANDBYS)),
            is_streaming=_one(connection, _STREAMS)[0],
            **_relaxed(connection),
            extensions=dict(_all(connection, _EXTENSIONS)),
            available=frozenset(name for (name,) in _all(connection, _AVAILABLE)),
        )


def ask_login(endpoint: Endpoint, url: URL, *, is_for_readers: bool) -> Login:
    """Ask what the application gets at one of its addresses.

    Raises:
        psycopg.Error: it does not answer, or refuses the login.
    """
    with _connected(url) as connection:
        is_read_only, system = _one(connection, _LOGIN)
        settings = dict(_all(connection, _SETTING, [list(_OF_LOGIN)]))
    suffix = " (reader)" if url is endpoint.read_url else ""
    return Login(f"{endpoint}{suffix}", is_for_readers, is_read_only, system, settings)


def ask_state(topology: Topology, shard: PhysicalShard) -> State:
    """Ask a primary what shardkit keeps there, and who may touch it.

    Raises:
        psycopg.Error: it does not answer, or the admin's login may not look.
    """
    app = shard.primary.url.username or ""
    with _connected(shard.looking_url) as connection:
        found = ledger.read(connection)
        schemas = frozenset(number for (number,) in _all(connection, _SCHEMAS))
        relations, widest = _one(connection, _RELATIONS)
        owned = sorted(
            number
            for number, row in found.ownership.items()
            if row.state != "retired" and number in schemas
        )
        return State(
            where=str(shard.primary),
            physical=shard.name,
            ledger=found,
            admin_digest=ledger.admin_script(
                shard, cluster=topology.name, n_logical_shards=topology.n_logical_shards
            )[1],
            shard_digest=ledger.logical_shard_digest(shard.roles),
            schemas=schemas,
            ids=tuple(_id_states(connection, owned)),
            n_relations=relations,
            widest=widest,
            app=AppRole(
                app,
                powers=_powers(connection, app),
                owned=_texts(connection, _OWNED, app),
                creates_in=_texts(connection, _CREATES, app),
            ),
            admin_powers=_powers(connection, shard.roles.admin),
            # Before 15 there is no such privilege, and before 16 nothing is moved.
            logged=_texts(connection, _LOGGED, shard.roles.admin)
            if connection.info.server_version >= 160000
            else (),
            role_changes=tuple(
                change.what for change in decide(read_roles(connection, shard), shard.roles)
            ),
        )


def ask_pooler(shard: PhysicalShard, url: URL) -> PgBouncer:
    """Ask the console of a PgBouncer for its settings and databases.

    Args:
        shard: which is behind it.
        url: its address with the admin's login, which has to be one of its `stats_users`.

    Raises:
        psycopg.Error: it does not answer, or the login may not look.
    """
    with _connected(url.set(database="pgbouncer")) as connection:
        version = str(_one(connection, "SHOW VERSION")[0])
        settings = {row["key"]: row["value"] or "" for row in _named(connection, "SHOW CONFIG")}
        databases = tuple(
            PooledDatabase(
                name=row["name"],
                server=f"{row['host']}:{row['port']}/{row['database']}",
                mode=row["pool_mode"] or settings.get("pool_mode", ""),
                # `reserve_pool` up to 1.23, then `reserve_pool_size`.
                size=int(row["pool_size"])
                + int(row.get("reserve_pool") or row.get("reserve_pool_size") or 0),
            )
            for row in _named(connection, "SHOW DATABASES")
            if row["name"] != "pgbouncer"
        )
    return PgBouncer(
        where=f"pgbouncer {url.host}:{url.port or 5432}",
        host=url.host or "",
        physical=shard.name,
        version=tuple(map(int, re.findall(r"\d+", version))),
        told=shard.pooler.version if shard.pooler else (),
        settings=settings,
        databases=databases,
    )


@contextmanager
def _connected(url: URL) -> Iterator[Connection]:
    # Statements are not prepared: a pooler may stand in between, and its console knows none.
    connection = Connection.open(
        "",
        patience=math.inf,  # the deadline of the whole examination bounds it
        guard=Unguarded(),
        autocommit=True,
        prepare_threshold=None,
        **parameters(url, application=_APPLICATION),
    )
    try:
        yield connection
    finally:
        connection.close()


def _relaxed(connection: Connection) -> dict[str, Any]:
    """Return when commits went unconfirmed, and what that may have cost."""
    if not _one(connection, _HAS_FAILOVERS)[0]:
        return {}
    promoted = _all(connection, _PROMOTED)
    return {
        "intervals": intervals(note_of(row) for row in _one(connection, NOTES)[0]),
        "may_lose": promoted[0][0] if promoted else None,
    }


def _all(connection: Connection, query: str, values: Any = None) -> list[tuple[Any, ...]]:
    return connection.execute(query.encode(), values).fetchall()


def _one(connection: Connection, query: str, values: Any = None) -> tuple[Any, ...]:
    row = connection.execute(query.encode(), values).fetchone()
    assert row is not None, "it selects exactly one row"
    found: tuple[Any, ...] = row
    return found


def _named(connection: Connection, query: str) -> list[dict[str, Any]]:
    cursor = connection.execute(query.encode())
    assert cursor.description is not None, "SHOW has columns"
    names = [column.name for column in cursor.description]
    return [dict(zip(names, row, strict=True)) for row in cursor]


def _texts(connection: Connection, query: str, role: str) -> tuple[str, ...]:
    # `regrole` reads an identifier.
    quoted = sql.Identifier(role).as_string(connection) if "regrole" in query else role
    return tuple(text for (text,) in _all(connection, query, {"role": quoted}))


def _powers(connection: Connection, role: str) -> tuple[str, ...]:
    rows = _all(connection, _POWERS, [role])
    return tuple(rows[0][0]) if rows else ()


def _id_states(connection: Connection, numbers: Iterable[int]) -> Iterator[IdState]:
    wanted = list(numbers)
    there = [n for (n,) in _all(connection, _ID_TABLES, [wanted])]
    ahead: dict[int, float | None] = dict.fromkeys(wanted)
    for start in range(0, len(there), _SHARDS_PER_QUERY):
        # AccessShareLock on the state of each logical shard.
        query = sql.SQL(" UNION ALL ").join(
            sql.SQL(
                "SELECT {n}, ((state >> {bits}) + {epoch}) / 1000.0::float8"
                " - extract(epoch FROM clock_timestamp())::float8 FROM {schema}.shardkit_id_state"
            ).format(n=n, bits=SEQUENCE_BITS, epoch=EPOCH_MS, schema=sql.Identifier(schema_name(n)))
            for n in there[start : start + _SHARDS_PER_QUERY]
        )
        ahead.update(connection.execute(query).fetchall())
    yield from (IdState(n, seconds) for n, seconds in ahead.items())
