"""`shardkit backup restore`: data folders of every physical shard, as they were at the label.

Copies the base backup and its log into a new folder, has a server replay the log up to the label on
this machine, ends what was prepared over several servers as the decision records say, and stops it.
What is left are data folders on a timeline of their own that any PostgreSQL of that version starts.
Called by the command line and by the drill. Never writes into a folder that holds anything.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from psycopg.errors import UndefinedColumn, UndefinedTable
from sqlalchemy import URL

from shardkit.backup import manifest
from shardkit.backup.server import RestoredServer, running
from shardkit.backup.store import Store
from shardkit.backup.verify import needed, verify
from shardkit.clock import SYSTEM, Clock
from shardkit.cluster import Cluster
from shardkit.errors import BackupError, ConfigurationError, RefusedError, TryAgainError
from shardkit.local.account import Account, claim_folder, is_reachable, server_account
from shardkit.local.binaries import SHARED_FOLDER
from shardkit.local.ports import HOST
from shardkit.ops.direct import connect
from shardkit.ops.moves.transactions import promote
from shardkit.topology import PhysicalShard, Topology
from shardkit.twophase import Settled, resolve

__all__ = ["Choice", "Restored", "Sides", "chosen", "register", "restore", "restored", "settle"]

_ATTEMPTS: Final = 20


@dataclass(frozen=True, slots=True)
class Sides:
    """Servers on restored data, running.

    Attributes:
        servers: by name of the physical shard.
        topology: leads to them instead of the cluster's own servers, and to no replica.
        seconds: from the beginning of the restore until each took writes.
    """

    servers: dict[str, RestoredServer]
    topology: Topology
    seconds: dict[str, float]


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restore left.

    Attributes:
        name: of the backup.
        folders: the data, by physical shard.
        settled: what was in doubt at the label, and how it ended.
        is_whole: whether all physical shards were restored; if not, what is in doubt still is.
    """

    name: str
    folders: dict[str, Path]
    settled: tuple[Settled, ...]
    is_whole: bool


@dataclass(frozen=True, slots=True)
class Choice:
    """What is to be restored, and to which point.

    Attributes:
        folder: of the backup.
        manifest: its manifest, with the physical shards that are wanted.
        label: name of the restore point.
        label_at: when it was taken.
        wal: files of log beside those of the backup, by physical shard and name.
    """

    folder: Path
    manifest: manifest.Manifest
    label: str
    label_at: dt.datetime
    wal: Mapping[str, Mapping[str, Path]]


def chosen(
    topology: Topology,
    store: Store,
    name: str | None,
    to: str | None,
    physical: Collection[str] = (),
    *,
    on_part: Callable[[str], None] = lambda _: None,
) -> Choice:
    """Choose a backup and a label, and verify the backup.

    Args:
        topology: of the cluster.
        store: where backups are kept.
        name: of the backup; None for the newest that was made before the label.
        to: name of a label of the archive, or `newest`; None for the backup's own.
        physical: only these physical shards; empty for all.
        on_part: told of every physical shard that is verified.

    Raises:
        ConfigurationError: there is no such backup, label or physical shard.
        RefusedError: the backup is not of this cluster.
        BackupError: the backup is damaged, or the archived log does not reach the label.
    """
    label = None
    if to is not None:
        labels = store.labels()
        label = next((e for e in reversed(labels) if to in {"newest", e.name}), None)
        if label is None:
            names = ", ".join(each.name for each in labels[-5:]) or "none"
            raise ConfigurationError(
                f"{store.folder}: no label {to!r} in the archived log", hint=f"the last: {names}"
            )
    if name is None:
        name = store.newest(None if label is None else label.label_at).name
    folder = store.path(name)
    found = _wanted(verify(folder, on_part=on_part), topology, physical)
    if label is None or label.name == found.name:
        return Choice(folder, found, found.name, found.label_at, {})
    wal = {each: _beyond(store, folder / each, found, label, each) for each in found.physical}
    return Choice(folder, found, label.name, label.label_at, wal)


def _beyond(
    store: Store, part: Path, found: manifest.Manifest, label: manifest.LabelFile, physical: str
) -> dict[str, Path]:
    """Return the archived log from the end of a backup's own to a label.

    Raises:
        BackupError: some is missing.
    """
    own = found.physical[physical]
    place = label.physical.get(physical)
    if place is None or place.timeline != own.timeline or label.label_at < found.label_at:
        raise BackupError(
            f"the label {label.name} does not follow the backup {found.name} on {physical}",
            hint="a failover begins a new timeline: take a new backup after it",
        )
    end = own.model_copy(update={"lsn": place.lsn})
    files: dict[str, Path] = {}
    for name in needed(part / "base", end):
        if name in own.wal:
            continue
        whole = store.wal(physical) / name
        files[name] = whole if whole.exists() else whole.with_name(f"{name}.partial")
        if not files[name].is_file():
            raise BackupError(f"the archived log of {physical} has a gap: {name} is missing")
    return files


