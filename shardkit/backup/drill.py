"""`shardkit backup drill`: restores the newest backup somewhere else and looks whether it is right.

A backup is proven by nothing less. The servers run on free ports of the loopback, in a folder that
is gone afterwards; the cluster itself is not touched. What is compared was written down at the
label (`shardkit.backup.create`). Called by the command line.
"""

from __future__ import annotations

import datetime as dt
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psycopg
from psycopg import sql
from sqlalchemy import MetaData

from shardkit import ids
from shardkit.backup import manifest
from shardkit.backup.newest import newest_commit
from shardkit.backup.restore import Sides, chosen, register, restored, settle
from shardkit.backup.rows import Connection, copy_out, prepare, shapes
from shardkit.backup.store import Store
from shardkit.backup.tools import Tools
from shardkit.clock import SYSTEM, Clock
from shardkit.cluster import Cluster
from shardkit.emitting import EPOCH_SHIFT, POSITION
from shardkit.errors import ShardkitError
from shardkit.local.account import server_account
from shardkit.local.binaries import SHARED_FOLDER
from shardkit.ops import lookup as lookups
from shardkit.ops import reference
from shardkit.ops.direct import connect
from shardkit.ops.drift import drift
from shardkit.ops.revisions import Revision
from shardkit.ops.shape import digests
from shardkit.topology import Topology, schema_name
from shardkit.twophase import in_doubt
from shardkit.uniques import lookups_of

__all__ = ["Check", "Drill", "drill"]

# AccessShareLock on catalogues. Sequences with the column they fill; an unused one has no value.
_SEQUENCES: Final = """
SELECT s.schemaname, s.sequencename, coalesce(s.last_value, 0), c.relname, a.attname
FROM pg_sequences AS s
    JOIN pg_depend AS d ON d.objid = format('%%I.%%I', s.schemaname, s.sequencename)::regclass
        AND d.classid = 'pg_class'::regclass AND d.deptype IN ('a', 'i') AND d.refobjsubid > 0
    JOIN pg_class AS c ON c.oid = d.refobjid
    JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum = d.refobjsubid
WHERE s.schemaname = ANY (%s)
UNION ALL
SELECT n.nspname, 'version_seq', coalesce(s.last_value, 0), c.relname, 'version'
FROM pg_trigger AS t JOIN pg_class AS c ON c.oid = t.tgrelid
    JOIN pg_namespace AS n ON n.oid = c.relnamespace
    JOIN pg_sequences AS s ON s.schemaname = n.nspname AND s.sequencename = 'version_seq'
WHERE t.tgname = 'shardkit_version' AND n.nspname = ANY (%s)
"""

# Minted ids stand in columns of this name and type (shardkit.models).
_IDS: Final = """
SELECT n.nspname, c.relname FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
    JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attname = 'id' AND NOT a.attisdropped
WHERE n.nspname = ANY (%s) AND c.relkind IN ('r', 'p') AND a.atttypid = 'bigint'::regtype
    AND NOT starts_with(c.relname, 'shardkit_')
"""

