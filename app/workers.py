"""Work that follows a write: the relay with the service's handlers, as a process of its own.

    python -m app.workers --config shardkit.toml
    shardkit outbox relay --app app.workers:relay     # the same; `APP_CONFIG` names the file

As many as you like, anywhere; any of them may be killed. `make run` keeps one running.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from app.feed import fanout
from app.feed.modes import Modes
from app.feed.timelines import Timelines
from app.graph import inverse
from app.graph.models import ASSOC_CHANGED
from app.notifications.bus import Bus
from app.photos import likes, removal
from app.photos.models import LIKES_CHANGED, PHOTO_ADDED, PHOTO_DELETED
from app.reactions import Reactions
from app.settings import Settings
from shardkit import Cluster, Relay
from shardkit.errors import ConfigurationError, HandlerStuckError
from shardkit.outbox import Backoff, Event

__all__ = ["main", "relay_of"]

BATCH = 50
"""Edges applied at once: so many rows of people may be locked for a moment."""

THREADS = 2

BACKOFF = Backoff(first=0.5, longest=60.0, attempts=500)
"""Tried for some six hours: a server that is down that long must not leave dead letters behind."""


def relay_of(
    cluster: Cluster, modes: Modes | None = None, *, settings: Settings | None = None
) -> Relay:
    """Return a relay that does everything the service's events ask for.

    Args:
        cluster: whose events; its `[services]` say where timelines are.
        modes: decides whose photos are pushed.
        settings: where pictures are; without them, bytes that a process which died while it
            deleted a photo has left are left to the sweeper.
    """
    redis = cluster.services.get("redis")
    timelines = None if redis is None else Timelines(redis)
    modes = modes or Modes()
    relay = Relay(cluster, threads=THREADS, backoff=BACKOFF)
    reactions = Reactions(cluster, Bus(redis))
    reactions.register(relay)

    @relay.on(ASSOC_CHANGED, batch=BATCH)
    def edges(events: list[Event]) -> None:
        inverse.apply(cluster, events)
        reactions.edges_changed(events)

    @relay.on(PHOTO_DELETED, batch=BATCH)
    def pictures(events: list[Event]) -> None:
        if settings is not None:
            removal.remove(settings, events)

    @relay.on(PHOTO_ADDED, batch=BATCH)
    def photos(events: list[Event]) -> None:
        fanout.deliver(cluster, timelines, modes, events)

    @relay.on(LIKES_CHANGED, batch=BATCH)
    def counts(events: list[Event]) -> None:
        likes.fold(cluster, events)

    return relay


def __getattr__(name: str) -> Relay:
    """Make `relay` when it is asked for: an import opens nothing."""
    if name != "relay":
        raise AttributeError(name)
    settings = Settings.read(os.environ)
    return relay_of(Cluster.from_file(settings.config), settings=settings)


def main(
    config: Annotated[Path | None, typer.Option(help="the cluster's shardkit.toml")] = None,
    *,
    attached: Annotated[
        bool, typer.Option("--attached", help="end when standard input does")
    ] = False,
) -> None:
    """Deliver events until SIGTERM or Ctrl-C; what has been begun is finished first."""
    try:
        settings = Settings.read(os.environ, config=config)
        cluster = Cluster.from_file(settings.config)
    except (ConfigurationError, ValidationError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    with cluster:
        relay = relay_of(cluster, settings=settings)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: relay.stop())
        if attached:
            threading.Thread(target=_stop_at_end, args=[relay], daemon=True).start()
        try:
            relay.run()
        except HandlerStuckError as error:
            typer.echo(f"error: {error}", err=True)
            os._exit(1)  # threads that never end would keep the process


def _stop_at_end(relay: Relay) -> None:
    """Stop when the process that holds the other end of standard input is gone."""
    while os.read(sys.stdin.fileno(), 1024):
        pass
    relay.stop()


if __name__ == "__main__":
    typer.run(main)
