"""`shardkit migrate downgrade`: back to an earlier revision."""

from __future__ import annotations

from typing import Annotated

import typer

from shardkit.commands.migrate import (
    MigrationsOption,
    ModelsOption,
    WaveOption,
    app,
    inputs,
    source,
)
from shardkit.commands.migrated import (
    interrupted_json,
    outcome_json,
    print_json,
    print_outcome,
)
from shardkit.commands.options import ConfigOption, DryRunOption, JsonOption
from shardkit.commands.output import console, printable
from shardkit.commands.progress import Watching
from shardkit.ops import migrate as ops
from shardkit.ops import waves as rollout

__all__ = ["downgrade_command"]


@app.command("downgrade")
def downgrade_command(
    target: Annotated[
        str, typer.Argument(metavar="REVISION", help='What to go back to, in full; or "base".')
    ],
    config: ConfigOption = None,
    *,
    migrations: MigrationsOption = None,
    models: ModelsOption = None,
    wave: WaveOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Undo every revision after one, newest first. What is dropped does not come back."""
    percentages = rollout.parse(wave) if wave else ()
    topology, revisions, _, _ = inputs(config, migrations, models)
    location, folder = source(config, migrations)
    undone = ops.load_undone(location, revisions, target, folder=folder)
    out = console(stderr=as_json)
    for revision in undone:
        out.print(f"-- undo {revision.id} {revision.summary}", style="bold", markup=False)
        for statement in revision.statements:
            out.print(f"{printable(statement)};", markup=False)
    with Watching(quiet=as_json or dry_run) as watching:
        try:
            outcome = ops.downgrade(
                topology,
                revisions,
                undone,
                dry_run=dry_run,
                on_plan=watching.on_plan,
                on_done=watching.on_done,
                waves=percentages,
                on_wave=watching.on_wave,
            )
        except KeyboardInterrupt:
            watching.interrupted()
            if as_json:
                print_json(interrupted_json(watching.left))
            raise
    if as_json:
        print_json(outcome_json(outcome))
    elif not dry_run:
        print_outcome(outcome)
    if outcome.error:
        raise outcome.error
