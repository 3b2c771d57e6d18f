"""Every command has help and stands in the README, and the README names no other."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import shardkit
from shardkit.cli import app, exit_code
from shardkit.errors import (
    ConfigurationError,
    InvalidIdError,
    MigrationError,
    RefusedError,
    ShardkitError,
    TryAgainError,
    UnavailableError,
)

README = Path(shardkit.__file__).parent.parent.joinpath("README.md").read_text(encoding="utf-8")


def commands(command: object, path: tuple[str, ...] = ("shardkit",)) -> Iterator[tuple[str, str]]:
    """Yield every command's words and its help."""
    children = getattr(command, "commands", None)
    if children is None:
        yield " ".join(path), getattr(command, "help", None) or ""
    else:
        for name, child in children.items():
            yield from commands(child, (*path, name))


ROOT: Any = get_command(app)
COMMANDS = dict(commands(ROOT))


@pytest.mark.parametrize("name", ROOT.places)
def test_the_help_says_of_a_command_what_it_says_itself(name: str) -> None:
    said = (ROOT.commands[name].help or "").split("\n\n")[0]
    assert ROOT.places[name].help == " ".join(said.split())


def test_the_help_and_a_command_without_servers_import_neither_driver_nor_sqlalchemy() -> None:
    program = (
        "import sys\n"
        "from shardkit.cli import main\n"
        "for arguments in (['--help'], ['ids', 'parse', '1']):\n"
        "    try:\n"
        "        main(arguments)\n"
        "    except SystemExit as end:\n"
        "        assert not end.code\n"
        "print(sorted({'alembic', 'psycopg', 'sqlalchemy'} & {*sys.modules}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_has_help_and_stands_in_the_readme(words: str) -> None:
    assert COMMANDS[words].strip()
    assert f"`{words}" in README


def test_the_readme_names_no_command_that_does_not_exist() -> None:
    table = re.findall(r"^\| `(shardkit(?: [a-z]+)+)", README, re.MULTILINE)
    assert table
    assert set(table) == set(COMMANDS)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MigrationError(), 1),
        (ConfigurationError(), 2),
        (InvalidIdError(), 2),
        (RefusedError(), 3),
        (TryAgainError(), 4),
        (UnavailableError(), 4),
    ],
)
def test_an_error_has_one_exit_code(error: ShardkitError, code: int) -> None:
    assert exit_code(error) == code
