"""Options that several commands share, so that they read and behave alike."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["ConfigOption", "DryRunOption", "JsonOption", "MigrationsOption"]

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        envvar="SHARDKIT_CONFIG",
        help="The cluster's configuration; else shardkit.toml, else .shardkit/shardkit.toml.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Print what would be done and change nothing.")
]
MigrationsOption = Annotated[
    str | None,
    typer.Option(
        "--migrations",
        help="Where the revisions are: package:folder or a path; instead of migrations.location.",
    ),
]
