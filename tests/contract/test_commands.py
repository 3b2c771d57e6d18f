"""Every command has help and stands in the README, and the README names no other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

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


COMMANDS = dict(commands(get_command(app)))


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
