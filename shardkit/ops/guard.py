"""Which hazards of a migration count, given how large the tables are: asked before anything runs.

A rule knows a statement; here it meets the logical shards it would run on. Those that do not
exist yet, and tables that are empty or small there, have nobody to hurt. Called by
`shardkit.ops.migrate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psycopg

from shardkit.errors import RefusedError
from shardkit.ops.plan import MigrationPlan, PhysicalPlan
from shardkit.ops.revisions import Revision
from shardkit.ops.safety import Finding
from shardkit.topology import schema_name

__all__ = ["SMALL_BYTES", "Danger", "dangers", "refuse"]

SMALL_BYTES = 1 << 20
"""A table up to this size is scanned, indexed or written anew in some ten milliseconds, well
within the lock timeout. In bytes and not rows, since a size is known exactly and at once.
Source: benchmarks/migrate.py, on the slowest disk at hand."""

# AccessShareLock on catalogues only. The largest of a name over the schemas.
_SIZES = """
SELECT CASE WHEN n.nspname = 'reference' THEN 'reference.' ELSE '' END || c.relname,
    max(pg_relation_size(c.oid))
FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE n.nspname = ANY (%s) AND c.relname = ANY (%s) AND c.relkind IN ('r', 'm', 'i', 'p')
GROUP BY 1
"""


@dataclass(frozen=True, slots=True)
class Danger:
    """A hazard that counts.

    Attributes:
        revision: whose statement it is.
        finding: what the rule says.
        physical: where it was met first.
        size_bytes: of the largest such table there; None where no table is concerned.
        reason: why the author set the rule aside, or None.
    """

    revision: Revision
    finding: Finding
    physical: str
    size_bytes: int | None
    reason: str | None


def dangers(
    plan: MigrationPlan,
    connections: Mapping[str, psycopg.Connection[Any]],
    *,
    small_bytes: int = SMALL_BYTES,
) -> tuple[Danger, ...]:
    """Return the hazards that count, of what is pending where there is something to hurt.

    Args:
        plan: what would be done.
        connections: one per physical shard that answered.
        small_bytes: size up to which a table counts as small.
    """
    found: dict[tuple[str, Finding], Danger] = {}
    for part in plan.physical:
        pending, schemas = _used(part)
        hazards = [(r, f) for r in pending for f in r.hazards if f.when != "advice"]
        if not hazards or part.physical not in connections:
            continue
        names = sorted({f.table.split(".")[-1] for _, f in hazards if f.table})
        rows = connections[part.physical].execute(_SIZES, (schemas, names)).fetchall()
        sizes = {str(name): int(size) for name, size in rows}
        for revision, finding in hazards:
            size = sizes.get(finding.table, 0) if finding.table else None
            if _counts(finding, size, small_bytes):
                reason = revision.allowed.get(finding.rule)
                danger = Danger(revision, finding, part.physical, size, reason)
                found.setdefault((revision.id, finding), danger)
    return tuple(found.values())


def _used(part: PhysicalPlan) -> tuple[list[Revision], list[str]]:
    """Return the revisions that meet logical shards in use, and the schemas of those."""
    used = [work for work in part.work if not work.is_new]
    pending = {r.id: r for work in used for r in work.revisions}
    pending |= {r.id: r for r in part.reference}
    schemas = [schema_name(work.logical_shard) for work in used]
    return list(pending.values()), [*schemas, "reference"]


def _counts(finding: Finding, size: int | None, small_bytes: int) -> bool:
    if size is None or finding.when == "always":
        return True
    return size > (0 if finding.when == "used" else small_bytes)


def refuse(found: tuple[Danger, ...]) -> None:
    """Refuse a migration with a danger that nobody has given a reason for.

    Raises:
        RefusedError: it is named, with the safe way.
    """
    for danger in found:
        if danger.reason is None:
            about, size = danger.finding.table, danger.size_bytes
            where = f" ({about}: {size:,} bytes on {danger.physical})" if about else ""
            raise RefusedError(
                f"revision {danger.revision.id} {danger.finding.problem}{where}: "
                f"{danger.finding.statement}",
                hint=f"{danger.finding.remedy}. To do it all the same, say why in the revision: "
                f'allow = {{"{danger.finding.rule}": "reason"}}',
            )
