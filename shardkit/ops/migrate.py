"""`shardkit migrate`: every logical shard brought to the same revision, resumably.

Physical shards are worked on in parallel, logical shards one transaction at a time: the DDL and
its ledger row commit together, so a run that dies anywhere is continued by the next. One runner
at a time per physical shard, by a session lock. Called by the command line and by tests; how a
transaction runs is `shardkit.ops.apply`, what is to be done is `shardkit.ops.plan`.

    revisions = load_revisions("app:migrations", folder=Path())
    outcome = apply(topology, revisions)
    if outcome.error:
        raise outcome.error
"""

from __future__ import annotations

import importlib
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sqlalchemy import MetaData

from shardkit.derived import Cached
from shardkit.errors import (
    ConfigurationError,
    ShardkitError,
)
from shardkit.models import rules_of
from shardkit.ops.apply import MigrationOutcome, run
from shardkit.ops.downgrade import decide_back, newer
from shardkit.ops.guard import dangers, refuse
from shardkit.ops.ledger import Ledger
from shardkit.ops.limits import Limits
from shardkit.ops.plan import MigrationPlan, PhysicalPlan, decide
from shardkit.ops.primaries import connections, lock, read, read_one
from shardkit.ops.revisions import Revision, load, locate
from shardkit.ops.triggers import with_triggers
from shardkit.ops.waves import DEFAULT, Wave
from shardkit.ops.waves import waves as divide
from shardkit.topology import Topology

__all__ = [
    "Cached",
    "Limits",
    "MigrationOutcome",
    "MigrationPlan",
    "MigrationStatus",
    "PhysicalPlan",
    "PhysicalStatus",
    "Rules",
    "apply",
    "downgrade",
    "load_cached",
    "load_metadata",
    "load_revisions",
    "load_rules",
    "load_undone",
    "plan",
    "roll_out",
    "status",
]

Rules = Mapping[str, str]
"""How the rows of tables are placed, as text by table."""


@dataclass(frozen=True, slots=True)
class PhysicalStatus:
    """How far one physical shard is.

    Attributes:
        physical: its name.
        n_logical_shards: logical shards it holds or is to hold.
        at: number of logical shards by their last revision; "" stands for none.
        pending: number of logical shards by revision they lack.
        begun: of those, the ones in which a part of the revision is done, as in a backfill.
        laggards: logical shards that lack something, ascending.
        error: why nothing is known, or None.
        reference: revisions whose part about reference tables is missing, in order.
        unrecorded: tables of which it is not recorded how their rows are placed, so that no
            cluster checks it; empty, too, when the models are not known.
    """

    physical: str
    n_logical_shards: int = 0
    at: Mapping[str, int] | None = None
    pending: Mapping[str, int] | None = None
    begun: Mapping[str, int] | None = None
    laggards: tuple[int, ...] = ()
    error: ShardkitError | None = None
    unrecorded: tuple[str, ...] = ()
    reference: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MigrationStatus:
    """How far the cluster is.

    Attributes:
        head: the newest revision; None when there is none.
        physical: one entry per physical shard, in the order of the configuration.
    """

    head: str | None
    physical: tuple[PhysicalStatus, ...]

    @property
    def is_current(self) -> bool:
        """Whether every logical shard has every revision."""
        return not any(shard.laggards or shard.error or shard.reference for shard in self.physical)


def load_revisions(location: str, *, folder: Path) -> tuple[Revision, ...]:
    """Return the revisions of a `migrations.location`, oldest first; possibly none.

    Args:
        location: `package:folder` or a path.
        folder: what a relative path is relative to.

    Raises:
        ConfigurationError: there is no such folder.
        MigrationError: a revision cannot be used; it is named.
    """
    return load(locate(location, folder=folder))


def load_rules(location: str) -> Rules:
    """Return how the models of a `migrations.models` place their rows, by table.

    Raises:
        ConfigurationError: there is no such thing.
    """
    return rules_of(load_metadata(location))


def load_cached(location: str) -> Cached:
    """Return what is cached of the models of a `migrations.models`: tables, lists and counts.

    Raises:
        ConfigurationError: there is no such thing.
    """
    return Cached.of(load_metadata(location))


