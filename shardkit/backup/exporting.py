"""`shardkit export`: one logical shard as files, of one moment, while its writers go on.

Called by the command line; what the files are is `shardkit.backup.shardfile`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import psycopg
from psycopg import sql

from shardkit.backup import manifest
from shardkit.backup.facts import gone
from shardkit.backup.label import no_migration
from shardkit.backup.rows import Connection, Shape, copy_out, prepare, shapes
from shardkit.backup.shardfile import EXPORT, SCHEMA, ShardFile, TableFile
from shardkit.backup.store import flush_folder
from shardkit.backup.tools import Tools, login
from shardkit.errors import BackupError, ConfigurationError, RefusedError, TryAgainError
from shardkit.ops.direct import connect
from shardkit.ops.shape import digests
from shardkit.topology import PhysicalShard, Topology, schema_name

__all__ = ["KEPT_APART", "export", "identity", "ledger_of", "owner_of", "rules_of"]

KEPT_APART: Final = frozenset({"shardkit_id_state", "shardkit_version"})
"""Tables whose rows are no data: the state of minting is in the manifest, and so is the ledger."""

LOCK_TIMEOUT: Final = 2.0
"""Seconds to queue for a table that somebody locks against readers."""

_IDENTITY: Final = """
SELECT i.cluster, i.physical, i.logical_shards, i.id_epoch_ms,
    current_setting('server_version_num')::int, clock_timestamp(), o.epoch, o.state
