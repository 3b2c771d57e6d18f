"""`shardkit outbox`: how full the outboxes are, delivering, dead letters and their replay."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.table import Table

from shardkit.commands.options import ConfigOption, DryRunOption, JsonOption
from shardkit.commands.output import console
from shardkit.config import default_file, load
from shardkit.errors import OperationError, ShardkitError

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Events that wait, are delivered, or were given up.")

TopicOption = Annotated[str | None, typer.Option("--topic", help="Only events of this topic.")]


@app.command("status")
def status_command(
    config: ConfigOption = None,
    *,
    interval: Annotated[
        float, typer.Option(min=0, max=60, help="Seconds over which rates are measured; 0: none.")
    ] = 1.0,
    as_json: JsonOption = False,
) -> None:
    """Show backlog, age of the oldest event, rates and dead letters of every physical shard."""
    from shardkit.ops import outbox as ops

    _, topology = load(config or default_file())
    found = ops.status(topology, interval=interval)
    if as_json:
        _print_json({part.physical: _with_text(asdict(part), part.error) for part in found})
    else:
        table = Table(
            "physical shard", "backlog", "oldest", "paused", "dead", "claimed", "in/s", "out/s",
            "busiest logical shards", box=None,
        )  # fmt: skip
        for part in found:
            if part.error:
                table.add_row(part.physical, "?", f"unknown: {part.error.message}")
                continue
            busiest = ", ".join(f"{n}: {backlog}" for n, backlog in part.busiest)
            table.add_row(
                part.physical,
                f"{part.backlog}{'+' if part.is_more else ''}",
                "-" if part.oldest is None else f"{part.oldest:.1f} s",
                str(part.paused),
                str(part.dead),
                str(part.claimed),
                f"{part.emitted:.1f}",
                f"{part.delivered:.1f}",
                busiest or "-",
            )
        console().print(table)
    _raise_first([part.error for part in found])


@app.command("relay")
def relay_command(
    *,
    app_: Annotated[
        str, typer.Option("--app", help="The program's relay with its handlers: module:relay.")
    ],
    drain: Annotated[bool, typer.Option("--drain", help="Deliver what is due, then end.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Deliver events to the handlers of a program, until SIGTERM or Ctrl-C.

    What has been begun is finished first. Run as many as you like; any may be killed.
    """
    from shardkit.ops import outbox as ops

    relay = ops.load_relay(app_)
    if drain:
        delivered = relay.drain()
        if as_json:
            _print_json({"delivered": delivered})
        else:
            print(f"{delivered} events delivered")
        return
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: relay.stop())
    print(f"delivering {', '.join(sorted(relay.handlers)) or 'nothing'}", file=sys.stderr)
    relay.run()


@app.command("dead")
def dead_command(
    config: ConfigOption = None,
    *,
    topic: TopicOption = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many, at most.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """List the latest events that were given up, and why."""
    from shardkit.ops import outbox as ops

    _, topology = load(config or default_file())
    letters, failed = ops.dead(topology, topic=topic, limit=limit)
    if as_json:
        _print_json(
            {
                "dead": [{**asdict(letter), "id": str(letter.id)} for letter in letters],
                "failed": {name: str(error) for name, error in failed.items()},
            }
        )
    else:
        table = Table("id", "logical shard", "topic", "key", "attempts", "died", "error", box=None)
        for letter in letters:
            values = (
                str(letter.id), str(letter.logical_shard), letter.topic, letter.key or "-",
                str(letter.attempts), letter.died, letter.error,
            )  # fmt: skip
            table.add_row(*(_plain(value) for value in values))
        console(markup=False).print(table)
    _raise_first(list(failed.values()))


@app.command("replay")
def replay_command(
    ids: Annotated[list[int] | None, typer.Argument(metavar="[ID]...", help="Which.")] = None,
    *,
    topic: TopicOption = None,
    everything: Annotated[bool, typer.Option("--all", help="All dead letters.")] = False,
    config: ConfigOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Put dead letters back into their outboxes, behind what waits there now."""
    from shardkit.ops import outbox as ops

    if not (ids or topic or everything):
        raise typer.BadParameter("give ids, --topic or --all")
    _, topology = load(config or default_file())
    found = ops.replay(topology, ids=ids or (), topic=topic, dry_run=dry_run)
    n = sum(found.events.values())
    if as_json:
        _print_json(
            {
                "replayed": dict(found.events),
                "dry_run": dry_run,
                "failed": {name: str(error) for name, error in found.failed.items()},
            }
        )
    else:
        print(f"{n} dead letters {'would be ' if dry_run else ''}put back")
    _raise_first(list(found.failed.values()))
    if ids and n < len(set(ids)):
        raise OperationError(f"{len(set(ids)) - n} of them are no dead letters")


def _plain(text: str) -> str:
    """Return text of events without what would move the cursor of a terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)[:200]


def _with_text(document: dict[str, Any], error: ShardkitError | None) -> dict[str, Any]:
    return {**document, "error": str(error) if error else None}


def _raise_first(errors: Sequence[ShardkitError | None]) -> None:
    for error in errors:
        if error is not None:
            raise error


def _print_json(document: dict[str, Any]) -> None:
    json.dump(document, sys.stdout, indent=2)
    print()