def load_metadata(location: str) -> MetaData:
    """Return the metadata of the models of a `migrations.models`.

    Args:
        location: `module:name` of the declarative base, or of its metadata.

    Raises:
        ConfigurationError: there is no such thing.
    """
    module, _, name = location.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
        metadata = getattr(found, "metadata", found)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(
            f"migrations.models {location!r} cannot be loaded: {error}",
            hint='write "module:Base" of a module that imports every model',
        ) from error
    if not isinstance(metadata, MetaData):
        raise ConfigurationError(
            f"migrations.models {location!r} is neither a declarative base nor its metadata"
        )
    return metadata


def roll_out(
    plan: MigrationPlan, percentages: Sequence[float], *, smallest: int = 0
) -> tuple[Wave, ...]:
    """Return the waves of a plan; logical shards that do not exist yet have nobody to protect."""
    parts = [part.work for part in plan.physical]
    if all(work.is_new for work in itertools.chain(*parts)) or plan.n_work < smallest:
        percentages = (100.0,)
    return divide([[work.logical_shard for work in part] for part in parts], percentages)


def plan(
    topology: Topology,
    revisions: Sequence[Revision],
    *,
    rules: Rules | None = None,
    phase: str | None = None,
) -> MigrationPlan:
    """Return what `apply` would do now; changes nothing.

    Args:
        topology: the cluster.
        revisions: oldest first, from `load_revisions`.
        rules: of the models, from `load_rules`; None leaves them alone.
        phase: as in `apply`.

    Raises:
        RefusedError: `apply` would be refused, and why.
    """
    with connections(topology) as (found, failures):
        decided = decide(
            topology,
            revisions,
            read(topology, revisions, found) | failures,
            rules,
            phase=phase,
        )
        return replace(decided, dangers=dangers(decided, found))


def apply(
    topology: Topology,
    revisions: Sequence[Revision],
    *,
    rules: Rules | None = None,
    cached: Cached | None = None,
    limits: Limits | None = None,
    on_plan: Callable[[MigrationPlan], None] | None = None,
    on_done: Callable[[str, int], None] | None = None,
    on_rows: Callable[[str, str, int], None] | None = None,
    waves: Sequence[float] | None = (),
    smallest: int = 0,
    on_wave: Callable[[Wave], None] | None = None,
    phase: str | None = None,
) -> MigrationOutcome:
    """Bring every logical shard to the newest revision, creating those that do not exist.

    A physical shard that does not answer does not stop the others; the outcome names it. May
    be interrupted or killed at any point and run again.

    Args:
        topology: the cluster.
        revisions: oldest first, from `load_revisions`.
        rules: of the models, from `load_rules`, recorded where none are; None leaves them alone.
        cached: cached tables, from `load_cached`, which get their triggers after the revisions;
            None leaves them alone.
        limits: timeouts and retries; None for the defaults.
        on_plan: called once, before anything changes.
        on_done: called with physical and logical shard after each, from several threads.
        on_rows: called with physical shard, revision and rows changed after each batch of a
            backfill, from several threads.
        waves: per cent of the logical shards that already exist which a roll-out reaches, wave
            by wave; None for those of `shardkit.ops.waves`, empty for all at once.
        smallest: logical shards to migrate below which it is all at once.
        on_wave: called before each wave.
        phase: "pre" leaves alone the first pending revision of the phase "post" and all after it.

    Raises:
        RefusedError: nothing was changed: another runner is at work, a server belongs to
            something else, an applied revision was edited, rows were placed by another rule
            than the model's, or a revision would hurt those who use the tables.
    """
    with connections(topology) as (found, failures):
        limits = limits or Limits()
        lock(found, limits.patience)
        ledgers = read(topology, revisions, found) | failures
        decided = decide(topology, revisions, ledgers, rules, phase=phase)
        refuse(dangers(decided, found, small_bytes=limits.small_bytes))
        if on_plan:
            on_plan(decided)
        percentages = DEFAULT if waves is None else waves
        staged = roll_out(decided, percentages, smallest=smallest) if percentages else ()
        outcome = run(
            topology,
            decided,
            found,
            limits=limits,
            on_done=on_done or (lambda _physical, _logical_shard: None),
            on_rows=on_rows,
            waves=staged,
            on_wave=on_wave,
        )
        return with_triggers(outcome, found, cached, limits) if cached else outcome