FROM shardkit.identity AS i LEFT JOIN shardkit.ownership AS o ON o.logical_shard = %s
"""


def export(
    topology: Topology,
    logical_shard: int,
    into: Path,
    *,
    on_table: Callable[[str, int, int], None] = lambda *_: None,
) -> ShardFile:
    """Write a logical shard to a new folder, all of it or nothing.

    Args:
        topology: the cluster.
        logical_shard: which.
        into: the folder; empty, or not there yet.
        on_table: told of every table that is through, how many are, and of how many.

    Raises:
        ConfigurationError: there is no such logical shard.
        RefusedError: the folder holds something, or the server does not own the logical shard.
        TryAgainError: a migration runs, or a table is locked (retryable).
        EndpointUnavailableError: the server went away (retryable).
        BackupError: a file cannot be written.
    """
    shard = owner_of(topology, logical_shard)
    if into.exists() and (not into.is_dir() or any(into.iterdir())):
        raise RefusedError(f"{into}: is not empty", hint="name an empty or a new folder")
    new = into.with_name(f".new-{into.name}")
    try:
        into.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(mode=0o700)
        with (
            Tools() as tools,
            connect(shard, application="shardkit export") as connection,
            no_migration({shard.name: connection}),
        ):
            prepare(connection)
            connection.execute(f"SET lock_timeout = {round(LOCK_TIMEOUT * 1000)}".encode())
            made = _written(tools, connection, shard, topology, logical_shard, new, on_table)
        _flushed(new / EXPORT, manifest.encode(made))
        flush_folder(new)
        new.replace(into)
        flush_folder(into.parent)
    except BaseException as error:
        shutil.rmtree(new, ignore_errors=True)
        if isinstance(error, psycopg.errors.LockNotAvailable):
            raise TryAgainError(
                f"a table of logical shard {logical_shard} is locked", hint="nothing was written"
            ) from error
        if isinstance(error, psycopg.OperationalError):
            raise gone(error, str(shard.primary)) from error
        if isinstance(error, OSError):
            raise BackupError(
                f"{into}: cannot be written: {error.strerror}", hint="nothing is left behind"
            ) from error
        raise
    return made


def _written(  # noqa: PLR0917  one step of `export`, with all that it has
    tools: Tools,
    connection: Connection,
    shard: PhysicalShard,
    topology: Topology,
    logical_shard: int,
    folder: Path,
    on_table: Callable[[str, int, int], None],
) -> ShardFile:
    schema = schema_name(logical_shard)
    with connection.transaction():
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
        found = identity(connection, topology, shard, logical_shard)
        tables = [s for s in shapes(connection, [schema]) if s.name not in KEPT_APART]
        files: dict[str, TableFile] = {}
        for number, shape in enumerate(tables):
            files[shape.name] = _table(connection, shape, folder / f"{number:04d}.copy")
            on_table(shape.name, number + 1, len(tables))
        row = connection.execute("SELECT pg_export_snapshot()").fetchone()
        assert row is not None
        conninfo, secret = login(shard.admin_url, application="shardkit export")
        tools.run(
            "pg_dump",
            *("--schema-only", f"--schema={schema}", f"--snapshot={row[0]}", "--no-password"),
            *("--file", folder / SCHEMA, "--dbname", f"{conninfo} dbname={_word(shard)}"),
            secret=secret,
            where=str(shard.primary),
        )
        return ShardFile(
            format=manifest.FORMAT,
            cluster=topology.name,
            logical_shard=logical_shard,
            logical_shards=topology.n_logical_shards,
            id_epoch_ms=found["id_epoch_ms"],
            version=found["version"],
            at=found["at"],
            epoch=found["epoch"],
            id_state=_number(connection, schema, "shardkit_id_state", "state"),
            catalogue=digests(connection, [schema])[schema],
            revisions=ledger_of(connection, schema),
            rules=rules_of(connection),
            sequences=_sequences(connection, schema),
            tables=files,
            schema_sha256=manifest.sha256_of(folder / SCHEMA),
        )


def _table(connection: Connection, shape: Shape, path: Path) -> TableFile:
    with path.open("xb") as file:
        rows, digest = copy_out(connection, shape, file.write)
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    return TableFile(
        file=path.name, columns=shape.columns, rows=rows, size_bytes=size, sha256=digest
    )


def owner_of(topology: Topology, logical_shard: int) -> PhysicalShard:
    """Return the physical shard of a logical shard.

    Raises:
        ConfigurationError: there is no such logical shard.
    """
    if not 0 <= logical_shard < topology.n_logical_shards:
        raise ConfigurationError(
            f"no logical shard {logical_shard}; the last one is {topology.n_logical_shards - 1}"
        )
    return topology.physical[topology.shard_map.owner(logical_shard)]


def identity(
    connection: Connection, topology: Topology, shard: PhysicalShard, logical_shard: int
) -> dict[str, Any]:
    """Return what a server says of itself and of a logical shard that it owns.

    Raises:
        RefusedError: it is another server, or does not own it.
    """
    used = connection.execute("SELECT to_regclass('shardkit.identity') IS NOT NULL").fetchone()
    row = connection.execute(_IDENTITY, (logical_shard,)).fetchone() if used == (True,) else None
    if row is None or tuple(row[:3]) != (topology.name, shard.name, topology.n_logical_shards):
        raise RefusedError(
            f"the server is not {shard.name!r} of the cluster {topology.name!r}",
            endpoint=str(shard.primary),
            hint="correct the address, or run shardkit migrate apply first",
        )
    if row[7] != "active":
        raise RefusedError(
            f"logical shard {logical_shard} is {row[7] or 'not there'} on {shard.name!r}",
            hint="see shardkit locate",
        )
    return {"id_epoch_ms": row[3], "version": row[4], "at": row[5], "epoch": row[6]}


def ledger_of(connection: Connection, schema: str) -> dict[str, str]:
    """Return the revisions that a logical shard has; none where revisions are not used.

    Raises:
        RefusedError: one is half applied.
    """
    table = f"{schema}.shardkit_version"
    if connection.execute("SELECT to_regclass(%s)::text", (table,)).fetchone() == (None,):
        return {}
    rows = connection.execute(
        sql.SQL("SELECT revision, checksum, step FROM {}").format(
            sql.Identifier(schema, "shardkit_version")
        )
    ).fetchall()
    if half := [revision for revision, _, step in rows if step is not None]:
        raise RefusedError(
            f"{schema}: revision {half[0]} is half applied", hint="run shardkit migrate apply"
        )
    return {revision: checksum for revision, checksum, _ in rows}


def rules_of(connection: Connection) -> dict[str, str]:
    """Return how the rows of tables are placed, as far as it was recorded."""
    return dict(connection.execute("SELECT table_name, rule FROM shardkit.placement").fetchall())


def _sequences(connection: Connection, schema: str) -> dict[str, int]:
    rows = connection.execute(
        "SELECT sequencename, coalesce(last_value, 0) FROM pg_sequences WHERE schemaname = %s",
        (schema,),
    )
    return {name: max(0, int(last)) for name, last in rows}


def _number(connection: Connection, schema: str, table: str, column: str) -> int:
    row = connection.execute(
        sql.SQL("SELECT {} FROM {}").format(sql.Identifier(column), sql.Identifier(schema, table))
    ).fetchone()
    assert row is not None
    return int(row[0])


def _word(shard: PhysicalShard) -> str:
    """Return the name of a database as a connection string has it."""
    name = (shard.admin_url.database or "").replace("\\", "\\\\").replace("'", "\\'")
    return f"'{name}'"


def _flushed(path: Path, text: str) -> None:
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
