"""Does what a plan in a file says: checks that it still is right, then moves.

Nothing is kept of how far it is but the ownership rows themselves, so the same file is given again
after whatever ended a run: what has arrived is left out, and a move that was begun is resumed.
Called by the command line; the moves are those of `shardkit.ops.moves`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from shardkit.errors import RefusedError, ShardkitError
from shardkit.ops import moves
from shardkit.ops.moves import Options, Outcome, Script
from shardkit.ops.rebalance.facts import PlannedMove
from shardkit.ops.rebalance.measure import measure
from shardkit.ops.rebalance.planfile import PlanFile, remaining
from shardkit.topology import Topology

__all__ = ["Remaining", "apply", "left_of"]

_AS_BEFORE: Final = Options()


@dataclass(frozen=True, slots=True)
class Remaining:
    """What is left of a plan.

    Attributes:
        moves: in order; those that were begun first.
        begun: logical shards of these whose move was begun before, and is resumed.
        n_done: moves of the plan that are done.
    """

    moves: tuple[PlannedMove, ...]
    begun: frozenset[int]
    n_done: int


def left_of(topology: Topology, file: PlanFile) -> Remaining:
    """Return what is left of a plan; changes nothing.

    Raises:
        RefusedError: the plan is stale, or a move stands in its way; the message says what.
        EndpointUnavailableError: a primary does not answer (retryable).
    """
    left = remaining(file, measure(topology))
    known, _ = moves.status(topology)
    begun = set()
    for move in left:
        for other in known:
            if other.logical_shard != move.logical_shard:
                continue
            if other.is_handed_over:
                raise RefusedError(
                    f"it was moved before, and its old copy on {other.source} is kept",
                    hint="shardkit move clean forgets the old copy, rollback goes back",
                    logical_shard=move.logical_shard,
                )
            if other.target != move.target:
                raise RefusedError(
                    f"the plan is stale: it is being moved to {other.target}, not {move.target}",
                    hint="shardkit move resume or abort ends that move",
                    logical_shard=move.logical_shard,
                )
            begun.add(move.logical_shard)
    ordered = sorted(left, key=lambda move: move.logical_shard not in begun)
    return Remaining(tuple(ordered), frozenset(begun), len(file.moves) - len(left))


def apply(
    topology: Topology,
    left: Remaining,
    *,
    script: Script,
    options: Options = _AS_BEFORE,
    at_once: int = 2,
    per_server: int = 1,
    cleans: bool = False,
    on_end: Callable[[int, Outcome | ShardkitError], None] = lambda _n, _o: None,
) -> dict[int, Outcome | ShardkitError]:
    """Do what is left of a plan; a move that fails does not stop the others.

    Args:
        topology: the cluster.
        left: of `left_of`.
        script: makes the empty schema of a logical shard; see `shardkit.ops.moves.move`.
        options: how each move is done.
        at_once: moves at the same time.
        per_server: of those, how many may have the same source or target.
        cleans: whether each old copy is forgotten at once; there is no way back then.
        on_end: told what has become of each.

    Returns:
        What has become of each, by logical shard.
    """
    found: dict[int, Outcome | ShardkitError] = {}
    for number in sorted(left.begun):
        try:
            found[number] = moves.resume(topology, number, script=script, options=options)
            if cleans:
                moves.clean(topology, number, options=options)
        except ShardkitError as error:
            found[number] = error
        on_end(number, found[number])
    fresh = [(m.logical_shard, m.target) for m in left.moves if m.logical_shard not in left.begun]
    return found | moves.move_many(
        topology,
        fresh,
        script=script,
        options=options,
        at_once=at_once,
        per_server=per_server,
        cleans=cleans,
        on_end=on_end,
    )
