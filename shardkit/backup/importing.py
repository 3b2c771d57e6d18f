"""`shardkit import`: the files of an exported logical shard into the same one, empty, of a cluster.

One transaction: everything is there, equal to the files by the digest of its rows in order, or
nothing is. The tables are those that the revisions made; a shard that differs from the exported one
in anything but rows is refused. What decides where rows belong, and what is counted, is looked
at too, since files come from anywhere. Called by the command line.
"""

from __future__ import annotations

import graphlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import psycopg
from psycopg import sql

from shardkit import ids
from shardkit.backup.exporting import KEPT_APART, identity, ledger_of, owner_of, rules_of
from shardkit.backup.facts import gone
from shardkit.backup.label import no_migration
from shardkit.backup.rows import Connection, Shape, copy_out, prepare, shapes
from shardkit.backup.shardfile import ShardFile, check, pieces, read
from shardkit.emitting import EPOCH_SHIFT, POSITION
from shardkit.errors import BackupError, RefusedError, TryAgainError
from shardkit.ops.direct import connect
from shardkit.ops.shape import digests
from shardkit.topology import Topology, schema_name

__all__ = ["import_shard"]

LOCK_TIMEOUT: Final = 2.0
"""Seconds to queue for the lock of a table; whoever writes to it queues behind."""

FUTURE: Final = 3_600_000
"""Milliseconds that the last id may be ahead of the server's clock. More, and nothing could be
minted for that long: a wrong clock somewhere, or a file that somebody made."""

# AccessShareLock on catalogues.
_FOREIGN: Final = """
SELECT c.relname, p.relname FROM pg_constraint AS k JOIN pg_class AS c ON c.oid = k.conrelid
    JOIN pg_class AS p ON p.oid = k.confrelid
WHERE k.contype = 'f' AND k.connamespace = to_regnamespace(%(schema)s)
    AND p.relnamespace = to_regnamespace(%(schema)s) AND c.oid <> p.oid
"""


def import_shard(
    topology: Topology,
    folder: Path,
    *,
    dry_run: bool = False,
    on_table: Callable[[str, int, int], None] = lambda *_: None,
) -> ShardFile:
    """Read an exported logical shard into its empty place.

    Afterwards `shardkit lookup repair` takes its unique values in, which other logical shards keep,
    and cache servers that may hold "no such row" want to be emptied.

    Args:
        topology: the cluster; the same or another of as many logical shards.
        folder: of the export; nothing in it is trusted.
        dry_run: whether to look only.
        on_table: told of every table that is through, how many are, and of how many.

    Raises:
        RefusedError: the logical shard is not empty, not this server's, or not of the same
            revisions, catalogue, rules or a newer PostgreSQL.
        TryAgainError: a migration or a long transaction is in the way (retryable).
        EndpointUnavailableError: the server went away (retryable): if it did at the end, the next
            run says whether the rows are there.
        BackupError: a file is missing, damaged, or holds what does not belong. In every case
            nothing was imported.
    """
    found = read(folder)
    if found.logical_shards != topology.n_logical_shards:
        raise RefusedError(
            f"the export is of one of {found.logical_shards} logical shards, the cluster has "
            f"{topology.n_logical_shards}",
            hint="ids carry their logical shard; the numbers have to be the same",
        )
    check(folder, found)
    shard = owner_of(topology, found.logical_shard)
    schema = schema_name(found.logical_shard)
    try:
        with (
            connect(shard, application="shardkit import") as connection,
            no_migration({shard.name: connection}),
        ):
            prepare(connection)
            connection.execute(f"SET lock_timeout = {round(LOCK_TIMEOUT * 1000)}".encode())
            here = identity(connection, topology, shard, found.logical_shard)
            _refuse_other(connection, found, schema, here)
            tables = _ordered(connection, schema)
            with connection.transaction(force_rollback=dry_run):
                used = _lock(connection, tables)
                if dry_run:
                    return found
                _fill(connection, folder, found, _matched(found, tables), used, on_table)
                _check_places(connection, found, tables)
                _advance(connection, found, schema)
                _unlock(connection, tables)
                if digests(connection, [schema])[schema] != found.catalogue:
                    raise RefusedError(
                        f"{schema} has triggers that are switched off or on in another way",
                        hint="nothing was imported; switch them back, import, then again",
                    )
    except psycopg.errors.LockNotAvailable as error:
        raise TryAgainError(
            f"a table of {schema} is in use", hint="nothing was imported; try again"
        ) from error
    except psycopg.OperationalError as error:
        raise gone(error, str(shard.primary)) from error
    except psycopg.Error as error:
        raise BackupError(
            f"{schema}: {str(error).strip().splitlines()[0]}",
            logical_shard=found.logical_shard,
            hint="nothing was imported; a missing parent may be a row of a reference table",
        ) from error
    return found