def downgrade(
    topology: Topology,
    revisions: Sequence[Revision],
    undone: Sequence[Revision],
    *,
    limits: Limits | None = None,
    dry_run: bool = False,
    on_plan: Callable[[MigrationPlan], None] | None = None,
    on_done: Callable[[str, int], None] | None = None,
    waves: Sequence[float] | None = (),
    on_wave: Callable[[Wave], None] | None = None,
) -> MigrationOutcome:
    """Undo revisions on every logical shard that has them; what they took away stays away.

    Args:
        topology: the cluster.
        revisions: all of them, oldest first, from `load_revisions`.
        undone: those to undo, newest first, from `load_undone`.
        limits: as in `apply`, and what follows too.
        dry_run: decide, and change nothing.
        on_plan: as in `apply`.
        on_done: as in `apply`.
        waves: as in `apply`.
        on_wave: as in `apply`.

    Raises:
        RefusedError: nothing was changed: as in `apply`, or reference tables would change.
    """
    with connections(topology) as (found, failures):
        limits = limits or Limits()
        if not dry_run:
            lock(found, limits.patience)
        ledgers = {name: read_one(name, found[name]) for name in found} | failures
        decided = decide_back(topology, revisions, undone, ledgers)
        if on_plan:
            on_plan(decided)
        if dry_run:
            return MigrationOutcome(decided, {part.physical: () for part in decided.physical})
        percentages = DEFAULT if waves is None else waves
        return run(
            topology,
            decided,
            found,
            limits=limits,
            on_done=on_done or (lambda _physical, _logical_shard: None),
            waves=roll_out(decided, percentages) if percentages else (),
            on_wave=on_wave,
        )


def load_undone(
    location: str, revisions: Sequence[Revision], target: str, *, folder: Path
) -> tuple[Revision, ...]:
    """Return the `downgrade()` of every revision after one, newest first.

    Args:
        location: as in `load_revisions`.
        revisions: all of them.
        target: the revision to go back to, or "base".
        folder: as in `load_revisions`.

    Raises:
        RefusedError: there is no such revision.
        MigrationError: one of them cannot be undone.
    """
    ids = newer(revisions, target)
    return tuple(reversed(load(locate(location, folder=folder), undo=ids))) if ids else ()


def status(
    topology: Topology, revisions: Sequence[Revision], *, rules: Rules | None = None
) -> MigrationStatus:
    """Return how far every physical shard is; changes nothing.

    Args:
        topology: the cluster.
        revisions: oldest first, from `load_revisions`.
        rules: of the models, from `load_rules`; None leaves them unchecked.

    Raises:
        RefusedError: a server belongs to something else, or an applied revision was edited.
    """
    with connections(topology) as (found, failures):
        ledgers = read(topology, revisions, found)
        decided = decide(topology, revisions, ledgers | failures, rules)
    entries = []
    for physical in decided.physical:
        if physical.error:
            entries.append(PhysicalStatus(physical.physical, error=physical.error))
            continue
        pending = Counter(r.id for work in physical.work for r in work.revisions)
        ledger = ledgers[physical.physical]
        partial = ledger.partial.values() if isinstance(ledger, Ledger) else ()
        at: Counter[str] = Counter()
        for work in physical.work:
            missing = {revision.id for revision in work.revisions}
            done = [revision.id for revision in revisions if revision.id not in missing]
            at[done[-1] if done else ""] += 1
        if physical.n_current:
            at[revisions[-1].id if revisions else ""] += physical.n_current
        entries.append(
            PhysicalStatus(
                physical.physical,
                n_logical_shards=len(physical.work) + physical.n_current + len(physical.waiting),
                at=dict(at),
                pending={r.id: pending[r.id] for r in revisions if pending[r.id]},
                begun=dict(Counter(revision for half in partial for revision in half)),
                laggards=tuple(
                    sorted([work.logical_shard for work in physical.work] + [*physical.waiting])
                ),
                unrecorded=tuple(sorted(physical.rules)),
                reference=tuple(revision.id for revision in physical.reference),
            )
        )
    return MigrationStatus(revisions[-1].id if revisions else None, tuple(entries))
