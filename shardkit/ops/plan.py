"""What a migration would do, decided from what every physical shard says: pure.

Called by `shardkit.ops.migrate` with the ledgers it has read. Given the same ledgers it always
decides the same, and it refuses before anything has changed. It never opens a connection.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from shardkit.errors import RefusedError, ShardkitError
from shardkit.ids import EPOCH_MS
from shardkit.ops.ledger import FORMAT, OWN, Identity, Ledger, admin_script, logical_shard_digest
from shardkit.ops.revisions import Revision
from shardkit.topology import Topology

__all__ = ["MigrationPlan", "PhysicalPlan", "ShardWork", "decide"]


@dataclass(frozen=True, slots=True)
class ShardWork:
    """What one logical shard still needs.

    Attributes:
        logical_shard: its number.
        own: whether the objects shardkit keeps there are created or completed.
        is_new: whether its schema does not exist yet.
        revisions: what is applied, in order.
        done: statements of the first of them that an earlier run has committed.
    """

    logical_shard: int
    own: bool
    is_new: bool
    revisions: tuple[Revision, ...]
    done: int = 0


@dataclass(frozen=True, slots=True)
class PhysicalPlan:
    """What one physical shard still needs.

    Attributes:
        physical: its name.
        admin: whether its admin schema is created or completed.
        work: logical shards with something to do, ascending.
        n_current: logical shards with nothing to do.
        waiting: why a logical shard is left alone for now, by number.
        error: why the whole physical shard is left alone, or None.
        rules: how the rows of tables are placed, where that is not recorded yet, by table.
        reference: revisions whose part about reference tables is missing, in order.
        order: every known revision, oldest first.
    """

    physical: str
    admin: bool = False
    work: tuple[ShardWork, ...] = ()
    n_current: int = 0
    waiting: Mapping[int, str] = field(default_factory=dict)
    error: ShardkitError | None = None
    rules: Mapping[str, str] = field(default_factory=dict)
    reference: tuple[Revision, ...] = ()
    order: tuple[Revision, ...] = ()

    @property
    def rounds(self) -> tuple[tuple[Revision | None, tuple[ShardWork, ...]], ...]:
        """What is done one after the other: a revision of reference tables, then logical shards.

        Everything before a revision is done everywhere before its reference tables change, so
        that rows may refer to them from the next one on, and no longer before they are dropped.
        """
        heads: list[Revision | None] = [None, *self.reference]
        parts: list[list[ShardWork]] = [[] for _ in heads]
        for work in self.work:
            starts = [self._start(work, head) for head in heads]
            ends = [*starts[1:], len(work.revisions)]
            own, is_new = work.own, work.is_new
            for n, (start, end) in enumerate(zip(starts, ends, strict=True)):
                if start < end or own:
                    some = work.revisions[start:end]
                    done = work.done if start == 0 else 0
                    parts[n].append(ShardWork(work.logical_shard, own, is_new, some, done))
                    own = False
        return tuple((head, tuple(part)) for head, part in zip(heads, parts, strict=True))

    def _start(self, work: ShardWork, head: Revision | None) -> int:
        """Return the position of the first revision of a logical shard from another one on."""
        if head is None:
            return 0
        position = {revision.id: n for n, revision in enumerate(self.order)}
        return sum(position[revision.id] < position[head.id] for revision in work.revisions)


@dataclass(frozen=True, slots=True)
class MigrationPlan:
    """What a migration would do.

    Attributes:
        revisions: every known revision, oldest first.
        physical: one plan per physical shard, in the order of the configuration.
        dangers: what counts against it, from `shardkit.ops.guard`.
    """

    revisions: tuple[Revision, ...]
    physical: tuple[PhysicalPlan, ...]
    dangers: tuple[Any, ...] = ()

    @property
    def n_work(self) -> int:
        """Logical shards with something to do."""
        return sum(len(plan.work) for plan in self.physical)

    @property
    def pending(self) -> tuple[Revision, ...]:
        """Revisions some logical shard lacks, oldest first."""
        ids = {r.id for plan in self.physical for work in plan.work for r in work.revisions}
        ids |= {r.id for plan in self.physical for r in plan.reference}
        return tuple(revision for revision in self.revisions if revision.id in ids)


def decide(
    topology: Topology,
    revisions: Sequence[Revision],
    ledgers: Mapping[str, Ledger | ShardkitError],
    rules: Mapping[str, str] | None = None,
    *,
    phase: str | None = None,
) -> MigrationPlan:
    """Return what every logical shard still needs.

    Args:
        topology: whose first placement counts for logical shards that exist nowhere yet.
        revisions: oldest first.
        ledgers: what each physical shard says, or why it says nothing, by name.
        rules: how the models place the rows of their tables; None when they are not known.
        phase: "pre" leaves alone the first pending revision of the phase "post" and all after it.

    Raises:
        RefusedError: a server belongs to something else, a logical shard has two owners, or
            an applied revision was edited or is unknown here, or rows were placed by another
            rule than the model's.
    """
    rules = rules or {}
    known = {name: ledger for name, ledger in ledgers.items() if isinstance(ledger, Ledger)}
    for name, ledger in known.items():
        _check_identity(topology, name, ledger)
        _check_revisions(name, ledger, revisions)
        _check_rules(name, ledger, rules)
    owners = _owners(known)
    silent = sorted(ledgers.keys() - known.keys())
    moved = any(owner != topology.shard_map.owner(n) for n, owner in owners.items())
    plans = []
    for name in topology.physical:
        found = ledgers[name]
        if isinstance(found, ShardkitError):
            plans.append(PhysicalPlan(name, error=found))
        else:
            # Where rows and configuration disagree, silence may hide a logical shard's home.
            uncertain = silent if moved else []
            planned = _plan(
                topology,
                name,
                found,
                owners=owners,
                revisions=revisions,
                uncertain=uncertain,
                phase=phase,
            )
            new = {table: rule for table, rule in rules.items() if table not in found.rules}
            wanted = _in_phase([r for r in revisions if r.id not in found.reference], phase)
            reference = tuple(revision for revision in wanted if revision.reference)
            plans.append(replace(planned, rules=new, reference=reference, order=tuple(revisions)))
    return MigrationPlan(tuple(revisions), tuple(plans))


def _plan(
    topology: Topology,
    name: str,
    ledger: Ledger,
    *,
    owners: Mapping[int, str],
    revisions: Sequence[Revision],
    uncertain: Sequence[str],
    phase: str | None,
) -> PhysicalPlan:
    shard = topology.physical[name]
    own_digest = logical_shard_digest(shard.roles)
    _, admin_digest = admin_script(
        shard, cluster=topology.name, n_logical_shards=topology.n_logical_shards
    )
    work: list[ShardWork] = []
    waiting: dict[int, str] = {}
    n_current = 0
    placed = {n for n in topology.shard_map.owned_by(name) if n not in owners}
    for number in sorted(placed | {n for n, owner in owners.items() if owner == name}):
        is_new = number in placed
        if is_new and uncertain:
            waiting[number] = f"not created while {', '.join(uncertain)} may hold it"
            continue
        if not is_new and (state := ledger.ownership[number].state) != "active":
            waiting[number] = f"is {state}: a move is under way"
            continue
        if number in ledger.locked:
            waiting[number] = f"its DDL lock is held by {ledger.locked[number]}"
            continue
        applied = ledger.applied.get(number, {})
        own = applied.get(OWN) != own_digest
        half = ledger.partial.get(number, {})
        missing = tuple(r for r in revisions if r.id not in applied)
        if not is_new and (applied or half):
            missing = _in_phase(missing, phase)
        if own or missing:
            done = half[missing[0].id][0] if missing and missing[0].id in half else 0
            is_unused = is_new or not (applied or half)
            work.append(ShardWork(number, own, is_unused, missing, done))
        else:
            n_current += 1
    admin = ledger.identity is None or ledger.digest != admin_digest
    return PhysicalPlan(name, admin, tuple(work), n_current, waiting)


def _in_phase(missing: Sequence[Revision], phase: str | None) -> tuple[Revision, ...]:
    """Return what comes before the first revision of another phase; revisions keep their order."""
    if phase != "pre":
        return tuple(missing)
    return tuple(itertools.takewhile(lambda revision: revision.phase == "pre", missing))


def _check_identity(topology: Topology, name: str, ledger: Ledger) -> None:
    stored = re.match(r"shardkit format (\d+) ", ledger.digest or "")
    if stored and int(stored[1]) > FORMAT:
        raise RefusedError(
            f"physical shard {name!r} was set up by a newer shardkit: its format is {stored[1]}, "
            f"this version knows {FORMAT}",
            hint="upgrade shardkit; nothing was changed",
        )
    if ledger.is_replica:
        raise RefusedError(
            f"physical shard {name!r}: the address of its primary leads to a replica",
            hint=f"correct physical.{name}.primary (or .admin) after a failover",
        )
    expected = Identity(topology.name, name, topology.n_logical_shards, EPOCH_MS)
    if ledger.identity in {None, expected}:
        return
    raise RefusedError(
        f"physical shard {name!r}: the server says it is {ledger.identity}, "
        f"the configuration says {expected}",
        hint="name the right server; the number of logical shards and the id epoch never change",
    )


def _check_rules(name: str, ledger: Ledger, rules: Mapping[str, str]) -> None:
    for table, rule in rules.items():
        stored = ledger.rules.get(table, rule)
        if stored != rule:
            raise RefusedError(
                f"rows of {table} on {name!r} were placed by {stored}, the model says {rule}",
                hint="restore __shard_key__ and __shard_strategy__; rows do not move by themselves",
            )


def _check_revisions(name: str, ledger: Ledger, revisions: Sequence[Revision]) -> None:
    expected = {revision.id: revision.checksum for revision in revisions}
    for revision, checksum in ledger.reference.items():
        if checksum != expected.get(revision):
            raise RefusedError(
                f"revision {revision} of reference tables was edited, or is unknown here, after "
                f"it was applied on {name!r}",
                hint="restore its file and write the change as a new revision",
            )
    for number, half in ledger.partial.items():
        for revision, (_, checksum) in half.items():
            if checksum != expected.get(revision):
                raise RefusedError(
                    f"revision {revision} was edited, is being undone, or is unknown here, while "
                    f"it is half done on {name!r}",
                    hint="restore its file and run again, or finish the downgrade",
                    logical_shard=number,
                )
    for number, applied in ledger.applied.items():
        if ledger.ownership[number].state == "retired":
            continue
        for revision, checksum in applied.items():
            if revision == OWN:
                continue
            if revision not in expected:
                raise RefusedError(
                    f"revision {revision} is applied on {name!r} but unknown here",
                    hint="run the version of the code that has it, or a newer one",
                    logical_shard=number,
                )
            if checksum != expected[revision]:
                raise RefusedError(
                    f"revision {revision} was edited after it was applied on {name!r}",
                    hint="restore its file and write the change as a new revision",
                    logical_shard=number,
                )


def _owners(ledgers: Mapping[str, Ledger]) -> dict[int, str]:
    """Return the physical shard of every logical shard that exists: the highest epoch wins.

    A logical shard that was only handed over belongs to where it went, answering or not.
    """
    best: dict[int, tuple[int, bool, str]] = {}
    for name, ledger in ledgers.items():
        for number, row in ledger.ownership.items():
            if row.state == "importing":
                continue
            active = row.state != "retired"
            owner = name if active else row.moved_to or name
            claim = (row.epoch, active, owner)
            other = best.get(number)
            if other and other[:2] == claim[:2] and active:
                raise RefusedError(
                    f"both {other[2]!r} and {name!r} own it at epoch {row.epoch}",
                    hint="keep one: retire the other's row in shardkit.ownership by hand",
                    logical_shard=number,
                )
            best[number] = max(best.get(number, claim), claim)
    return {number: owner for number, (_, _, owner) in best.items()}
