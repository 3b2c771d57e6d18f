"""The root of the command line: mounts the groups, turns errors into one line and an exit code.

    0 done    1 failed    2 usage or configuration    3 refused as unsafe    4 try again

Groups live in `shardkit.commands`. It parses and prints; every decision is a function elsewhere.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from shardkit.commands import (
    backup,
    cache,
    doctor,
    ids,
    local,
    locate,
    lookup,
    migrate,
    outbox,
    pgbouncer,
    reference,
    roles,
    shardfiles,
    status,
    twophase,
)
from shardkit.commands import downgrade as _downgrade  # noqa: F401  adds itself to migrate
from shardkit.commands import drift as _drift  # noqa: F401  adds itself to migrate
from shardkit.errors import (
    ConfigurationError,
    IdError,
    InvalidShardKeyError,
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
app.add_typer(lookup.app, name="lookup")
app.add_typer(ids.app, name="ids")
app.add_typer(reference.app, name="reference")
app.add_typer(twophase.app, name="twophase")
app.add_typer(outbox.app, name="outbox")
app.add_typer(cache.app, name="cache")
app.add_typer(backup.app, name="backup")
app.add_typer(pgbouncer.app, name="pgbouncer")
app.add_typer(roles.app, name="roles")
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
    try:
        # Wrong usage and Ctrl-C are Typer's to report: its own exit codes are 2 and 130.
        app(args=arguments)
    except ShardkitError as error:
        shard = None if error.logical_shard is None else f"logical shard {error.logical_shard}"
        where = "".join(f" [{text}]" for text in (shard, error.endpoint) if text)
        colour = "red" if sys.stderr.isatty() else None
        typer.secho(f"error: {error.message}{where}", fg=colour, err=True)
        if error.hint:
            typer.echo(f"hint: {error.hint}", err=True)
        sys.exit(exit_code(error))


def exit_code(error: ShardkitError) -> int:
    """Return the exit code an error stands for."""
    if isinstance(error, ConfigurationError | IdError | InvalidShardKeyError):
        return 2
    if isinstance(error, RefusedError):
        return 3
    return 4 if error.retryable else 1