def restore(
    topology: Topology,
    store: Store,
    into: Path,
    *,
    name: str | None = None,
    to: str | None = None,
    physical: Collection[str] = (),
    on_step: Callable[[str], None] = lambda _: None,
) -> Restored:
    """Restore a backup to its label, or to a later one of the archive.

    Args:
        topology: of the cluster: logins, and what is called how.
        store: where backups are kept.
        into: where the data go, one folder per physical shard; empty, or not there yet.
        name: of the backup; None for the newest.
        to: name of a label of the archive, or `newest`; None for the backup's own.
        physical: only these physical shards; empty for all.
        on_step: told of `verified`, `copied`, `recovered` and `settled`.

    Raises:
        RefusedError: the folder holds something, there is no room, or the backup is not of this
            cluster.
        BackupError: the backup is damaged, or the label is not reached.
    """
    refuse_used(into)
    choice = chosen(topology, store, name, to, physical)
    on_step("verified")
    with restored(topology, choice, into, on_step=on_step) as sides:
        is_whole = choice.manifest.physical.keys() == topology.physical.keys()
        register(sides.topology)
        settled = settle(sides.topology) if is_whole else ()
        on_step("settled")
    return Restored(
        choice.label, {n: s.folder for n, s in sides.servers.items()}, settled, is_whole
    )


@contextlib.contextmanager
def restored(
    topology: Topology,
    choice: Choice,
    into: Path,
    *,
    sync: bool = True,
    on_step: Callable[[str], None] = lambda _: None,
    clock: Clock = SYSTEM,
) -> Iterator[Sides]:
    """Lend servers on restored data; they are stopped in good order afterwards.

    Args:
        topology: of the cluster.
        choice: what is restored.
        into: where the data go; empty, or not there yet.
        sync: whether the servers wait for the disk; False for data that are thrown away.
        on_step: told of `copied` and `recovered`.
        clock: what measures.
    """
    account = server_account()
    started = clock.monotonic()
    found = choice.manifest
    _claim(into, found)
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=SHARED_FOLDER, prefix="shardkit-") as sockets:
        claim_folder(Path(sockets), 0o700, account)
        servers: dict[str, RestoredServer] = {}

        def copy(name: str) -> None:
            part = found.physical[name]
            _copy(choice.folder / name, choice.wal.get(name, {}), into / name, account)
            shard = topology.physical[name]
            users = [u for u in (shard.admin_url.username, shard.primary.url.username) if u]
            server = RestoredServer.of(
                name, part, into / name, sockets=Path(sockets), account=account, users=users
            )
            server.aim(choice.label, sync=sync)
            servers[name] = server

        def recover(name: str) -> None:
            servers[name].recover()
            seconds[name] = clock.monotonic() - started

        with ThreadPoolExecutor(len(found.physical)) as pool:
            list(pool.map(copy, found.physical))
            on_step("copied")
            with running(servers) as held:
                for server in servers.values():
                    server.launch()
                held.watch()
                list(pool.map(recover, found.physical))
                _check(servers, choice.label)
                on_step("recovered")
                yield Sides(servers, _topology(topology, servers), seconds)


def register(topology: Topology) -> None:
    """Register the timelines on which servers were restored: clients use no other.

    Again is fine. Rows and catalogue are those of the label only before.
    """
    for shard in topology.physical.values():
        with (
            connect(shard, application="shardkit backup", patience=60.0) as connection,
            # One of an older version registers its timeline when it is migrated.
            suppress(UndefinedTable, UndefinedColumn),
        ):
            promote(connection, server=shard.name, detail={"restored": True})


def settle(topology: Topology, clock: Clock = SYSTEM) -> tuple[Settled, ...]:
    """End everything that is prepared, as the decision records say, or by a rollback.

    Raises:
        TryAgainError: something is left (retryable).
    """
    settled: list[Settled] = []
    register(topology)
    with Cluster(topology) as cluster:
        done = resolve(cluster.connections, topology.physical, older_than=0.0)
        for _ in range(_ATTEMPTS):
            settled += done.settled
            if not done.waiting and not done.silent:
                return tuple(settled)
            clock.sleep(0.1)
            done = resolve(cluster.connections, topology.physical, older_than=0.0)
    raise TryAgainError(
        f"prepared transactions are left: {[str(each.gid) for each in done.waiting]}",
        hint=f"run shardkit twophase resolve --older-than 0; {dict(done.silent)}",
    )


