"""What the commands of `shardkit migrate` print: plans, outcomes, states; as text and as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from shardkit.commands.output import console, printable
from shardkit.config import format_ranges
from shardkit.errors import TryAgainError
from shardkit.ops import migrate as ops
from shardkit.ops import waves as rollout

__all__ = [
    "interrupted_json",
    "outcome_json",
    "plan_json",
    "print_json",
    "print_outcome",
    "print_plan",
    "status_json",
]


def print_plan(
    plan: ops.MigrationPlan, percentages: tuple[float, ...] | None, *, as_json: bool
) -> None:
    """Print a plan: its SQL, what is said against it, its waves, and what each server gets."""
    smallest = rollout.SMALLEST if percentages is None else 0
    waves = ops.roll_out(plan, percentages or rollout.DEFAULT, smallest=smallest)
    if as_json:
        print_json(plan_json(plan, waves))
        return
    out = console()
    for revision in plan.pending:
        title = f"-- {revision.id} ({revision.phase}) {revision.summary}"
        out.print(title, style="bold", markup=False)
        for statement in revision.statements:
            out.print(f"{printable(statement)};", markup=False)
        for finding in revision.hazards:
            if finding.when == "advice":
                out.print(f"-- advice: {finding.problem}; {finding.remedy}", markup=False)
    for danger in plan.dangers:
        verdict = f"set aside: {danger.reason}" if danger.reason else "REFUSED"
        text = (
            f"{verdict}: {danger.revision.id} {danger.finding.problem} "
            f"[{danger.finding.rule}]: {danger.finding.statement}"
        )
        out.print(printable(text), markup=False)
    if len(waves) > 1:
        sizes = ", ".join(f"{wave.name}: {len(wave.logical_shards)}" for wave in waves)
        out.print(f"waves: {sizes}", markup=False)
    for part in plan.physical:
        out.print(printable(f"{part.physical}: {summary(part)}"), markup=False)


def summary(part: ops.PhysicalPlan) -> str:
    """Return what a physical shard gets, on a line."""
    if part.error:
        return f"left alone: {part.error}"
    new = [work.logical_shard for work in part.work if work.is_new]
    used = [work.logical_shard for work in part.work if not work.is_new]
    parts = [
        f"create {format_ranges(new)}" if new else "",
        f"migrate {format_ranges(used)}" if used else "",
        "complete the admin schema" if part.admin else "",
        f"record how {', '.join(sorted(part.rules))} place their rows" if part.rules else "",
        f"{part.n_current} current" if part.n_current else "",
        *(f"wait for {number}: {why}" for number, why in part.waiting.items()),
    ]
    return "; ".join(text for text in parts if text) or "nothing placed here"


def print_outcome(outcome: ops.MigrationOutcome) -> None:
    """Print what a run did on each physical shard."""
    out = console()
    for part in outcome.plan.physical:
        done = outcome.done.get(part.physical, ())
        if part.physical in outcome.failed:
            text = f"failed after {len(done)} of {len(part.work)} logical shards"
        elif not part.work and not part.waiting:
            text = f"nothing to do, {part.n_current} logical shards current"
        else:
            text = f"{len(done)} of {len(part.work) + len(part.waiting)} logical shards migrated"
        for revision, rows in outcome.filled.get(part.physical, {}).items():
            text += f", {rows:,} rows of {revision}"
        out.print(f"{part.physical}: {text}", markup=False)


def plan_json(plan: ops.MigrationPlan, waves: tuple[rollout.Wave, ...]) -> dict[str, Any]:
    """Return a plan, for JSON."""
    return {
        "pending": [
            {
                "revision": r.id,
                "phase": r.phase,
                "summary": r.summary,
                "statements": r.statements,
                "advice": [f"{f.problem}: {f.statement}" for f in r.hazards if f.when == "advice"],
            }
            for r in plan.pending
        ],
        "dangers": [
            {
                "revision": danger.revision.id,
                "rule": danger.finding.rule,
                "problem": danger.finding.problem,
                "remedy": danger.finding.remedy,
                "statement": danger.finding.statement,
                "physical": danger.physical,
                "size_bytes": danger.size_bytes,
                "reason": danger.reason,
            }
            for danger in plan.dangers
        ],
        "waves": {wave.name: sorted(wave.logical_shards) for wave in waves},
        "physical": {
            part.physical: {
                "admin": part.admin,
                "rules": part.rules,
                "create": [w.logical_shard for w in part.work if w.is_new],
                "migrate": {
                    w.logical_shard: [r.id for r in w.revisions] for w in part.work if not w.is_new
                },
                "current": part.n_current,
                "waiting": part.waiting,
                "error": str(part.error) if part.error else None,
            }
            for part in plan.physical
        },
    }


def outcome_json(outcome: ops.MigrationOutcome) -> dict[str, Any]:
    """Return what a run did, for JSON."""
    return {
        "planned": {p.physical: [w.logical_shard for w in p.work] for p in outcome.plan.physical},
        "done": outcome.done,
        "failed": {name: str(error) for name, error in outcome.failed.items()},
        "laggards": {number: str(error) for number, error in outcome.laggards.items()},
        "halted": outcome.halted,
        "filled": outcome.filled,
        "retryable": isinstance(outcome.error, TryAgainError),
    }


def interrupted_json(left: Mapping[str, int]) -> dict[str, Any]:
    """Return what an interrupt leaves, for JSON."""
    return {"interrupted": True, "left": dict(left)}


def status_json(found: ops.MigrationStatus) -> dict[str, Any]:
    """Return how far a cluster is, for JSON."""
    return {
        "head": found.head,
        "current": found.is_current,
        "physical": {
            entry.physical: {
                "logical_shards": entry.n_logical_shards,
                "at": entry.at,
                "pending": entry.pending,
                "begun": entry.begun,
                "laggards": entry.laggards,
                "unrecorded": entry.unrecorded,
                "error": str(entry.error) if entry.error else None,
            }
            for entry in found.physical
        },
    }


def print_json(document: dict[str, Any]) -> None:
    """Print one JSON document."""
    json.dump(document, sys.stdout, indent=2)
    print()