def _refuse_other(
    connection: Connection, found: ShardFile, schema: str, here: Mapping[str, int]
) -> None:
    """Refuse a place that is not made like the one the rows come from."""
    reasons = []
    if here["id_epoch_ms"] != found.id_epoch_ms:
        reasons.append("ids count from another time")
    if here["version"] // 10_000 < found.version // 10_000:
        reasons.append(
            f"PostgreSQL {found.version // 10_000} wrote them, this is {here['version'] // 10_000}"
        )
    if ledger_of(connection, schema) != found.revisions:
        reasons.append("other revisions are applied")
    elif digests(connection, [schema]).get(schema) != found.catalogue:
        reasons.append("its catalogue differs")
    if rules_of(connection) != found.rules:
        reasons.append("rows are placed by other rules")
    if reasons:
        raise RefusedError(
            f"logical shard {found.logical_shard} is not like the exported one: "
            f"{'; '.join(reasons)}",
            hint="bring both to the same revision with shardkit migrate; see migrate drift",
        )
    row = connection.execute("SELECT shardkit.id_clock_ms()").fetchone()
    if row is not None and (found.id_state >> ids.SEQUENCE_BITS) > int(row[0]) + FUTURE:
        raise RefusedError(
            "the last id of the export is of the future, by the clock of the server",
            hint="correct the clock; ids could not be minted before that time",
        )


def _ordered(connection: Connection, schema: str) -> list[Shape]:
    """Return the tables that hold data, parents first."""
    tables = {s.name: s for s in shapes(connection, [schema]) if s.name not in KEPT_APART}
    graph: dict[str, set[str]] = {name: set() for name in tables}
    for child, parent in connection.execute(_FOREIGN, {"schema": schema}):
        graph.get(child, set()).add(parent)
    try:
        order: Sequence[str] = list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError:
        order = sorted(tables)  # deferrable constraints allow it; others will say so
    return [tables[name] for name in order if name in tables]


def _matched(found: ShardFile, tables: Sequence[Shape]) -> list[Shape]:
    """Return the tables with their columns in the order of the files."""
    names = {shape.name for shape in tables}
    if names != found.tables.keys():
        raise BackupError(f"the export has not the tables {', '.join(sorted(names))} and no other")
    for shape in tables:
        if sorted(found.tables[shape.name].columns) != sorted(shape.columns):
            raise BackupError(f"the file of {shape.name} has other columns than the table")
    return [replace(shape, columns=found.tables[shape.name].columns) for shape in tables]


def _lock(connection: Connection, tables: Sequence[Shape]) -> set[str]:
    """Keep writers and triggers away from tables, and make sure that they are empty.

    Triggers would give rows other versions and announce what was announced long ago. What is kept
    here for the rows of other logical shards, as unique values are, may be there.

    Returns:
        Those of shardkit's own tables that hold something.
    """
    used: set[str] = set()
    for shape in sorted(tables, key=lambda each: each.name):
        # ShareRowExclusiveLock to the end of the transaction.
        connection.execute(sql.SQL("ALTER TABLE {} DISABLE TRIGGER USER").format(shape.identifier))
    for shape in tables:
        held = connection.execute(
            sql.SQL("SELECT EXISTS (SELECT FROM {})").format(shape.identifier)
        ).fetchone()
        if held == (True,) and shape.name.startswith("shardkit_"):
            used.add(shape.name)
        elif held == (True,):
            raise RefusedError(
                f"{shape.title} is not empty; nothing is written over",
                hint="import into an empty logical shard",
            )
    return used


def _unlock(connection: Connection, tables: Sequence[Shape]) -> None:
    for shape in tables:
        connection.execute(sql.SQL("ALTER TABLE {} ENABLE TRIGGER USER").format(shape.identifier))


