"""The root of the command line: mounts the groups, turns errors into one line and an exit code.

    0 done    1 failed    2 usage or configuration    3 refused as unsafe    4 try again

Groups live in `shardkit.commands`, and are imported when they are used. It parses and prints; every
decision is a function elsewhere.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from typing import ClassVar

import typer

from shardkit.commands.lazily import LazyGroup, Place
from shardkit.commands.output import Watched, printable
from shardkit.errors import (
    ConfigurationError,
    EndpointUnavailableError,
    IdError,
    InvalidMappingError,
    InvalidShardKeyError,
    OperationError,
    RefusedError,
    ShardkitError,
)

__all__ = ["app", "exit_code", "main"]


class _Root(LazyGroup):
    """The commands, in the order of the help; each is imported when it is used."""

    places: ClassVar[Mapping[str, Place]] = {
        "local": Place(
            "local",
            "An embedded cluster: PostgreSQL primaries and replicas, Redis, Memcached, PgBouncer.",
        ),
        "migrate": Place(
            "migrate",
            "Bring every logical shard to the newest revision.",
            more=("downgrade", "drift"),
        ),
        "move": Place("move", "Move logical shards to other physical shards, online."),
        "failover": Place(
            "failover",
            "Another server of a physical shard becomes its primary: `shardkit failover alpha`.",
        ),
        "rebalance": Place("rebalance", "Even out size and load over physical shards."),
        "lookup": Place("lookup", "Fill, check and repair what keeps unique columns unique."),
        "ids": Place("ids", "Read the ids of rows, and mint some."),
        "idmap": Place("idmap", "Packed maps from ids to ids in Redis."),
        "reference": Place("reference", "Reference tables: the same everywhere?"),
        "twophase": Place(
            "twophase", "Commits over several physical shards: what is in doubt, and its end."
        ),
        "outbox": Place("outbox", "Events that wait, are delivered, or were given up."),
        "cache": Place("cache", "The cache's servers, and what they show."),
        "backup": Place("backup", "Copies of the whole cluster, and proof that they restore."),
        "pgbouncer": Place("pgbouncer", "PgBouncer's files from the topology as it is now."),
        "roles": Place("roles", "Roles and their rights on every primary."),
        "export": Place(
            "shardfiles",
            "Write one logical shard to files: its rows as PostgreSQL's COPY has "
            "them, and its schema.",
            attribute="export",
        ),
        "import": Place(
            "shardfiles",
            "Read an exported logical shard into the same, empty one of this or another cluster.",
            attribute="import_",
        ),
        "locate": Place(
            "locate",
            "Show where an id or a shard key lives: logical shard, physical shard, "
            "servers, and why.",
            attribute="locate",
        ),
        "status": Place(
            "status",
            "Show every endpoint: role, lag in bytes and seconds, breaker, epoch, connections.",
            attribute="status",
        ),
        "doctor": Place(
            "doctor",
            "Check versions, settings, roles and clocks of every node; each finding "
            "has its remedy.",
            attribute="doctor",
        ),
    }


app = typer.Typer(
    name="shardkit",
    cls=_Root,
    help="Many logical shards on a few PostgreSQL servers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _root() -> None:
    """Make it a group: Typer looks for commands that are registered."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits the process.

    Args:
        arguments: what follows the program's name; None for those of the process.
    """
    given = sys.argv[1:] if arguments is None else arguments
    stdout = sys.stdout
    watched = Watched(stdout) if "--json" in given else None
    problem: dict[str, object] = {"message": "see standard error"}
    try:
        if watched:
            sys.stdout = watched
        # Wrong usage and Ctrl-C are Typer's to report: its own exit codes are 2 and 130.
        app(args=arguments)
    except ShardkitError as error:
        problem = _reported(error)
        sys.exit(exit_code(error))
    except Exception as error:
        # Whatever has not imported the driver cannot have met its errors.
        driver = sys.modules.get("psycopg")
        if driver is None or not isinstance(error, driver.Error):
            raise
        known = _named(error, lost=isinstance(error, driver.OperationalError))
        problem = _reported(known)
        sys.exit(exit_code(known))
    except SystemExit as end:
        if end.code == 130:
            problem = {"message": "interrupted"}
        raise
    finally:
        sys.stdout = stdout
        leaving = sys.exception()
        if watched and not watched.is_used and isinstance(leaving, SystemExit):
            _print_problem(problem, leaving.code)


def _print_problem(problem: Mapping[str, object], code: object) -> None:
    """Print why there is nothing else to print, for a program that expects one JSON document."""
    if code:
        with contextlib.suppress(BrokenPipeError):
            typer.echo(json.dumps({"error": problem, "exit_code": code}, indent=2))


def _named(error: Exception, *, lost: bool) -> ShardkitError:
    """Return an error of the driver that no command expected, such as of a server that has gone."""
    said = str(error).strip().splitlines() or [type(error).__name__]
    if lost:
        return EndpointUnavailableError(f"a server failed or went away: {said[0]}")
    return OperationError(f"a server refused a statement: {said[0]}")


def _reported(error: ShardkitError) -> dict[str, object]:
    """Say on standard error what went wrong, and return it for JSON."""
    shard = None if error.logical_shard is None else f"logical shard {error.logical_shard}"
    where = "".join(f" [{text}]" for text in (shard, error.endpoint) if text)
    colour = "red" if sys.stderr.isatty() else None
    typer.secho(printable(f"error: {error.message}{where}"), fg=colour, err=True)
    if error.hint:
        typer.echo(printable(f"hint: {error.hint}"), err=True)
    return {
        "kind": type(error).__name__,
        "message": error.message,
        "hint": error.hint,
        "logical_shard": error.logical_shard,
        "endpoint": error.endpoint,
        "retryable": error.retryable,
    }


def exit_code(error: ShardkitError) -> int:
    """Return the exit code an error stands for."""
    if isinstance(error, ConfigurationError | IdError | InvalidShardKeyError | InvalidMappingError):
        return 2
    if isinstance(error, RefusedError):
        return 3
    return 4 if error.retryable else 1
