"""`shardkit local`: an embedded cluster from the command line.

Parses, calls `shardkit.local`, prints. Heavy modules are imported by the command that needs them,
so that `shardkit --help` stays quick.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from shardkit.local import LocalCluster, LocalOptions, LocalProgress, LocalStatus

__all__ = ["app"]

app = typer.Typer(
    help="An embedded cluster: PostgreSQL primaries and replicas, Redis, Memcached, PgBouncer.",
    no_args_is_help=True,
)

_DETACHED_TIMEOUT = 180.0
_POLL = 0.1

Directory = Annotated[Path, typer.Option("--dir", help="Where the cluster lives.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and change nothing.")]


@app.command()
def up(
    directory: Directory = Path(".shardkit"),
    *,
    physical: Annotated[int | None, typer.Option(help="Physical shards; fixed at creation.")] = None,
    replicas: Annotated[int | None, typer.Option(help="Replicas of each primary.")] = None,
    logical_shards: Annotated[
        int | None, typer.Option(help="Logical shards altogether; fixed at creation.")
    ] = None,
    redis: Annotated[bool | None, typer.Option(help="Start a Redis.")] = None,
    memcached: Annotated[bool | None, typer.Option(help="Start a Memcached.")] = None,
    pgbouncer: Annotated[
        bool | None, typer.Option(help="Start a PgBouncer per physical shard.")
    ] = None,
    fsync: Annotated[
        bool | None, typer.Option(help="Survive a crash of the machine; slower.")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Run in the background.")] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Start the cluster and keep it until Ctrl-C; its data stays for the next time.

    Options that are not given keep the value the cluster was created with.
    """
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
        _up_detached(directory, options, as_json=as_json)
    else:
        _up(directory, options, as_json=as_json)


