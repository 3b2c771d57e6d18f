"""`shardkit doctor`: what is wrong with the settings of any node, and what to do."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from shardkit.commands.options import ConfigOption, JsonOption
from shardkit.commands.output import console
from shardkit.config import default_file, load

if TYPE_CHECKING:
    from shardkit.ops.doctor import Diagnosis

__all__ = ["doctor"]

_COLOURS = {"error": "red", "warning": "yellow", "note": "dim"}


def doctor(
    *,
    config: ConfigOption = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Programs that use the cluster at the same time.")
    ] = 1,
    timeout: Annotated[
        float, typer.Option(min=0.1, max=600, help="Seconds that all nodes have to answer.")
    ] = 10.0,
    as_json: JsonOption = False,
) -> None:
    """Check versions, settings, roles and clocks of every node; each finding has its remedy.

    Exits with 1 when there is an error; warnings and notes exit with 0.
    """
    from shardkit.ops.doctor import examine
    from shardkit.ops.health.findings import Severity

    settings, topology = load(config or default_file())
    found = examine(settings, topology, timeout=timeout, processes=processes)
    if as_json:
        document = {
            "cluster": topology.name,
            "healthy": found.is_healthy,
            "checks": found.n_checks,
            "counts": {str(severity): found.count(severity) for severity in Severity},
            "findings": [asdict(finding) for finding in found.findings],
        }
        json.dump(document, sys.stdout, indent=2)
        print()
    else:
        _print(found)
    if not found.is_healthy:
        raise typer.Exit(1)


def _print(found: Diagnosis) -> None:
    from rich.text import Text

    from shardkit.ops.health.findings import Severity

    out = console()
    for finding in found.findings:
        line = Text()
        line.append(f"{finding.severity:<7}", style=_COLOURS[finding.severity])
        line.append(f" {printable(finding.where)}", style="bold")
        line.append(f": {printable(finding.message)} [{finding.check}]")
        out.print(line, soft_wrap=True)
        out.print(Text(f"        {printable(finding.remedy)}"), soft_wrap=True)
    counts = ", ".join(f"{found.count(severity)} {severity}s" for severity in Severity)
    print(f"{len(found.facts.servers)} servers, {found.n_checks} checks: {counts}")


def printable(text: str) -> str:
    """Return text that others wrote, such as names of slots, without what moves the cursor."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
