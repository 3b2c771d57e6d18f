"""`shardkit local`: an embedded cluster from the command line.

Parses, calls `shardkit.local`, prints. What a command needs is imported by it, so that `--help`
stays quick.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardkit.commands.output import console

if TYPE_CHECKING:
    from shardkit.local import LocalCluster, LocalOptions, LocalProgress, LocalStatus

__all__ = ["app"]

app = typer.Typer(
    help="An embedded cluster: PostgreSQL primaries and replicas, Redis, Memcached, PgBouncer.",
    no_args_is_help=True,
)

Directory = Annotated[Path, typer.Option("--dir", help="Where the cluster lives.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and change nothing.")]
Number = int | None
Switch = bool | None

_FOLDER = Path(".shardkit")


@app.command()
def up(
    directory: Directory = _FOLDER,
    *,
    physical: Annotated[Number, typer.Option(help="Physical shards; fixed at creation.")] = None,
    replicas: Annotated[Number, typer.Option(help="Replicas of each primary.")] = None,
    logical_shards: Annotated[
        Number, typer.Option(help="Logical shards altogether; fixed at creation.")
    ] = None,
    redis: Annotated[Switch, typer.Option(help="Start a Redis.")] = None,
    memcached: Annotated[Switch, typer.Option(help="Start a Memcached.")] = None,
    pgbouncer: Annotated[
        Switch, typer.Option(help="Put PgBouncer before each physical shard.")
    ] = None,
    fsync: Annotated[Switch, typer.Option(help="Survive a crash of the machine.")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Run in the background.")] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Start the cluster and keep it until Ctrl-C; its data stays for the next time.

    Options that are not given keep the value the cluster was created with.
    """
    from shardkit.local.supervisor import start_detached

    given = {
        "physical": physical,
        "replicas": replicas,
        "logical_shards": logical_shards,
        "redis": redis,
        "memcached": memcached,
        "pgbouncer": pgbouncer,
        "fsync": fsync,
    }
    options = _options(directory, {name: v for name, v in given.items() if v is not None})
    if dry_run:
        _print_plan(directory, options, as_json=as_json)
    elif detach:
        with _progress_bar("starting", is_quiet=as_json) as progress:
            status = start_detached(directory, options, progress)
        _print_status(status, as_json=as_json)
        if not as_json:
            typer.echo(f"process {status.owner_pid} runs it; `shardkit local down` stops it")
    else:
        _up(directory, options, as_json=as_json)


