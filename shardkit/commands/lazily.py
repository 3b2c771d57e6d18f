"""Commands that are imported when they are used: `shardkit --help` and one command need no other.

A root of the command line names where its commands are and what they are for:

    class Root(LazyGroup):
        places = {"status": Place("status", "Show every endpoint.", attribute="status")}

Used by `shardkit.cli`.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_group

__all__ = ["LazyGroup", "Place"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a command, or a group of them, is.

    Attributes:
        module: of `shardkit.commands`.
        help: the first line of its help, as the module has it.
        attribute: of the module: a `typer.Typer`, or the function of a single command.
        more: further modules that add commands to the group.
    """

    module: str
    help: str
    attribute: str = "app"
    more: tuple[str, ...] = ()


class LazyGroup(TyperGroup):
    """A group that knows the names of its commands, and imports one when it is asked for."""

    places: ClassVar[Mapping[str, Place]] = {}

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.commands = _Commands(self.places)
        self._is_listing = False

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names."""
        return [*self.places]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command; in help, what is said of it without importing it."""
        if self._is_listing and cmd_name in self.places:
            return TyperCommand(cmd_name, help=self.places[cmd_name].help)
        return super().get_command(ctx, cmd_name)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help, which lists the commands."""
        self._is_listing = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self._is_listing = False


class _Commands(UserDict[str, Any]):
    """Commands by name; the values are made when they are looked at."""

    def __init__(self, places: Mapping[str, Place]) -> None:
        super().__init__(dict.fromkeys(places))
        self._places = places

    def __getitem__(self, name: str) -> Any:
        found = super().__getitem__(name)
        if found is None:
            found = self.data[name] = _loaded(name, self._places[name])
        return found


def _loaded(name: str, place: Place) -> Any:
    module, *_ = [
        import_module(f"shardkit.commands.{each}") for each in (place.module, *place.more)
    ]
    found = getattr(module, place.attribute)
    parent = typer.Typer()
    if isinstance(found, typer.Typer):
        parent.add_typer(found, name=name)
    else:
        parent.command(name)(found)
    return get_group(parent).commands[name]
