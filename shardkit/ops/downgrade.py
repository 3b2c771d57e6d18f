"""`shardkit migrate downgrade`: back to an earlier revision, newest first.

The same steps, waves and ledgers as on the way up; what a half undone revision still needs is in
its ledger row, whose checksum says which way it goes. Called by the command line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from shardkit.errors import RefusedError, ShardkitError
from shardkit.ops.ledger import Ledger
from shardkit.ops.plan import MigrationPlan, PhysicalPlan, ShardWork, decide
from shardkit.ops.revisions import Revision
from shardkit.topology import Topology

__all__ = ["BASE", "decide_back", "newer"]

BASE = "base"
"""Stands for no revision at all."""


def newer(revisions: Sequence[Revision], target: str) -> tuple[str, ...]:
    """Return the revisions after one, newest first.

    Raises:
        RefusedError: there is no such revision.
    """
    ids = [revision.id for revision in revisions]
    if target == BASE:
        return tuple(reversed(ids))
    if target not in ids:
        raise RefusedError(
            f"there is no revision {target!r}",
            hint=f'give the whole name of one, or "{BASE}" to undo all of them',
        )
    return tuple(reversed(ids[ids.index(target) + 1 :]))


def decide_back(
    topology: Topology,
    revisions: Sequence[Revision],
    undone: Sequence[Revision],
    ledgers: Mapping[str, Ledger | ShardkitError],
) -> MigrationPlan:
    """Return what undoing revisions takes: pure.

    Args:
        topology: the cluster.
        revisions: all of them, oldest first.
        undone: those to undo, newest first, as `downgrade()` has them.
        ledgers: what each physical shard says, or why it says nothing, by name.

    Raises:
        RefusedError: as `decide`, or a logical shard is half way up, or reference tables would
            change, which only a new revision does.
    """
    back = {revision.id: revision for revision in undone}
    halfway: dict[str, Ledger | ShardkitError] = {}
    for name, ledger in ledgers.items():
        if not isinstance(ledger, Ledger):
            halfway[name] = ledger
            continue
        _check(name, ledger, back)
        # What is half undone counts as there for the other checks.
        applied = {
            number: {**done, **_undoing(ledger, number, revisions, back)}
            for number, done in ledger.applied.items()
        }
        halfway[name] = replace(ledger, applied=applied, partial={})
    plan = decide(topology, revisions, halfway)
    parts = []
    for part in plan.physical:
        ledger = ledgers[part.physical]
        if part.error or not isinstance(ledger, Ledger):
            parts.append(PhysicalPlan(part.physical, error=part.error))
            continue
        work = []
        for number, row in sorted(ledger.ownership.items()):
            has = {**ledger.applied.get(number, {}), **ledger.partial.get(number, {})}
            gone = tuple(revision for revision in undone if revision.id in has)
            if gone and row.state == "active" and number not in ledger.locked:
                half = ledger.partial.get(number, {}).get(gone[0].id)
                work.append(ShardWork(number, False, False, gone, half[0] if half else 0))  # noqa: FBT003
        n_current = len(ledger.ownership) - len(work)
        parts.append(
            PhysicalPlan(
                part.physical,
                work=tuple(work),
                n_current=n_current,
                waiting=part.waiting,
                order=tuple(revisions),
            )
        )
    return MigrationPlan(tuple(reversed(undone)), tuple(parts))


def _check(name: str, ledger: Ledger, back: Mapping[str, Revision]) -> None:
    for number, half in ledger.partial.items():
        for revision, (_, checksum) in half.items():
            if revision in back and checksum != back[revision].checksum:
                raise RefusedError(
                    f"revision {revision} is half applied on {name!r}",
                    hint="let `shardkit migrate apply` finish it first",
                    logical_shard=number,
                )
    for undone in back.values():
        if undone.reference and undone.id in ledger.reference:
            raise RefusedError(
                f"revision {undone.id} changed reference tables, which are not taken back",
                hint="write what is wanted as a new revision",
            )


def _undoing(
    ledger: Ledger, number: int, revisions: Sequence[Revision], back: Mapping[str, Revision]
) -> dict[str, str]:
    half = ledger.partial.get(number, {})
    return {r.id: r.checksum for r in revisions if r.id in half and r.id in back}
