"""`shardkit roles`: who may do what on every primary, against what shardkit.toml asks for."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardkit.commands.options import ConfigOption, DryRunOption, JsonOption
from shardkit.commands.output import console, printable
from shardkit.config import Config, default_file, format_ranges, load

if TYPE_CHECKING:
    from sqlalchemy import URL

    from shardkit.ops.roles import Change
    from shardkit.ops.rolesrun import PhysicalRoles

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Roles and their rights on every primary.")

UserOption = Annotated[
    str | None,
    typer.Option(
        "--user",
        help="Who makes the changes instead of the admin, such as a superuser; the password is in "
        "SHARDKIT_ROLES_PASSWORD or --password-file.",
    ),
]
PasswordFileOption = Annotated[
    Path | None, typer.Option("--password-file", help="File with the password of --user.")
]
SqlOption = Annotated[
    bool, typer.Option("--sql", help="Print the statements too; those of passwords are left out.")
]


@app.command("plan")
def plan_command(
    config: ConfigOption = None,
    *,
    user: UserOption = None,
    password_file: PasswordFileOption = None,
    sql: SqlOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show which roles, owners and rights are not as they should be; changes nothing."""
    from shardkit.ops import rolesrun

    settings, topology = load(config or default_file())
    found = rolesrun.plan(topology, login=_login(user, password_file))
    _report(settings, found, is_plan=True, sql=sql, as_json=as_json)
    _raise_first(found)


@app.command("apply")
def apply_command(
    config: ConfigOption = None,
    *,
    user: UserOption = None,
    password_file: PasswordFileOption = None,
    sql: SqlOption = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make roles, give and take rights until they are as they should be; may be repeated."""
    from shardkit.errors import OperationError
    from shardkit.ops import rolesrun

    settings, topology = load(config or default_file())
    login = _login(user, password_file)
    work = rolesrun.plan if dry_run else rolesrun.apply
    found = work(topology, login=login)
    _report(settings, found, is_plan=dry_run, sql=sql, as_json=as_json)
    _raise_first(found)
    left = [change for part in found for change in part.left]
    if left:
        why = next((change.needs for change in left if change.needs), "")
        raise OperationError(
            f"{len(left)} changes are left to be made",
            hint=f"they need {printable(why)}; use --user" if why else "run it again",
        )


def _login(user: str | None, password_file: Path | None) -> URL | None:
    """Return who makes the changes; None for the admin."""
    from sqlalchemy import URL

    from shardkit.errors import ConfigurationError
    from shardkit.logins import Login

    if user is None:
        if password_file is not None:
            raise ConfigurationError("--password-file goes with --user")
        return None
    file = None if password_file is None else str(password_file.absolute())
    secret = Login(password_file=file).secret(Path(), "roles", key="--password-file")
    return URL.create("postgresql+psycopg", username=user)._replace(password=secret)


def _report(
    settings: Config,
    found: Sequence[PhysicalRoles],
    *,
    is_plan: bool,
    sql: bool,
    as_json: bool,
) -> None:
    if as_json:
        document = {
            "cluster": settings.cluster.name,
            "applied": not is_plan,
            "physical": {
                part.physical: {
                    "changes": [_document(change) for change in part.changes],
                    "done": part.done,
                    "left": [_document(change) for change in part.left],
                    "notes": list(part.notes),
                    "error": str(part.error) if part.error else None,
                }
                for part in found
            },
        }
        json.dump(document, sys.stdout, indent=2)
        print()
        return
    for part in found:
        _print(part, is_plan=is_plan, sql=sql)
    if not settings.roles.is_on:
        print(
            "shardkit.toml has no [roles]: the admin does what is the migrator's and the "
            "monitor's, the application what is the relay's (docs/roles.md)",
            file=sys.stderr,
        )


def _print(part: PhysicalRoles, *, is_plan: bool, sql: bool) -> None:
    out = console(markup=False)
    name = printable(part.physical)
    if part.error is not None:
        told = f" ({part.error.hint})" if part.error.hint else ""
        out.print(f"{name}: {printable(part.error.message + told)}", soft_wrap=True)
    elif not part.changes:
        out.print(f"{name}: as it should be")
    if part.changes:
        n = len(part.changes)
        out.print(f"{name}: {n} changes" if is_plan else f"{name}: {part.done} of {n} changes made")
    for change in part.changes:
        mark = "!" if change.needs else "~"
        line = f"  {mark} {_line(change)}"
        if change.needs:
            line += f" -- needs {_safe(change.needs)}"
        out.print(line, soft_wrap=True)
        if sql:
            for statement in change.statements:
                out.print(f"      {_safe(statement.as_string(None))};", soft_wrap=True)
    for note in part.notes:
        out.print(f"  note: {_safe(note)}", soft_wrap=True)


def _line(change: Change) -> str:
    text = _safe(change.what)
    return f"{text} [{_where(change.schemas)}]" if change.schemas else text


def _where(schemas: Sequence[str]) -> str:
    """Return schemas in few words: those of logical shards as ranges."""
    from shardkit.ops.rights import shard_numbered

    numbers = [n for schema in schemas if (n := shard_numbered(schema)) is not None]
    others = [schema for schema in schemas if shard_numbered(schema) is None]
    told = [f"logical shards {format_ranges(sorted(numbers))}"] if numbers else []
    return ", ".join([*others, *told])


def _document(change: Change) -> dict[str, Any]:
    return {
        "what": change.what,
        "where": list(change.schemas),
        "sql": [statement.as_string(None) for statement in change.statements],
        "needs": change.needs or None,
    }


def _safe(text: str) -> str:
    """Return text with names that others chose, in one line and without what moves the cursor."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _raise_first(found: Sequence[PhysicalRoles]) -> None:
    from shardkit.errors import TryAgainError

    errors = [(part.physical, part.error) for part in found if part.error is not None]
    # What can be tried again is said last: it hides nothing that cannot.
    errors.sort(key=lambda each: each[1].retryable)
    for physical, error in errors:
        kind = TryAgainError if error.retryable else type(error)
        raise kind(f"physical shard {physical!r}: {error.message}", hint=error.hint)
