"""Everything on one machine, from nothing: `make run`, or `python -m app.run`.

Starts the embedded cluster, brings every logical shard to the newest revision, loads a demo and
serves the application, with a progress bar for each step and a table of what runs where; the relay
runs beside it, as a process of its own. Ends on
Ctrl-C, SIGTERM or SIGHUP and takes every server with it. May be killed and started again. For
trying shardkit and for development; a service of your own runs `python -m app`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
import uvicorn
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import app.demo.__main__
from app.__main__ import listen
from app.main import create_app
from app.processes import KeptProcess
from app.settings import Settings
from shardkit import Cluster, set_aside
from shardkit.errors import ConfigurationError, RefusedError, ShardkitError
from shardkit.local import LocalCluster, LocalProgress, read_status, watched
from shardkit.ops import migrate

__all__ = ["complete", "main"]

MIGRATIONS = "app:migrations"
MODELS = "app.tables:Base"
STOP_TIMEOUT = 5
"""Seconds requests under way have to end."""

console = Console(highlight=False, soft_wrap=True)


def main(
    directory: Annotated[
        Path, typer.Option("--dir", help="Where the embedded cluster keeps its data.")
    ] = Path(".shardkit"),
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; the next free one when taken.")] = 8000,
    people: Annotated[
        int, typer.Option(min=0, help="People of the demo; 0 loads none.")
    ] = app.demo.__main__.N_PEOPLE,
) -> None:
    """Start the cluster, migrate it, load a demo and serve the application until Ctrl-C."""
    try:
        with interruptible(), cluster(directory) as config:
            complete(config)
            migrated(config)
            with relay(config):
                if people:
                    app.demo.__main__.main(config=config, people=people)
                serve(config, host, port)
    except KeyboardInterrupt:
        console.print("stopped")
    except ShardkitError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2 if isinstance(error, ConfigurationError) else 1) from None


@contextmanager
def interruptible() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into what Ctrl-C does."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    yield


@contextmanager
def cluster(directory: Path) -> Iterator[Path]:
    """Run the embedded cluster and yield its configuration; use one that already runs."""
    local = LocalCluster(directory)
    try:
        with steps("servers") as show:
            local.start(show)
    except RefusedError:
        status = read_status(directory)
        if not status.is_ready:
            raise
        console.print(f"using the cluster that process {status.owner_pid} runs", markup=False)
        yield local.config_path
        return
    try:
        show_servers(local)
        with watched(local, lambda step: console.print(step, markup=False)):
            yield local.config_path
    finally:
        # A second Ctrl-C must not leave half of them running.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        with steps("stopping") as show:
            local.stop(show)


def show_servers(local: LocalCluster) -> None:
    """Print what runs where."""
    table = Table("server", "role", "address", "process", "version", box=None)
    for server in local.servers:
        role = f"{server.role} of {server.physical}" if server.role else str(server.kind)
        address = f"{server.host}:{server.port}"
        table.add_row(server.name, role, address, str(server.pid), server.version)
    console.print(table)
    for program in local.missing:
        console.print(f"{program} is not installed; going on without it", markup=False)
    console.print(f"configuration: {local.config_path}", markup=False)


def complete(config: Path) -> None:
    """Add to a configuration file what the service needs: its migrations, and a cache if it can.

    The Memcached of `[services]`, or the Redis; without either the service runs on databases.
    """
    present = tomllib.loads(config.read_text(encoding="utf-8"))
    services = present.get("services", {})
    with config.open("a", encoding="utf-8") as file:
        if "migrations" not in present:  # so that the command `shardkit migrate` finds them too
            file.write(f'\n[migrations]\nlocation = "{MIGRATIONS}"\nmodels = "{MODELS}"\n')
        backend = next((name for name in ("memcached", "redis") if name in services), None)
        if "cache" not in present and backend is not None:
            file.write(f'\n[cache]\nbackend = "{backend}"\n')


def migrated(config: Path) -> None:
    """Bring every logical shard to the newest revision.

    Raises:
        MigrationError: not all of them are; a rerun continues.
    """
    topology = Cluster.from_file(config).topology
    revisions = migrate.load_revisions(MIGRATIONS, folder=config.parent)
    with steps("logical shards") as show:
        done = 0
        total = 0

        def on_plan(plan: migrate.MigrationPlan) -> None:
            nonlocal total
            total = plan.n_work

        def on_done(physical: str, logical_shard: int) -> None:
            nonlocal done
            done += 1
            show(LocalProgress(done, total, f"{physical}/{logical_shard}"))

        rules = migrate.load_rules(MODELS)
        outcome = migrate.apply(
            topology,
            revisions,
            rules=rules,
            cached=migrate.load_cached(MODELS),
            on_plan=on_plan,
            on_done=on_done,
        )
    if outcome.error:
        raise outcome.error
    n_logical_shards = topology.n_logical_shards
    console.print(
        f"schema: {total} of {n_logical_shards} logical shards brought to {revisions[-1].id}"
        if total
        else f"schema: all {n_logical_shards} logical shards are at {revisions[-1].id}",
        markup=False,
    )


@contextmanager
def relay(config: Path) -> Iterator[None]:
    """Keep the relay running in a process of its own."""

    def said(code: int) -> None:
        console.print(f"the relay ended with {code} and is started again", markup=False)

    command = [sys.executable, "-m", "app.workers", "--attached", "--config", str(config)]
    with KeptProcess(command, said) as process:
        console.print(f"relay: process {process.pid}", markup=False)
        yield


def serve(config: Path, host: str, port: int) -> None:
    """Serve the application until a signal asks for its end."""
    listener = listen(host, port)
    chosen = listener.getsockname()[1]
    if port not in {0, chosen}:
        console.print(f"port {port} is taken, using {chosen}", markup=False)
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(Settings.read(os.environ, config=config, host=host, port=chosen)),
            server_header=False,
            timeout_graceful_shutdown=STOP_TIMEOUT,
            log_level="warning",
        )
    )
    console.print(f"serving http://{host}:{chosen}/ - Ctrl-C stops everything", markup=False)
    set_aside()
    with listener:
        asyncio.run(server.serve([listener]))
    if not server.started:
        raise typer.Exit(1)  # it has said why


@contextmanager
def steps(what: str) -> Iterator[Callable[[LocalProgress], None]]:
    """Show a progress bar on a terminal; one line at the end elsewhere."""
    last: LocalProgress | None = None
    columns = (
        TextColumn(f"{what:<15}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def show(step: LocalProgress) -> None:
            nonlocal last
            last = step
            bar.update(task, completed=step.done, total=step.total, description=step.what)

        yield show
    if last and not console.is_terminal:
        console.print(f"{what}: {last.done} of {last.total}", markup=False)


if __name__ == "__main__":
    typer.run(main)
