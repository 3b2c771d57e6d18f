"""Loads the demo: `python -m app.demo --config shardkit.toml`."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from app.accounts.service import AccountService
from app.clock import utc_now
from app.database import Database
from app.demo import plan
from app.demo.load import DemoCounts, DemoLoader
from app.deps import session_limits
from app.resources import Resources, open_resources
from app.settings import Settings
from app.workers import relay_of
from shardkit import Cluster
from shardkit.errors import ConfigurationError, ShardkitError

__all__ = ["PASSWORD", "load_demo", "main"]

PASSWORD = "lightbox demo"  # noqa: S105 - printed for everybody to try
N_PEOPLE = 220
SEED = 2026


def main(
    config: Annotated[Path | None, typer.Option(help="the cluster's shardkit.toml")] = None,
    people: Annotated[int, typer.Option(min=2, max=5000, help="how many people")] = N_PEOPLE,
    seed: Annotated[int, typer.Option(min=0, help="another number, another demo")] = SEED,
) -> None:
    """Load people, photos, follows, likes and comments; what is there already is skipped."""
    console = Console(stderr=True)
    try:
        settings = Settings.read(os.environ, config=config)
        added = asyncio.run(_run(settings, plan.make(people, seed), console))
    except (ShardkitError, ValidationError) as error:
        console.print(f"error: {error}", markup=False, highlight=False)
        raise typer.Exit(2 if isinstance(error, ConfigurationError) else 1) from None
    if added == DemoCounts():
        typer.echo("the demo is there already")
    else:
        typer.echo(
            f"added {added.people} people, {added.photos} photos, {added.follows} follows, "
            f"{added.likes} likes, {added.comments} comments"
        )
    typer.echo(f"log in as {plan.DEMO_USERNAME!r} with the password {PASSWORD!r}")


async def load_demo(
    resources: Resources, wanted: plan.DemoPlan, progress: Progress | None = None
) -> DemoCounts:
    """Load a demo into an open cluster and return what was added.

    Args:
        resources: what a server holds open.
        wanted: the demo.
        progress: bars to move, or None to stay silent.
    """
    tasks = (
        {} if progress is None else {step: progress.add_task(step, total=None) for step in STEPS}
    )

    def moved(step: str, done: int, total: int) -> None:
        if progress is not None:
            progress.update(tasks[step], completed=done, total=total)

    database = Database(resources.cluster, timeout=60.0)  # nobody waits for an answer
    accounts = AccountService(
        database,
        resources.passwords,
        resources.clock,
        session_limits(resources.settings),
    )
    os.environ.setdefault("VIPS_CONCURRENCY", "1")
    workers = ProcessPoolExecutor(
        max_workers=min(4, os.cpu_count() or 1), mp_context=multiprocessing.get_context("spawn")
    )
    try:
        added = await DemoLoader(
            wanted,
            database=database,
            accounts=accounts,
            blobs=resources.blobs,
            clock=resources.clock,
            workers=workers,
            progress=moved,
        ).run(await resources.passwords.hash(PASSWORD))
    finally:
        workers.shutdown(cancel_futures=True)
    with Cluster.from_file(resources.settings.config) as cluster:  # if no relay runs: here it is
        await asyncio.to_thread(relay_of(cluster).drain)
    return added


STEPS = ("people", "photos", "follows", "likes and comments")


async def _run(settings: Settings, wanted: plan.DemoPlan, console: Console) -> DemoCounts:
    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    if not console.is_terminal:  # it takes a minute, and says nothing meanwhile
        what = f"{len(wanted.people)} people and {len(wanted.photos)} photos"
        console.print(f"loading the demo: {what}", markup=False, highlight=False)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        async with open_resources(settings, utc_now) as resources:
            return await load_demo(resources, wanted, bars)


if __name__ == "__main__":
    typer.run(main)