_LAST_POSITION: Final = sql.SQL("SELECT last_value FROM {}").format(
    sql.Identifier(*POSITION.split("."))
)


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what.
        is_right: whether it is as it should be; None when it was not looked at.
        detail: what was found, or why it was not looked at.
    """

    name: str
    is_right: bool | None
    detail: str


@dataclass(frozen=True, slots=True)
class Drill:
    """What a drill found.

    Attributes:
        backup: name of the backup.
        label: what it was restored to; the backup's own, or a later one of the archive.
        label_at: when that was taken.
        newest_at: of the newest commit in the log that is kept, of any server; None for none.
        recovery_point: seconds of writes in that log which this restore leaves out.
        seconds: from the beginning until a server took writes, by physical shard.
        recovery_time: seconds until all did and nothing was in doubt any more.
        checks: what was looked at, in order.
    """

    backup: str
    label: str
    label_at: dt.datetime
    newest_at: dt.datetime | None
    recovery_point: float
    seconds: dict[str, float]
    recovery_time: float
    checks: tuple[Check, ...]

    @property
    def is_right(self) -> bool:
        """Whether nothing is wrong."""
        return all(check.is_right is not False for check in self.checks)


def drill(
    topology: Topology,
    store: Store,
    *,
    to: str | None = None,
    scratch: Path | None = None,
    sync: bool = True,
    revisions: Sequence[Revision] | None = None,
    metadata: MetaData | None = None,
    on_step: Callable[[str], None] = lambda _: None,
    clock: Clock = SYSTEM,
) -> Drill:
    """Restore the newest backup, look at it, and remove it again.

    Args:
        topology: of the cluster; its logins are used, its servers are not touched.
        store: where backups are kept.
        to: a label, or `newest` for the newest of the archive; None for the backup's own.
        scratch: where the data go for the time; None for a folder of the system.
        sync: whether the servers wait for the disk, as they would when it is earnest.
        revisions: of the application, oldest first; None leaves drift out.
        metadata: of the models; None leaves unique columns out.
        on_step: told what is done.
        clock: what measures.

    Raises:
        BackupError: there is no backup that can be used, or it cannot be restored.
        RefusedError: there is no room.
    """
    started = clock.monotonic()
    choice = chosen(topology, store, None, to)
    found = choice.manifest
    place = tempfile.TemporaryDirectory(dir=scratch or SHARED_FOLDER, prefix="shardkit-drill-")
    with place as folder:
        if server_account().is_switched:
            Path(folder).chmod(0o711)
        into = Path(folder) / "data"
        with restored(topology, choice, into, sync=sync, on_step=on_step) as sides:
            checks = [_labelled(sides, choice.label)]
            if choice.label == found.name:
                checks += [_catalogue(sides, found), _rows(sides, found)]
            checks.append(_settled(sides))
            recovery_time = clock.monotonic() - started
            on_step("settled")
            checks += [_reference(sides), *_numbers(sides)]
            checks += [_drift(sides, revisions), *_lookups(sides, metadata)]
            seconds = dict(sides.seconds)
    with Tools(next(iter(found.physical.values())).version // 10_000) as tools:
        newest = newest_commit(tools, store, found)
    lost = 0.0 if newest is None else max(0.0, (newest - choice.label_at).total_seconds())
    return Drill(
        backup=found.name,
        label=choice.label,
        label_at=choice.label_at,
        newest_at=newest,
        recovery_point=lost,
        seconds=seconds,
        recovery_time=recovery_time,
        checks=tuple(checks),
    )


def _labelled(sides: Sides, label: str) -> Check:
    wrong = [name for name, server in sides.servers.items() if not server.has_reached(label)]
    return Check(
        "label",
        not wrong,
        f"not reached: {', '.join(wrong)}" if wrong else f"all stopped at {label}",
    )


def _catalogue(sides: Sides, found: manifest.Manifest) -> Check:
    """Compare every schema with what it was at the label."""
    wrong, n = [], 0
    for name, part in found.physical.items():
        with connect(sides.topology.physical[name], application="shardkit backup") as connection:
            now = digests(connection, list(part.schemas))
        n += len(part.schemas)
        wrong += [f"{name}: {s}" for s, digest in part.schemas.items() if now.get(s) != digest]
    return Check("catalogue", not wrong, _said(wrong, f"{n} schemas as at the label"))


def _rows(sides: Sides, found: manifest.Manifest) -> Check:
    """Compare every table with its rows at the label; before anything in doubt is ended."""
    wrong, n_tables, n_rows, n_unknown = [], 0, 0, 0
    if any(part.rows is None for part in found.physical.values()):
        return Check("rows", None, "the backup was made without rows")
    for name, part in found.physical.items():
        expected = part.rows or {}
        schemas = sorted({title.split(".")[0] for title in expected} | part.schemas.keys())
        with connect(sides.topology.physical[name], application="shardkit backup") as connection:
            prepare(connection)
            for shape in shapes(connection, schemas):
                wanted = expected.get(shape.title)
                if wanted is None:
                    n_unknown += 1
                    if shape.title not in expected:
                        wrong.append(f"{name}: {shape.title} was not there")
                    continue
                n_tables += 1
                now = (0, manifest.NOTHING) if shape.is_empty else copy_out(connection, shape)
                n_rows += now[0]
                if now != tuple(wanted):
                    wrong.append(f"{name}: {shape.title} has {now[0]} rows, {wanted[0]} then")
    right = f"{n_rows:,} rows of {n_tables:,} tables as at the label, {n_unknown:,} in motion then"
    return Check("rows", not wrong, _said(wrong, right))


def _settled(sides: Sides) -> Check:
    register(sides.topology)
    with Cluster(sides.topology) as cluster:
        found, silent = in_doubt(cluster.connections, sides.topology.physical)
    try:
        done = settle(sides.topology)
    except ShardkitError as error:
        return Check("two-phase", is_right=False, detail=str(error))
    return Check("two-phase", not silent, f"{len(found)} in doubt, {len(done)} ended, none left")


def _reference(sides: Sides) -> Check:
    compared = reference.check(sides.topology)
    wrong = [f"{d.physical}: {d.table}" for d in compared.differences]
    wrong += [f"{name}: {error}" for name, error in compared.failed.items()]
    return Check("reference", not wrong, _said(wrong, f"{len(compared.tables)} tables the same"))


def _numbers(sides: Sides) -> list[Check]:
    """Look whether what is counted goes on after what was given away."""
    behind: list[str] = []
    minted: list[str] = []
    n_sequences = n_shards = 0
    for name, shard in sides.topology.physical.items():
        numbers = sides.topology.shard_map.owned_by(name)
        schemas = [schema_name(number) for number in numbers]
        with connect(shard, application="shardkit backup") as connection:
            for schema, sequence, last, table, column in connection.execute(
                _SEQUENCES, (schemas, schemas)
            ).fetchall():
                n_sequences += 1
                if _largest(connection, schema, table, column) > last:
                    behind.append(f"{name}: {schema}.{sequence}")
            behind += _position(connection, name, numbers)
            largest: dict[str, int] = {}
            for schema, table in connection.execute(_IDS, (schemas,)).fetchall():
                here = _largest(connection, schema, table, "id")
                largest[schema] = max(largest.get(schema, 0), here)
            try:
                rows = connection.execute(
                    "SELECT * FROM shardkit.lease_ids(%s, %s)", (list(numbers), [1] * len(numbers))
                ).fetchall()
            except psycopg.Error as error:
                minted.append(f"{name}: {str(error).splitlines()[0]}")
                continue
        for number, state in rows:
            n_shards += 1
            fresh = ids.compose(state >> ids.SEQUENCE_BITS, number, state & ids.SEQUENCE_MASK)
            if fresh <= largest.get(schema_name(number), 0):
                minted.append(f"{name}: logical shard {number}")
    return [
        Check("sequences", not behind, _said(behind, f"{n_sequences} ahead of their columns")),
        Check("ids", not minted, _said(minted, f"{n_shards} logical shards mint later ids")),
    ]


def _largest(connection: Connection, schema: str, table: str, column: str) -> int:
    row = connection.execute(
        sql.SQL("SELECT coalesce(max({}), 0) FROM {}").format(
            sql.Identifier(column), sql.Identifier(schema, table)
        )
    ).fetchone()
    return int(row[0]) if row else 0


def _position(connection: Connection, name: str, numbers: Sequence[int]) -> list[str]:
    """Return whether the order of events goes on."""
    row = connection.execute(_LAST_POSITION).fetchone()
    last = int(row[0]) if row else 0
    most = max(
        (_largest(connection, schema_name(n), "shardkit_outbox", "position") for n in numbers),
        default=0,
    )
    return [f"{name}: {POSITION}"] if most & ((1 << EPOCH_SHIFT) - 1) > last else []


def _drift(sides: Sides, revisions: Sequence[Revision] | None) -> Check:
    if revisions is None:
        return Check("drift", None, "migrations.location is not set")
    compared = drift(sides.topology, revisions)
    wrong = [f"{d.physical}: {d.kind} {d.name}" for d in compared.differences]
    wrong += [f"{name}: {error}" for name, error in compared.errors.items()]
    return Check("drift", not wrong, _said(wrong, "none"))


def _lookups(sides: Sides, metadata: MetaData | None) -> list[Check]:
    if metadata is None:
        return [Check("lookups", None, "migrations.models is not set")]
    wanted = [each for table in metadata.sorted_tables for each in lookups_of(table)]
    found = []
    with Cluster(sides.topology) as cluster:
        for each in wanted:
            report = lookups.run(cluster, each, "check")
            said = f"{report.n_rows:,} rows, {report.n_missing:,} missing, {report.n_stale:,} stale"
            found.append(Check(f"lookup {each.name}", report.error is None, said))
    return found


def _said(wrong: Sequence[str], right: str) -> str:
    if not wrong:
        return right
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return f"{'; '.join(wrong[:3])}{more}"