def _fill(  # noqa: PLR0917  one step of the import, with all that it has
    connection: Connection,
    folder: Path,
    found: ShardFile,
    tables: Sequence[Shape],
    used: set[str],
    on_table: Callable[[str, int, int], None],
) -> None:
    """Copy every file into its table and read it back."""
    connection.execute("SET CONSTRAINTS ALL DEFERRED")
    for number, shape in enumerate(tables):
        table, target = found.tables[shape.name], shape
        if shape.name in used:
            target = replace(shape, schema="pg_temp")
            connection.execute(
                sql.SQL("CREATE TEMPORARY TABLE {} (LIKE {}) ON COMMIT DROP").format(
                    sql.Identifier(shape.name), shape.identifier
                )
            )
        _copy_in(connection, folder / table.file, table.sha256, target)
        if copy_out(connection, target) != (table.rows, table.sha256):
            raise BackupError(
                f"{shape.title}: what was written is not what the file says",
                hint="nothing was imported; the file is not in order or not of this server's types",
            )
        if shape.name in used:
            _merge(connection, shape, target)
        on_table(shape.name, number + 1, len(tables))
    connection.execute("SET CONSTRAINTS ALL IMMEDIATE")


def _copy_in(connection: Connection, file: Path, expected: str, target: Shape) -> None:
    digest = hashlib.sha256()
    query = sql.SQL("COPY {} ({}) FROM STDIN").format(target.identifier, target.listed)
    with connection.cursor() as cursor, cursor.copy(query) as rows:
        for piece in pieces(file):
            digest.update(piece)
            rows.write(piece)
    if digest.hexdigest() != expected:
        raise BackupError(f"{file}: was changed while it was read")


def _merge(connection: Connection, shape: Shape, source: Shape) -> None:
    """Add the rows whose keys are not there; what is there stays."""
    if shape.name == "shardkit_directory":
        other = connection.execute(
            sql.SQL(
                "SELECT h.directory FROM {} AS h JOIN {} AS f USING (directory, key) "
                "WHERE h.shard <> f.shard LIMIT 1"
            ).format(shape.identifier, source.identifier)
        ).fetchone()
        if other is not None:
            raise RefusedError(
                f"a key of the directory {other[0]!r} has another logical shard here",
                hint="nothing was imported; its rows would be looked for elsewhere",
            )
    connection.execute(
        sql.SQL("INSERT INTO {} ({}) SELECT {} FROM {} ON CONFLICT DO NOTHING").format(
            shape.identifier, shape.listed, shape.listed, source.identifier
        )
    )


def _check_places(connection: Connection, found: ShardFile, tables: Sequence[Shape]) -> None:
    """Refuse rows that belong to another logical shard, as far as their keys say so themselves."""
    for shape in tables:
        rule = json.loads(found.rules.get(shape.name, "{}"))
        if rule.get("strategy") != "embedded" or rule.get("column") not in shape.columns:
            continue
        strange = connection.execute(
            sql.SQL("SELECT {0} FROM {1} WHERE ({0} >> {2}) & {3} <> {4} LIMIT 1").format(
                sql.Identifier(rule["column"]),
                shape.identifier,
                ids.SEQUENCE_BITS,
                ids.SHARD_MASK,
                found.logical_shard,
            )
        ).fetchone()
        if strange is not None:
            raise BackupError(
                f"{shape.title} would hold {rule['column']} {strange[0]} of logical shard "
                f"{(strange[0] >> ids.SEQUENCE_BITS) & ids.SHARD_MASK}",
                hint="nothing was imported; the files were not made by shardkit export",
            )


def _advance(connection: Connection, found: ShardFile, schema: str) -> None:
    """Let everything that is counted go on after what was given away."""
    for name, last in found.sequences.items():
        if last > 0:
            connection.execute(
                "SELECT setval(s, greatest(%(last)s, coalesce(pg_sequence_last_value(s), 0))) "
                "FROM to_regclass(format('%%I.%%I', %(schema)s::text, %(name)s::text)) AS s",
                {"last": last, "schema": schema, "name": name},
            )
    connection.execute(
        sql.SQL("UPDATE {} SET state = greatest(state, %s)").format(
            sql.Identifier(schema, "shardkit_id_state")
        ),
        (found.id_state,),
    )
    # Positions of events begin with the epoch; those to come have to be later.
    connection.execute(
        "UPDATE shardkit.ownership SET epoch = greatest(epoch, %s) WHERE logical_shard = %s",
        (found.epoch, found.logical_shard),
    )
    connection.execute(
        sql.SQL(
            "SELECT setval({0}, greatest(pg_sequence_last_value({0}), e.last)) FROM ("
            "SELECT max(position & {1}) AS last FROM {2}) AS e WHERE e.last > 0"
        ).format(POSITION, (1 << EPOCH_SHIFT) - 1, sql.Identifier(schema, "shardkit_outbox"))
    )