@app.command()
def down(
    directory: Directory = Path(".shardkit"),
    *,
    delete_data: Annotated[
        bool, typer.Option("--delete-data", help="Delete everything the cluster kept, too.")
    ] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Stop the cluster, and end what a killed owner left behind."""
    from shardkit.local.status import read_status, stop_cluster

    status = read_status(directory)
    running = [server.name for server in status.servers if server.pid is not None]
    plan = {"directory": str(status.directory), "stop": running, "delete_data": delete_data}
    if not dry_run:
        stop_cluster(directory, delete_data=delete_data)
    if as_json:
        typer.echo(json.dumps(plan | {"done": not dry_run}))
        return
    verb = "would stop" if dry_run else "stopped"
    typer.echo(f"{verb} {len(running)} servers of {status.directory}")
    if delete_data:
        typer.echo("would delete its data" if dry_run else "deleted its data")


@app.command(name="status")
def show_status(directory: Directory = Path(".shardkit"), *, as_json: Json = False) -> None:
    """Show what runs where; exit code 1 when the cluster is not up."""
    from shardkit.local.status import read_status

    status = read_status(directory)
    if as_json:
        typer.echo(json.dumps(status.as_json(), indent=2))
    else:
        _print_status(status)
    if not status.is_ready:
        raise typer.Exit(1)


def _options(directory: Path, given: dict[str, Any]) -> LocalOptions:
    from dataclasses import replace

    from shardkit.local.options import LocalOptions
    from shardkit.local.state import State

    old = State.load(directory / "state.json")
    return replace(old.options if old else LocalOptions(), **given)


def _up(directory: Path, options: LocalOptions, *, as_json: bool) -> None:
    from shardkit.local import LocalCluster, read_status

    ended = threading.Event()
    cluster = LocalCluster(directory, options, is_supervised=True)
    with _stopping(ended):
        with _progress_bar("starting", is_quiet=as_json) as progress:
            cluster.start(progress)
        try:
            status = read_status(directory)
            if as_json:
                typer.echo(json.dumps(status.as_json(), indent=2))
            else:
                _print_status(status)
                for name in cluster.missing:
                    typer.echo(f"{name} is not installed; going on without it")
                typer.echo("running; Ctrl-C stops it")
            sys.stdout.flush()
            _watch(cluster, ended)
        except KeyboardInterrupt:
            ended.set()
        finally:
            # A second signal must not leave half of them running.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            with _progress_bar("stopping", is_quiet=as_json) as progress:
                cluster.stop(progress)


def _watch(cluster: LocalCluster, ended: threading.Event) -> None:
    """Wait until asked to end; say so when a server ends by itself."""
    from shardkit.local import ServerStatus

    known: set[str] = set()
    while not ended.wait(1.0):
        for server in cluster.servers:
            if server.status is not ServerStatus.STOPPED:
                known.discard(server.name)
            elif server.name not in known:
                known.add(server.name)
                typer.echo(f"{server.name} has ended; its log: {server.log}", err=True)


@contextmanager
def _stopping(ended: threading.Event) -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into what Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        ended.set()
        raise KeyboardInterrupt

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _up_detached(directory: Path, options: LocalOptions, *, as_json: bool) -> None:
    """Start a supervisor in the background and wait until the cluster is up."""
    from shardkit.clock import SYSTEM
    from shardkit.errors import LocalServerError
    from shardkit.local import log_tail, read_status

    directory.mkdir(parents=True, exist_ok=True)
    log = directory / "supervisor.log"
    command = [sys.executable, "-m", "shardkit", "local", "up", "--dir", str(directory)]
    with log.open("wb") as output:
        child = subprocess.Popen(
            [*command, *_as_arguments(options)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    pause = threading.Event()
    deadline = SYSTEM.monotonic() + _DETACHED_TIMEOUT
    with _progress_bar("starting", is_quiet=as_json) as progress:
        done = 0
        while True:
            status = read_status(directory)
            is_ours = status.owner_pid == child.pid
            if is_ours and status.is_ready:
                break
            if is_ours and status.n_running != done:
                done = status.n_running
                progress(_step(done, len(status.servers)))
            if child.poll() is not None:
                raise LocalServerError(
                    f"the supervisor ended with code {child.returncode}; its output:\n"
                    f"{log_tail(log)}"
                )
            if SYSTEM.monotonic() > deadline:
                child.terminate()
                raise LocalServerError(f"not up after {_DETACHED_TIMEOUT:g} seconds; see {log}")
            pause.wait(_POLL)
    if as_json:
        typer.echo(json.dumps(status.as_json(), indent=2))
    else:
        _print_status(status)
        typer.echo(f"running in process {child.pid}; stop it with `shardkit local down`")
    # The supervisor outlives this process on purpose.
    child.returncode = 0


def _as_arguments(options: LocalOptions) -> list[str]:
    numbers = ("physical", "replicas", "logical_shards")
    switches = ("redis", "memcached", "pgbouncer", "fsync")
    return [
        *(f"--{name.replace('_', '-')}={getattr(options, name)}" for name in numbers),
        *(f"--{'' if getattr(options, name) else 'no-'}{name}" for name in switches),
    ]


def _step(done: int, total: int) -> LocalProgress:
    from shardkit.local import LocalProgress

    return LocalProgress(done, total, f"{done} of {total} servers")


@contextmanager
def _progress_bar(what: str, *, is_quiet: bool) -> Iterator[Any]:
    """Show a bar on a terminal; lines to a file or pipe; nothing when quiet."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    if is_quiet:
        yield lambda step: None
    elif not console.is_terminal:
        yield lambda step: typer.echo(f"{step.done}/{step.total} {step.what}", err=True)
    else:
        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[now]}"))
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(what, total=None, now="")

            def show(step: LocalProgress) -> None:
                bar.update(task, completed=step.done, total=step.total, now=step.what)

            yield show


def _print_plan(directory: Path, options: LocalOptions, *, as_json: bool) -> None:
    plan = {"directory": str(directory.absolute()), "options": options.as_json()}
    plan["placement"] = options.placement()
    if as_json:
        typer.echo(json.dumps(plan, indent=2))
        return
    typer.echo(f"would start in {plan['directory']}:")
    for name, logical_shards in options.placement().items():
        typer.echo(
            f"  {name}: 1 primary, {options.replicas} replicas, logical shards {logical_shards}"
        )
    for name in ("pgbouncer", "redis", "memcached"):
        if getattr(options, name):
            typer.echo(f"  {name}, if installed")


def _print_status(status: LocalStatus) -> None:
    from rich.console import Console
    from rich.table import Table

    if not status.servers:
        typer.echo(f"no embedded cluster in {status.directory}")
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("server", "kind", "role", "address", "pid", "status", "version"):
        table.add_column(heading, no_wrap=True)
    for server in status.servers:
        address = f"{server.host}:{server.port}"
        pid = str(server.pid or "-")
        style = None if server.status == "running" else "yellow"
        row = (server.name, server.kind, server.role or "-", address, pid, server.status)
        table.add_row(*row, server.version, style=style)
    Console().print(table)
    typer.echo(f"configuration: {status.config}")
