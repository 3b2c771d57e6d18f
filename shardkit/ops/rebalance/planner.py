"""From what was measured to a plan: the moves that even out size and load with the fewest bytes.

Pure. What is asked for, in this order: constraints are kept; physical shards are beyond the
tolerance by as few percent of their shares as can be, all together; the fewest bytes travel; the
fewest moves. Called by the command line and by tests.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from shardkit.ops.rebalance.bounds import least_bytes
from shardkit.ops.rebalance.facts import (
    Constraints,
    Fill,
    LogicalShard,
    Plan,
    PlannedMove,
    Situation,
)
from shardkit.ops.rebalance.problem import Placement, Problem, problem_of
from shardkit.ops.rebalance.search import search

__all__ = ["excess_with", "moved", "plan"]


def plan(situation: Situation, constraints: Constraints) -> Plan:
    """Return the moves that even a cluster out.

    Args:
        situation: the cluster as it was measured.
        constraints: what the plan has to keep to.

    Raises:
        ConfigurationError: a name or number in the constraints does not exist.
        RefusedError: the constraints cannot be met together; the message names them.
        TryAgainError: a logical shard that has to leave is being moved already (retryable).
    """
    problem, forced = problem_of(situation, constraints)
    found, proven = search(problem)
    excess_after, size_bytes, _ = problem.worth(found)
    bound = size_bytes if proven else least_bytes(problem) if excess_after == 0 else None
    moves = [
        PlannedMove(
            shard.number,
            shard.owner,
            situation.physical[place],
            shard.epoch,
            shard.size_bytes,
            _why(shard, constraints, is_forced=must),
        )
        for shard, place, must in zip(situation.shards, found, forced, strict=True)
        if situation.physical[place] != shard.owner
    ]
    return Plan(
        moves=tuple(_ordered(situation, problem, moves)),
        before=_fills(situation, problem, problem.home),
        after=_fills(situation, problem, found),
        excess_before=problem.excess(problem.home),
        excess_after=excess_after,
        least_bytes=bound,
        is_optimal=proven or bound == size_bytes,
        uses_load=len(problem.measures) > 1,
        notes=(*situation.notes, *_notes(situation, constraints)),
    )


def moved(situation: Situation, moves: Iterable[PlannedMove]) -> Situation:
    """Return what a cluster will be when moves are done: one epoch later where they went."""
    to = {move.logical_shard: move.target for move in moves}
    shards = [
        replace(s, owner=to[s.number], epoch=s.epoch + 1) if s.number in to else s
        for s in situation.shards
    ]
    return replace(situation, shards=tuple(shards))


def excess_with(
    situation: Situation, constraints: Constraints, moves: Iterable[PlannedMove]
) -> tuple[int, int]:
    """Return the percents beyond the tolerance now, and with moves that were planned before."""
    problem, _ = problem_of(situation, replace(constraints, max_moves=None))
    places = {name: n for n, name in enumerate(situation.physical)}
    after = tuple(places[shard.owner] for shard in moved(situation, moves).shards)
    return problem.excess(problem.home), problem.excess(after)


def _why(shard: LogicalShard, constraints: Constraints, *, is_forced: bool) -> str:
    if not is_forced:
        return "balance"
    return "drain" if shard.owner in constraints.drained else "pin"


def _notes(situation: Situation, constraints: Constraints) -> list[str]:
    notes = [
        f"logical shard {shard.number} stays where it is: {shard.held}"
        for shard in situation.shards
        if shard.held
    ]
    if constraints.load_tolerance is None or not situation.seconds:
        notes.append("load is no constraint: only bytes are evened out")
    elif not situation.has_load:
        rows = sum(s.reads + s.writes for s in situation.shards)
        notes.append(
            f"load is no constraint: {rows:,} rows read and written in "
            f"{situation.seconds:.0f} s say nothing about it"
        )
    return notes


def _fills(situation: Situation, problem: Problem, placement: Placement) -> tuple[Fill, ...]:
    found = []
    for place, name in enumerate(situation.physical):
        here = [s for s, p in zip(situation.shards, placement, strict=True) if p == place]
        sizes, *loads = (
            measure.share(place, measure.sums(placement)[place]) for measure in problem.measures
        )
        found.append(
            Fill(
                physical=name,
                shards=len(here),
                size_bytes=sum(s.size_bytes for s in here),
                rows=sum(s.rows for s in here),
                load=sum(s.load for s in here),
                size_share=sizes,
                load_share=loads[0] if loads else None,
            )
        )
    return tuple(found)


def _ordered(
    situation: Situation, problem: Problem, moves: list[PlannedMove]
) -> Iterable[PlannedMove]:
    """Yield moves so that no server becomes fuller on the way than it has to.

    Each time to whom would be emptiest with it, of those from whom is fullest.
    """
    sizes = problem.measures[0]
    places = {name: n for n, name in enumerate(situation.physical)}
    sums = sizes.sums(problem.home)
    left = list(moves)
    while left:

        def crowding(move: PlannedMove) -> tuple[float, float, int]:
            source, target = places[move.source], places[move.target]
            drains = sizes.percents[source] or 1  # what is drained counts as full
            after = (sums[target] + move.size_bytes) / sizes.percents[target]
            return after, -sums[source] / drains, move.logical_shard

        move = min(left, key=crowding)
        left.remove(move)
        sums[places[move.source]] -= move.size_bytes
        sums[places[move.target]] += move.size_bytes
        yield move
