"""The root of the command line: mounts the groups, turns errors into one line and an exit code.

    0 done    1 failed    2 usage or configuration    3 refused as unsafe    4 try again

Groups live in `shardkit.commands`. It parses and prints; every decision is a function elsewhere.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping, Sequence

import psycopg
import typer

from shardkit.commands import (
    backup,
    cache,
    doctor,
    failover,
    ids,
    local,
    locate,
    lookup,
    migrate,
    move,
    outbox,
    pgbouncer,
    rebalance,
    reference,
    roles,
    shardfiles,
    status,
    twophase,
)
from shardkit.commands import downgrade as _downgrade  # noqa: F401  adds itself to migrate
from shardkit.commands import drift as _drift  # noqa: F401  adds itself to migrate
from shardkit.commands.output import Watched, printable
from shardkit.errors import (
    ConfigurationError,
    EndpointUnavailableError,
    IdError,
    InvalidShardKeyError,
    OperationError,
    RefusedError,
    ShardkitError,
)

__all__ = ["app", "exit_code", "main"]

app = typer.Typer(
    name="shardkit",
    help="Many logical shards on a few PostgreSQL servers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(local.app, name="local")
app.add_typer(migrate.app, name="migrate")
app.add_typer(move.app, name="move")
app.add_typer(lookup.app, name="lookup")
app.add_typer(ids.app, name="ids")
app.add_typer(reference.app, name="reference")
app.add_typer(twophase.app, name="twophase")
app.add_typer(outbox.app, name="outbox")
app.add_typer(cache.app, name="cache")
app.add_typer(backup.app, name="backup")
app.add_typer(rebalance.app, name="rebalance")
app.add_typer(pgbouncer.app, name="pgbouncer")
app.add_typer(roles.app, name="roles")
app.add_typer(failover.app, name="failover")
app.command("export")(shardfiles.export)
app.command("import")(shardfiles.import_)
app.command("locate")(locate.locate)
app.command("status")(status.status)
app.command("doctor")(doctor.doctor)


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
    except psycopg.Error as error:
        known = _named(error)
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


def _named(error: psycopg.Error) -> ShardkitError:
    """Return an error of the driver that no command expected, such as of a server that has gone."""
    said = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, psycopg.OperationalError):
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
    if isinstance(error, ConfigurationError | IdError | InvalidShardKeyError):
        return 2
    if isinstance(error, RefusedError):
        return 3
    return 4 if error.retryable else 1
