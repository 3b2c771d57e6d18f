"""What a rebalance is decided from, and what is decided: values only.

Made by `shardkit.ops.rebalance.measure` and `planner`; shown by the command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Final

__all__ = [
    "LEAST_ROWS",
    "WRITE_COST",
    "Constraints",
    "Fill",
    "LogicalShard",
    "Plan",
    "PlannedMove",
    "Situation",
]

WRITE_COST: Final = 4
"""Rows read that one row written counts as. A written row is logged, indexed and vacuumed, and
read by every replica. Source: docs/rebalance.md."""

LEAST_ROWS: Final = 10_000
"""Rows that the servers together must have read and written, else the load says nothing: a server's
share of fewer is known no better than to a few percent, and rows come in groups."""


@dataclass(frozen=True, slots=True)
class LogicalShard:
    """One logical shard as it was measured.

    Attributes:
        number: which one.
        owner: the physical shard that has it.
        epoch: version of its ownership.
        size_bytes: of its tables with their indexes and TOAST.
        rows: live rows of its tables, as PostgreSQL estimates them.
        reads: rows read in the time it was watched, on the primary and its replicas.
        writes: rows written in that time.
        held: why it cannot be moved now, in a few words; empty when it can.
    """

    number: int
    owner: str
    epoch: int
    size_bytes: int
    rows: int = 0
    reads: int = 0
    writes: int = 0
    held: str = ""

    @property
    def load(self) -> int:
        """Rows read, and rows written by `WRITE_COST`."""
        return self.reads + WRITE_COST * self.writes


@dataclass(frozen=True, slots=True)
class Situation:
    """The cluster as it was measured.

    Attributes:
        cluster: its name.
        physical: names of the physical shards, in the order of the configuration.
        shards: every logical shard, by ascending number.
        seconds: for how long reads and writes were counted; 0 when they were not.
        notes: what was not measured, and why.
    """

    cluster: str
    physical: tuple[str, ...]
    shards: tuple[LogicalShard, ...]
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def has_load(self) -> bool:
        """Whether enough was read and written to go by."""
        return self.seconds > 0 and sum(s.reads + s.writes for s in self.shards) >= LEAST_ROWS


@dataclass(frozen=True, slots=True)
class Constraints:
    """What a plan has to keep to.

    Attributes:
        weights: capacity of a physical shard beside the others; 1 where it is left out.
        drained: physical shards that are to be emptied.
        pins: logical shards that belong on one physical shard.
        tolerance: by how much of its share a physical shard may have too many or too few bytes.
        load_tolerance: the same of the load; None to leave the load out.
        max_moves: how many moves a plan may have; None for any number.
    """

    weights: Mapping[str, Fraction] = field(default_factory=dict)
    drained: frozenset[str] = frozenset()
    pins: Mapping[int, str] = field(default_factory=dict)
    tolerance: Fraction = Fraction(1, 10)
    load_tolerance: Fraction | None = Fraction(1, 4)
    max_moves: int | None = None


@dataclass(frozen=True, slots=True)
class PlannedMove:
    """One logical shard that is to change its physical shard.

    Attributes:
        logical_shard: its number.
        source: the physical shard that has it.
        target: the one that is to have it.
        epoch: of its ownership when the plan was made.
        size_bytes: that travel.
        why: `drain`, `pin` or `balance`.
    """

    logical_shard: int
    source: str
    target: str
    epoch: int
    size_bytes: int
    why: str


@dataclass(frozen=True, slots=True)
class Fill:
    """How full one physical shard is.

    Attributes:
        physical: its name.
        shards: how many logical shards it has.
        size_bytes: of them.
        rows: of them.
        load: of them; see `LogicalShard.load`.
        size_share: its bytes, as a multiple of what is due to it; 0 when nothing is.
        load_share: the same of the load; None when load was left out.
    """

    physical: str
    shards: int
    size_bytes: int
    rows: int
    load: int
    size_share: float
    load_share: float | None


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be moved, and what that makes of the cluster.

    Attributes:
        moves: in the order in which no server becomes fuller than it has to.
        before: how full the physical shards are.
        after: how full they will be.
        excess_before: percent of their shares by which physical shards are beyond the tolerance,
            together; 0 when all are within it.
        excess_after: the same afterwards.
        least_bytes: no plan that does as much moves fewer bytes than this; None when unknown.
        is_optimal: whether it is proven that none does as much with fewer bytes.
        uses_load: whether the load was a constraint.
        notes: what whoever reads the plan should know.
    """

    moves: tuple[PlannedMove, ...]
    before: tuple[Fill, ...]
    after: tuple[Fill, ...]
    excess_before: int
    excess_after: int
    least_bytes: int | None
    is_optimal: bool
    uses_load: bool
    notes: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Bytes that travel."""
        return sum(move.size_bytes for move in self.moves)