def _wanted(
    found: manifest.Manifest, topology: Topology, physical: Collection[str]
) -> manifest.Manifest:
    """Return the part of a manifest that is wanted."""
    if (found.cluster, found.logical_shards) != (topology.name, topology.n_logical_shards):
        raise RefusedError(
            f"the backup is of the cluster {found.cluster!r} with {found.logical_shards} logical "
            f"shards, the configuration of {topology.name!r} with {topology.n_logical_shards}",
            hint="give the configuration of that cluster with --config",
        )
    names = found.physical.keys()
    if unknown := sorted({*physical} - names):
        raise ConfigurationError(
            f"the backup has no physical shard {', '.join(unknown)}",
            hint=f"there are {', '.join(names)}",
        )
    if missing := sorted(names - topology.physical.keys()):
        raise RefusedError(
            f"the configuration does not name the physical shard {', '.join(missing)}",
            hint="give the configuration of that time with --config",
        )
    wanted = {n: p for n, p in found.physical.items() if not physical or n in physical}
    return found.model_copy(update={"physical": wanted})


def refuse_used(into: Path) -> None:
    """Refuse a folder that holds anything.

    Raises:
        RefusedError: it does, or is no folder.
    """
    try:
        held = next(into.iterdir(), None)
    except FileNotFoundError:
        return
    except OSError as error:
        raise RefusedError(f"{into}: cannot be used: {error.strerror}") from error
    if held is not None:
        raise RefusedError(
            f"{into}: holds {held.name!r}; nothing is written over",
            hint="name an empty or a new folder",
        )


def _claim(into: Path, found: manifest.Manifest) -> None:
    """Make sure that the folder is there, empty and large enough."""
    refuse_used(into)
    try:
        into.mkdir(mode=0o711, parents=True, exist_ok=True)
    except OSError as error:
        raise RefusedError(f"{into}: cannot be made: {error.strerror}") from error
    account = server_account()
    if account.is_switched and not is_reachable(into, account):
        raise RefusedError(
            f"{into}: the user {account.name}, who runs PostgreSQL, cannot reach it",
            hint="name a folder that others may pass through (mode 0711), and its parents too",
        )
    free = shutil.disk_usage(into).free
    if free < found.size_bytes:
        raise RefusedError(
            f"{into}: {free:,} bytes are free, {found.size_bytes:,} are needed",
            hint="make room, or name another folder",
        )


def _copy(source: Path, more: Mapping[str, Path], target: Path, account: Account) -> None:
    """Copy base backup and log; the folder has its name when all of it is there."""
    new = target.with_name(f".new-{target.name}")
    try:
        shutil.copytree(source / "base", new, symlinks=True)
        for segment in (source / "wal").iterdir():
            shutil.copy(segment, new / "pg_wal" / segment.name)
        for name, segment in more.items():
            shutil.copy(segment, new / "pg_wal" / name)
        if account.is_switched:
            for path, folders, files in os.walk(new):
                for name in (*folders, *files):
                    os.chown(Path(path, name), account.uid, account.gid, follow_symlinks=False)
            os.chown(new, account.uid, account.gid)
        new.chmod(0o700)
        new.rename(target)
    except (OSError, shutil.Error) as error:
        shutil.rmtree(new, ignore_errors=True)
        raise BackupError(
            f"{target}: cannot be written: {error}", hint="make room, or name another folder"
        ) from error


def _check(servers: dict[str, RestoredServer], label: str) -> None:
    for name, server in servers.items():
        if not server.has_reached(label):
            raise BackupError(f"{name} did not stop at {label}; its log ends:\n{server.said()}")


def _topology(topology: Topology, servers: dict[str, RestoredServer]) -> Topology:
    """Return the topology with the restored servers in the place of the cluster's."""

    def here(url: URL, port: int) -> URL:
        return url.set(host=HOST, port=port, query={})

    def shard(old: PhysicalShard, port: int) -> PhysicalShard:
        database = old.admin_url.database
        address = here(old.primary.url, port).set(database=database)
        primary = replace(old.primary, url=address, read_url=None, server_url=None)
        return replace(
            old, primary=primary, replicas=(), admin_url=here(old.admin_url, port), pooler=None
        )

    shards = {name: shard(topology.physical[name], s.port) for name, s in servers.items()}
    return Topology(topology.name, shards, topology.shard_map)
