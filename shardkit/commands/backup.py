"""`shardkit backup`: copies of the whole cluster, archived log, and proof that they restore."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardkit.commands.migrated import print_json
from shardkit.commands.options import ConfigOption, DryRunOption, JsonOption
from shardkit.commands.output import console, printable
from shardkit.errors import BackupError

if TYPE_CHECKING:  # commands import what they need, so that --help stays quick
    from shardkit.backup.drill import Drill
    from shardkit.backup.manifest import Manifest
    from shardkit.backup.store import Store
    from shardkit.config import BackupConfig, Config
    from shardkit.topology import Topology

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True, help="Copies of the whole cluster, and proof that they restore."
)

FolderOption = Annotated[
    Path | None, typer.Option("--folder", help="Where backups are kept; instead of backup.folder.")
]
NameArgument = Annotated[
    str | None, typer.Argument(metavar="[NAME]", help="Of the backup; else the newest.")
]
ToOption = Annotated[
    str | None,
    typer.Option(
        "--to", help="A label of the archived log, or `newest`; else the backup's own label."
    ),
]


@app.command()
def create(
    config: ConfigOption = None,
    *,
    folder: FolderOption = None,
    keep: Annotated[
        int | None, typer.Option(min=1, help="Backups that stay; instead of backup.keep.")
    ] = None,
    rows: Annotated[
        bool, typer.Option(help="Count and digest all rows at the label, for the drill.")
    ] = True,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Copy every physical shard, with its log up to one label that is the same for all.

    Writers go on. Safe to interrupt: what is not finished is no backup.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from shardkit.backup import create as ops

    settings, topology, store, password = _inputs(config, folder)
    if dry_run:
        planned = ops.plan(topology, store)
        document = {
            "name": planned.name,
            "folder": str(planned.folder),
            "size_bytes": dict(planned.size_bytes),
            "free_bytes": planned.free_bytes,
        }
        if as_json:
            print_json(document)
        else:
            for name, size in planned.size_bytes.items():
                print(f"{name}: {size:,} bytes")
            print(f"to {planned.folder}, where {planned.free_bytes:,} bytes are free")
        return
    out = console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=out, disable=as_json or not out.is_terminal) as bar:
        tasks = {name: bar.add_task(name, total=None) for name in topology.physical}

        def told(physical: str, done: int, total: int) -> None:
            bar.update(tasks[physical], completed=done, total=total)

        made = ops.create(
            topology,
            store,
            user=settings.user or "",
            password=password,
            rows=rows,
            keep=keep or settings.keep,
            on_progress=told,
            on_step=lambda step: bar.print(step) if out.is_terminal else None,
        )
    if as_json:
        print_json(_summary(made))
    else:
        print(f"{made.name}: {made.size_bytes:,} bytes, label at {made.label_at:%F %T.%f} UTC")


@app.command("list")
def list_(
    config: ConfigOption = None, *, folder: FolderOption = None, as_json: JsonOption = False
) -> None:
    """Show the backups that are complete, oldest first, and labels of the archived log."""
    from rich.table import Table

    from shardkit.backup.manifest import Manifest

    _, _, store, _ = _inputs(config, folder)
    found, labels = store.backups(), store.labels()
    if as_json:
        entries = [
            _summary(each)
            if isinstance(each, Manifest)
            else {"name": each.name, "error": str(each.error)}
            for each in found
        ]
        last = labels[-1].name if labels else None
        print_json({"folder": str(store.folder), "backups": entries, "newest_label": last})
        return
    table = Table("backup", "label at", "bytes", "physical shards", box=None)
    for each in found:
        if isinstance(each, Manifest):
            at, size = f"{each.label_at:%F %T}", f"{each.size_bytes:,}"
            table.add_row(each.name, at, size, ", ".join(each.physical))
        else:
            table.add_row(each.name, "cannot be used", "", printable(each.error.message))
    console(markup=False).print(table if found else "no backups")
    if labels:
        print(f"{len(labels)} labels in the archived log, the newest {labels[-1].name}")


@app.command()
def verify(
    name: NameArgument = None,
    config: ConfigOption = None,
    *,
    folder: FolderOption = None,
    every: Annotated[bool, typer.Option("--all", help="Every backup.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Check every file of a backup and its log up to the label."""
    from shardkit.backup import verify as ops

    _, _, store, _ = _inputs(config, folder)
    names = [each.name for each in store.backups()] if every else [name or store.newest().name]
    results: dict[str, BackupError | None] = dict.fromkeys(names)
    for each in names:
        try:
            ops.verify(store.path(each))
        except BackupError as error:
            results[each] = error
    if as_json:
        print_json({each: str(wrong) if wrong else None for each, wrong in results.items()})
    else:
        for each, wrong in results.items():
            print(f"{each}: {printable(wrong.message) if wrong else 'good'}")
    for wrong in filter(None, results.values()):
        raise wrong