@app.command()
def down(
    directory: Directory = _FOLDER,
    *,
    delete_data: Annotated[
        bool, typer.Option("--delete-data", help="Delete everything the cluster kept, too.")
    ] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Stop the cluster, and end what a killed owner left behind."""
    from shardkit.local import read_status, stop_cluster

    running = read_status(directory).n_running if dry_run else None
    if running is None:
        running = stop_cluster(directory, delete_data=delete_data)
    if as_json:
        plan = {"directory": str(directory), "servers": running, "delete_data": delete_data}
        typer.echo(json.dumps(plan | {"done": not dry_run}))
        return
    would = "would have " if dry_run else ""
    typer.echo(f"{would}stopped {running} servers of {directory}")
    if delete_data:
        typer.echo(f"{would}deleted its data")


@app.command(name="status")
def show_status(directory: Directory = _FOLDER, *, as_json: Json = False) -> None:
    """Show what runs where; exit code 1 when the cluster is not up."""
    from shardkit.local import read_status

    status = read_status(directory)
    _print_status(status, as_json=as_json)
    if not status.is_ready:
        raise typer.Exit(1)


def _options(directory: Path, given: dict[str, Any]) -> LocalOptions:
    """Return the given options over those the cluster was created with."""
    from dataclasses import replace

    from shardkit.local import LocalOptions, read_status

    return replace(read_status(directory).options or LocalOptions(), **given)


def _up(directory: Path, options: LocalOptions, *, as_json: bool) -> None:
    """Run the cluster in the foreground until a signal asks for its end."""
    from shardkit.local import LocalCluster, read_status, watched

    cluster = LocalCluster(directory, options, is_supervised=True)
    with _signals_as_interrupt() as ignore_signals:
        # Interrupted here, it stops what it has started and the command has failed.
        with _progress_bar("starting", is_quiet=as_json) as progress:
            cluster.start(progress)
        try:
            _print_status(read_status(directory), as_json=as_json)
            if not as_json:
                for name in cluster.missing:
                    typer.echo(f"{name} is not installed; going on without it")
                typer.echo("running; Ctrl-C stops it")
            sys.stdout.flush()
            with watched(cluster, lambda step: typer.echo(step, err=True)):
                _watch(cluster)
        except KeyboardInterrupt:
            typer.echo("stopping", err=True)
        finally:
            # A second signal must not leave half of them running.
            ignore_signals()
            with _progress_bar("stopping", is_quiet=as_json) as progress:
                cluster.stop(progress)


def _watch(cluster: LocalCluster) -> None:
    """Wait for ever; say so when a server ends by itself."""
    from shardkit.local import ServerStatus

    never = threading.Event()
    known: set[str] = set()
    while not never.wait(1.0):
        for server in cluster.servers:
            if server.status is not ServerStatus.STOPPED:
                known.discard(server.name)
            elif server.name not in known:
                known.add(server.name)
                typer.echo(f"{server.name} has ended; its log: {server.log}", err=True)


@contextmanager
def _signals_as_interrupt() -> Iterator[Callable[[], None]]:
    """Turn SIGTERM and SIGHUP into Ctrl-C; yields what makes all three be ignored."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}

    def handle_all(handler: Any) -> None:
        for number in numbers:
            signal.signal(number, handler)

    handle_all(signal.default_int_handler)
    try:
        yield lambda: handle_all(signal.SIG_IGN)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _progress_bar(what: str, *, is_quiet: bool) -> Iterator[Callable[[LocalProgress], None]]:
    """Show a bar on a terminal, lines elsewhere, nothing when quiet."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    out = console(stderr=True)
    if is_quiet:
        yield lambda _: None
    elif not out.is_terminal:
        yield lambda step: typer.echo(f"{step.done}/{step.total} {step.what}", err=True)
    else:
        now = TextColumn("{task.fields[now]}")
        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), now)
        with Progress(*columns, console=out, transient=True) as bar:
            task = bar.add_task(what, total=None, now="")

            def show(step: LocalProgress) -> None:
                bar.update(task, completed=step.done, total=step.total, now=step.what)

            yield show


def _print_plan(directory: Path, options: LocalOptions, *, as_json: bool) -> None:
    placement = options.placement()
    if as_json:
        plan = {"directory": str(directory.absolute()), "placement": placement}
        typer.echo(json.dumps(plan | {"options": options.as_json()}, indent=2))
        return
    typer.echo(f"would start in {directory.absolute()}:")
    for name, numbers in placement.items():
        typer.echo(f"  {name}: 1 primary, {options.replicas} replicas, logical shards {numbers}")
    for name in ("pgbouncer", "redis", "memcached"):
        if getattr(options, name):
            typer.echo(f"  {name}, if installed")


def _print_status(status: LocalStatus, *, as_json: bool) -> None:
    from rich.table import Table

    if as_json:
        typer.echo(json.dumps(status.as_json(), indent=2))
        return
    if not status.servers:
        typer.echo(f"no embedded cluster in {status.directory}")
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("server", "kind", "role", "address", "pid", "status", "version"):
        table.add_column(heading, no_wrap=True)
    for server in status.servers:
        address = f"{server.host}:{server.port}"
        pid = str(server.pid or "-")
        row = (server.name, server.kind, server.role or "-", address, pid, server.status)
        style = None if server.status == "running" else "yellow"
        table.add_row(*row, server.version, style=style)
    console().print(table)
    typer.echo(f"configuration: {status.config}")
