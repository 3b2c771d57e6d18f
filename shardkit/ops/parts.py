"""The transactions that bring one logical shard from where it is to where it should be, as text.

A step is a transaction with its ledger row. Steps that follow each other share one where they lock
nothing but tables made in it: nobody can use those yet, so nobody waits, and what is saved is most
of what a migration costs beside its DDL (`python -m benchmarks migrate`). Texts are made once for
any schema. Called by `shardkit.ops.physical`; pure.
"""

from __future__ import annotations

from dataclasses import dataclass

from shardkit.ops.ledger import (
    OWN,
    logical_shard_digest,
    shard_script,
    steps_script,
    summary_script,
)
from shardkit.ops.plan import PhysicalPlan, ShardWork
from shardkit.ops.revisions import Revision
from shardkit.ops.steps import Step, render, steps
from shardkit.topology import RoleNames

__all__ = ["Part", "Parts"]

Group = list[tuple[Revision, Step]]


@dataclass(frozen=True, slots=True)
class Part:
    """One transaction, or what cannot run in one.

    Attributes:
        script: its SQL, ledger row included; empty with `step`.
        revisions: what it is about, for messages.
        step: an index that is built or dropped CONCURRENTLY, or a backfill, else None.
        tables: live tables that it locks more than a write does.
    """

    script: str
    revisions: tuple[Revision, ...]
    step: Step | None = None
    tables: frozenset[str] = frozenset()


class Parts:
    """What the logical shards of one physical shard run.

    Attributes:
        digest: of the objects shardkit keeps in a logical shard.
    """

    def __init__(self, plan: PhysicalPlan, roles: RoleNames) -> None:
        self.digest = logical_shard_digest(roles)
        self._roles = roles
        self._last = {
            work.logical_shard: n for n, (_, some) in enumerate(plan.rounds) for work in some
        }
        # Without those that a phase leaves something pending for.
        last = plan.order[-1].id if plan.order else None
        self._current = {
            work.logical_shard
            for work in plan.work
            if not work.revisions or work.revisions[-1].id == last
        }
        applied = {OWN: self.digest} | {r.id: r.checksum for r in plan.order}
        self._summary = summary_script(applied)
        self._templates: dict[tuple[object, ...], tuple[Part, ...]] = {}

    def is_last(self, logical_shard: int, number: int) -> bool:
        """Return whether nothing is left to do for a logical shard after a round."""
        return self._last[logical_shard] == number

    def of(self, work: ShardWork, number: int) -> list[Part]:
        """Return the parts of one logical shard in a round, in order."""
        shard = work.logical_shard
        found: list[Part] = []
        if work.is_new or not work.revisions:
            script = shard_script(shard, own=work.own, roles=self._roles, revisions=work.revisions)
            found.append(Part(script, work.revisions))
        else:
            if work.own:
                own = shard_script(shard, own=True, roles=self._roles, revisions=())
                found.append(Part(own, ()))
            key = (tuple(revision.id for revision in work.revisions), work.done)
            if key not in self._templates:
                self._templates[key] = tuple(_compiled(work.revisions, work.done))
            found += [
                Part(render(part.script, shard), part.revisions, part.step, part.tables)
                for part in self._templates[key]
            ]
        return self._summed_up(work, number, found)

    def _summed_up(self, work: ShardWork, number: int, found: list[Part]) -> list[Part]:
        """Have the last transaction write down that the logical shard is current, if it is."""
        shard = work.logical_shard
        if any(revision.is_undone for revision in work.revisions):
            text = summary_script(None)
        elif self.is_last(shard, number) and shard in self._current:
            text = self._summary
        else:
            return found
        text = render(text, shard)
        last = found[-1]
        if last.step is not None:
            return [*found, Part(text, ())]
        script = f"{last.script}\n;\n{text}"
        return [*found[:-1], Part(script, last.revisions, None, last.tables)]


def _compiled(revisions: tuple[Revision, ...], done: int) -> list[Part]:
    """Return the parts of some revisions for any schema."""
    found: list[Part] = []
    for group in _groups(revisions, done):
        about = tuple({revision.id: revision for revision, _ in group}.values())
        step = group[0][1]
        if step.is_outside:
            found.append(Part("", about, step))
        else:
            tables = frozenset[str]().union(*(step.locks for _, step in group))
            found.append(Part(steps_script(group), about, None, tables))
    return found


def _groups(revisions: tuple[Revision, ...], done: int) -> list[Group]:
    groups: list[Group] = []
    made: set[str] = set()  # tables that the current group makes
    is_open = False  # whether it locks nothing else
    for n, revision in enumerate(revisions):
        for step in steps(revision.statements, done if n == 0 else 0):
            locks = step.locks - made
            if not (is_open and not step.is_alone and not locks):
                groups.append([])
                made = set()
                is_open = not step.is_alone and not step.locks
            groups[-1].append((revision, step))
            made |= step.made
    return groups
