"""`shardkit backup create`: every primary copied, with its log up to one common label.

Copies run beside each other and beside the writers; pg_receivewal takes the log from before the
first byte of the copy, while a slot that lives as long as this session keeps the server from
removing it. At the end comes the label (`shardkit.backup.label`). Nothing is called a backup before
all of it has reached the disk. Called by the command line.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import psycopg
from sqlalchemy import URL

from shardkit.backup import manifest
from shardkit.backup.facts import Facts, facts_of, gone, logins, room, where_is
from shardkit.backup.label import Label, no_migration, segment_of, take
from shardkit.backup.receiver import Receiver
from shardkit.backup.rows import Connection, copy_out, prepare, shapes
from shardkit.backup.store import Store
from shardkit.backup.tools import Tools, login
from shardkit.clock import SYSTEM, Clock
from shardkit.errors import BackupError
from shardkit.models import REFERENCE_SCHEMA
from shardkit.ops.direct import connect
from shardkit.ops.shape import digests
from shardkit.topology import Topology

__all__ = ["Plan", "create", "plan"]

Progress = Callable[[str, int, int], None]
"""Told of a physical shard, kilobytes copied, and how many there are."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a backup would do.

    Attributes:
        name: of the backup.
        folder: where it would go.
        size_bytes: of the databases, by physical shard.
        free_bytes: where it would go.
    """

    name: str
    folder: Path
    size_bytes: Mapping[str, int]
    free_bytes: int


def plan(topology: Topology, store: Store, *, clock: Clock = SYSTEM) -> Plan:
    """Return what `create` would do now; changes nothing.

    Raises:
        EndpointUnavailableError: a primary does not answer (retryable).
        RefusedError: `create` would be refused, and why.
    """
    with _admins(topology) as sessions:
        facts = facts_of(topology, sessions)
    sizes = {name: each.size_bytes for name, each in facts.items()}
    return Plan(manifest.name_at(clock.unix_ms()), store.folder, sizes, room(store, sizes))


def create(
    topology: Topology,
    store: Store,
    *,
    user: str = "",
    password: str | None = None,
    rows: bool = True,
    keep: int | None = None,
    sync: bool = True,
    on_progress: Progress = lambda *_: None,
    on_step: Callable[[str], None] = lambda _: None,
    clock: Clock = SYSTEM,
) -> manifest.Manifest:
    """Make a backup of every physical shard.

    Args:
        topology: the cluster.
        store: where backups are kept.
        user: login with REPLICATION that copies; empty for the admin's.
        password: of that login.
        rows: whether the rows of the label are counted and digested, for the drill. Reads every
            table twice.
        keep: how many backups stay; None for all.
        sync: whether files are flushed to the disk; False for tests.
        on_progress: told how far the copies are, from several threads.
        on_step: told of `copied`, `labelled` and `kept`.
        clock: where the time comes from.

    Raises:
        EndpointUnavailableError: a primary does not answer, or went away (retryable).
        RefusedError: another backup is made, there is no room, or a server has what cannot be
            restored elsewhere.
        TryAgainError: a migration runs, or no label could be taken (retryable).
        BackupError: it failed. Whatever is raised, nothing is left behind.
    """
    with store.locked(), _admins(topology) as sessions, Tools() as tools:
        facts = facts_of(topology, sessions)
        room(store, {name: each.size_bytes for name, each in facts.items()})
        name = manifest.name_at(clock.unix_ms())
        urls = logins(topology, user, password)
        with store.making(name) as folder, _slots(urls, topology, name):
            receivers = {
                physical: Receiver(
                    tools, url, folder / physical / "wal", where=where_is(topology, physical)
                )
                for physical, url in urls.items()
            }
            for receiver in receivers.values():
                receiver.wait_started()

            def copy(physical: str) -> None:
                target = folder / physical / "base"
                _copy(tools, urls[physical], target, name, sync=sync,
                    where=where_is(topology, physical),
                    on_progress=lambda done, total: on_progress(physical, done, total))  # fmt: skip

            _together(tools, copy, list(urls))
            on_step("copied")
            with (
                no_migration(sessions),
                _pairs(topology) if rows else contextlib.nullcontext() as pairs,
            ):
                try:
                    label = take(sessions, name, snapshots=pairs, clock=clock)
                except psycopg.OperationalError as error:
                    raise gone(error) from error
                on_step("labelled")
                parts = _parts(
                    folder,
                    sessions=sessions,
                    facts=facts,
                    label=label,
                    receivers=receivers,
                    pairs=pairs,
                )
            made = manifest.Manifest(
                format=manifest.FORMAT,
                name=name,
                cluster=topology.name,
                logical_shards=topology.n_logical_shards,
                label_at=label.at,
                window=round(label.window, 6),
                physical=parts,
            )
            _write(folder / manifest.MANIFEST, manifest.encode(made))
        on_step("kept")
        if keep is not None:
            store.thin(keep)
            _thin_archive(tools, store)
    return made


def _thin_archive(tools: Tools, store: Store) -> None:
    """Remove archived log and labels older than the oldest backup that is left."""
    usable = [b for b in store.backups() if isinstance(b, manifest.Manifest)]
    for physical, part in usable[0].physical.items():
        segments = [name for name in part.wal if not name.endswith(".history")]
        if segments and store.wal(physical).is_dir():
            tools.run("pg_archivecleanup", store.wal(physical), min(segments))
    for label in store.labels():
        if label.label_at < usable[0].label_at:
            (store.folder / "labels" / f"{label.name}.json").unlink()


def _parts(
    folder: Path,
    *,
    sessions: Mapping[str, Connection],
    facts: Mapping[str, Facts],
    label: Label,
    receivers: Mapping[str, Receiver],
    pairs: Mapping[str, tuple[Connection, Connection]] | None,
) -> dict[str, manifest.Part]:
    """Wait for the log up to the label and say what there is."""
    found: dict[str, manifest.Part] = {}
    for physical in label.points:
        # Ends the file of log, so that it arrives whole.
        sessions[physical].execute("SELECT pg_switch_wal()")
    for physical, point in label.points.items():
        fact, receiver, session = facts[physical], receivers[physical], sessions[physical]
        receiver.wait_for(segment_of(point.lsn, point.timeline, fact.segment_bytes))
        receiver.end()
        part = folder / physical
        for unfinished in (part / "wal").glob("*.partial"):
            unfinished.unlink()
        names = _schemas(session)
        found[physical] = manifest.Part(
            system_identifier=fact.system_identifier,
            timeline=point.timeline,
            version=fact.version,
            segment_bytes=fact.segment_bytes,
            lsn=point.lsn,
            size_bytes=sum(p.stat().st_size for p in part.rglob("*") if p.is_file()),
            base=manifest.sha256_of(part / "base" / "backup_manifest"),
            wal={p.name: manifest.sha256_of(p) for p in sorted((part / "wal").iterdir())},
            settings=fact.settings,
            schemas=digests(session, names),
            rows=None if pairs is None else _rows(pairs[physical], names),
        )
    return found


def _rows(pair: tuple[Connection, Connection], names: list[str]) -> dict[str, manifest.Rows]:
    """Count and digest every table as it was before and after the label."""
    before, after = pair
    found: dict[str, manifest.Rows] = {}
    # Asked outside the old snapshot: a table that holds nothing now held nothing then.
    for shape in shapes(after, names):
        if shape.is_empty:
            found[shape.title] = (0, manifest.NOTHING)
            continue
        one = copy_out(before, shape)
        found[shape.title] = one if copy_out(after, shape) == one else None
    return found


def _schemas(session: Connection) -> list[str]:
    rows = session.execute(
        "SELECT nspname FROM pg_namespace WHERE nspname ~ '^shard_[0-9]{4}$' "
        "OR nspname IN ('shardkit', %s) ORDER BY 1",
        (REFERENCE_SCHEMA,),
    )
    return [name for (name,) in rows]


def _copy(
    tools: Tools,
    url: URL,
    target: Path,
    name: str,
    *,
    sync: bool,
    where: str,
    on_progress: Callable[[int, int], None],
) -> None:
    conninfo, secret = login(url, application="shardkit backup")

    def heard(line: str) -> None:
        if match := re.match(r"\s*(\d+)/(\d+) kB", line):
            on_progress(int(match[1]), int(match[2]))

    tools.run(
        "pg_basebackup",
        *("--pgdata", target, "--format=plain", "--wal-method=none", "--checkpoint=fast"),
        *("--manifest-checksums=SHA256", "--label", name, "--progress", "--no-password"),
        *("--dbname", conninfo, *(() if sync else ("--no-sync",))),
        secret=secret,
        on_line=heard,
        where=where,
    )


def _together(tools: Tools, task: Callable[[str], None], names: list[str]) -> None:
    """Run a task for every physical shard at once; the first failure ends the others."""
    with ThreadPoolExecutor(len(names)) as pool:
        futures = [pool.submit(task, name) for name in names]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            tools.end_all()
            raise


@contextlib.contextmanager
def _admins(topology: Topology) -> Iterator[dict[str, Connection]]:
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(connect(shard, application="shardkit backup"))
            for name, shard in topology.physical.items()
        }


@contextlib.contextmanager
def _pairs(topology: Topology) -> Iterator[dict[str, tuple[Connection, Connection]]]:
    """Open two connections to every primary, for two snapshots."""
    with contextlib.ExitStack() as stack:
        found: dict[str, tuple[Connection, Connection]] = {}
        for name, shard in topology.physical.items():
            one, two = (
                stack.enter_context(connect(shard, application="shardkit backup")) for _ in range(2)
            )
            prepare(one)
            prepare(two)
            found[name] = (one, two)
        yield found


@contextlib.contextmanager
def _slots(urls: Mapping[str, URL], topology: Topology, name: str) -> Iterator[None]:
    """Keep every server from removing log from now on; ends with the session, whatever ends it."""
    slot = "shardkit_" + re.sub(r"[^a-z0-9]", "_", name.lower())
    with contextlib.ExitStack() as stack:
        for physical, url in urls.items():
            conninfo, secret = login(url, application="shardkit backup")
            try:
                session = stack.enter_context(
                    psycopg.connect(
                        conninfo,
                        dbname=url.database,
                        password=secret.get("PGPASSWORD"),
                        autocommit=True,
                    )
                )
                session.execute(
                    "SELECT pg_create_physical_replication_slot(%s, true, true)", (slot,)
                )
            except psycopg.OperationalError as error:
                raise gone(error, where_is(topology, physical)) from error
            except psycopg.Error as error:
                raise BackupError(
                    f"no slot can be made: {str(error).splitlines()[0]}",
                    endpoint=where_is(topology, physical),
                    hint="the login needs REPLICATION, the server a free max_replication_slots",
                ) from error
        yield


def _write(path: Path, text: str) -> None:
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