@app.command()
def restore(
    name: NameArgument = None,
    config: ConfigOption = None,
    *,
    into: Annotated[Path, typer.Option("--into", help="An empty or new folder for the data.")],
    to: ToOption = None,
    physical: Annotated[
        list[str] | None, typer.Option(help="Only this physical shard; may be repeated.")
    ] = None,
    folder: FolderOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make data folders of all physical shards as they were at the label.

    Servers replay the log here, on the loopback, and are stopped again. Nothing is written into a
    folder that holds anything.
    """
    from shardkit.backup import restore as ops

    _, topology, store, _ = _inputs(config, folder)
    if dry_run:
        ops.refuse_used(into)
        choice = ops.chosen(topology, store, name, to, physical or ())
        document: dict[str, Any] = {
            "backup": choice.manifest.name,
            "label": choice.label,
            "size_bytes": choice.manifest.size_bytes,
            "folders": {each: str(into / each) for each in choice.manifest.physical},
        }
    else:
        done = ops.restore(topology, store, into, name=name, to=to, physical=physical or ())
        document = {
            "label": done.name,
            "folders": {each: str(path) for each, path in done.folders.items()},
            "settled": [{"gid": str(s.gid), "outcome": s.outcome} for s in done.settled],
            "whole": done.is_whole,
        }
    if as_json:
        print_json(document)
        return
    print(f"{'would restore' if dry_run else 'restored'} to the label {document['label']}")
    for each, path in document["folders"].items():
        print(f"{each}: {path}")
    if not dry_run:
        print(
            "before it takes traffic: empty the caches (shardkit cache flush), clone replicas anew"
        )
        if not document["whole"]:
            print("when all physical shards run: shardkit twophase resolve --older-than 0")


@app.command()
def drill(
    config: ConfigOption = None,
    *,
    folder: FolderOption = None,
    to: ToOption = None,
    scratch: Annotated[
        Path | None, typer.Option(help="Where the data go for the time; else /var/tmp.")
    ] = None,
    sync: Annotated[
        bool, typer.Option(help="Wait for the disk, as when it is earnest; --no-sync is quicker.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Restore the newest backup on free ports, compare it with the label, measure, remove it."""
    from shardkit.backup.drill import drill as run
    from shardkit.commands.migrate import models_of
    from shardkit.config import default_file, load
    from shardkit.ops.migrate import load_revisions

    _, topology, store, _ = _inputs(config, folder)
    given, _ = load(config or default_file())
    location = given.migrations.location
    base = (config or default_file()).parent
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # the package may be the one at hand
    found = run(
        topology,
        store,
        to=to,
        scratch=scratch,
        sync=sync,
        revisions=None if location is None else load_revisions(location, folder=base),
        metadata=models_of(config, None),
    )
    if as_json:
        print_json(_drilled(found))
    else:
        _print(found)
    if not found.is_right:
        names = ", ".join(check.name for check in found.checks if check.is_right is False)
        raise BackupError(f"what was restored is not right: {names}")


@app.command()
def archive(
    config: ConfigOption = None,
    *,
    folder: FolderOption = None,
    every: Annotated[
        float, typer.Option(min=0.1, help="Seconds between two labels: what a restore can lose.")
    ] = 60.0,
    drop_slots: Annotated[
        bool, typer.Option("--drop-slots", help="Run nothing; servers keep no log any more.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Take the log of every primary, and labels in it, until told to stop.

    A slot on each primary keeps the log while this does not run; --drop-slots ends that.
    """
    from shardkit.backup import archive as ops

    settings, topology, store, password = _inputs(config, folder)
    if drop_slots:
        dropped = ops.drop_slots(topology, user=settings.user or "", password=password)
        if as_json:
            print_json({"dropped": dropped})
        else:
            print(f"dropped: {', '.join(dropped) or 'none'}")
        return
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    labels: list[str] = []

    def labelled(label: Any) -> None:
        labels.append(label.name)
        if not as_json:
            print(f"label {label.name}", flush=True)

    ops.archive(
        topology,
        store,
        stop,
        every=every,
        user=settings.user or "",
        password=password,
        on_label=labelled,
        on_miss=lambda error: print(f"no label: {error.message}", file=sys.stderr),
    )
    if as_json:
        print_json({"labels": len(labels), "newest": labels[-1] if labels else None})


def _inputs(
    config: Path | None, folder: Path | None
) -> tuple[BackupConfig, Topology, Store, str | None]:
    from shardkit.backup.store import Store
    from shardkit.config import default_file, load

    file = config or default_file()
    settings: Config
    settings, topology = load(file)
    place = folder or file.parent / settings.backup.folder
    password = settings.backup.secret(file.parent, "backup", key="backup.password_file")
    return settings.backup, topology, Store(place), password


def _summary(made: Manifest) -> dict[str, Any]:
    return {
        "name": made.name,
        "label_at": made.label_at.isoformat(),
        "window_seconds": made.window,
        "size_bytes": made.size_bytes,
        "physical": {
            name: {
                "lsn": part.lsn,
                "timeline": part.timeline,
                "version": part.version,
                "size_bytes": part.size_bytes,
            }
            for name, part in made.physical.items()
        },
    }


def _drilled(found: Drill) -> dict[str, Any]:
    newest = found.newest_at
    return {
        "backup": found.backup,
        "label": found.label,
        "label_at": found.label_at.isoformat(),
        "newest_commit_at": None if newest is None else newest.isoformat(),
        "recovery_point_seconds": round(found.recovery_point, 3),
        "recovery_time_seconds": round(found.recovery_time, 3),
        "physical_seconds": {name: round(s, 3) for name, s in found.seconds.items()},
        "right": found.is_right,
        "checks": [
            {"name": check.name, "right": check.is_right, "detail": check.detail}
            for check in found.checks
        ],
    }


def _print(found: Drill) -> None:
    from rich.table import Table

    table = Table("check", "", "found", box=None)
    words = {True: "right", False: "WRONG", None: "not looked at"}
    for check in found.checks:
        table.add_row(check.name, words[check.is_right], printable(check.detail))
    out = console(markup=False)
    out.print(table)
    out.print(
        f"recovery point: {found.recovery_point:.3f} s of archived writes are after the label "
        f"{found.label}; recovery time: {found.recovery_time:.1f} s"
    )
