"""`shardkit migrate drift`: what differs from what it should be."""

from __future__ import annotations

from typing import Any

import typer

from shardkit.commands.migrate import (
    MigrationsOption,
    ModelsOption,
    app,
    inputs,
    models_of,
)
from shardkit.commands.migrated import print_json
from shardkit.commands.options import ConfigOption, JsonOption
from shardkit.commands.output import console, printable
from shardkit.config import format_ranges
from shardkit.ops.drift import Difference, Drift, drift

__all__ = ["drift_command"]


@app.command("drift")
def drift_command(
    config: ConfigOption = None,
    *,
    migrations: MigrationsOption = None,
    models: ModelsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare logical shards with the revisions and the models; exits with 1 if any differs."""
    topology, revisions, _, _ = inputs(config, migrations, models)
    found = drift(topology, revisions, metadata=models_of(config, models))
    if as_json:
        print_json(_json(found))
    else:
        out = console()
        for each in found.differences:
            for line in _lines(each):
                out.print(line, markup=False)
        n = sum(len(shards) for prints in found.fingerprints.values() for shards in prints.values())
        kinds = len({digest for prints in found.fingerprints.values() for digest in prints})
        out.print(f"{n} logical shards, {kinds} fingerprints, {len(found.differences)} differences")
    if found.errors:
        raise next(iter(found.errors.values()))
    if found.differences:
        raise typer.Exit(1)


def _lines(each: Difference) -> list[str]:
    shards = f" logical shards {format_ranges(each.logical_shards)}" if each.logical_shards else ""
    lines = [f"{each.physical}{shards}: {each.kind} {printable(each.name)}"]
    lines.append(f"  - {printable(each.expected)}" if each.expected is not None else "  - (none)")
    lines.append(f"  + {printable(each.found)}" if each.found is not None else "  + (missing)")
    return lines


def _json(found: Drift) -> dict[str, Any]:
    return {
        "differences": [
            {
                "physical": each.physical,
                "logical_shards": each.logical_shards,
                "kind": each.kind,
                "name": each.name,
                "expected": each.expected,
                "found": each.found,
            }
            for each in found.differences
        ],
        "fingerprints": found.fingerprints,
        "errors": {name: str(error) for name, error in found.errors.items()},
    }
