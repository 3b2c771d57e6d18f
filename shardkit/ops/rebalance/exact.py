"""The best placement of few logical shards, by trying all that could be better. Pure.

Branch and bound (Land and Doig, Econometrica 28, 1960): logical shards are placed one after the
other, the largest first, and a branch is left as soon as what is placed already makes it worse
than the best plan known. The search gives up after `MAX_STEPS`, so that it ends in about a second.
Where there are more than `SURE`, it is spared when the plan known reaches the bound.
"""

from __future__ import annotations

from typing import Final

from shardkit.ops.rebalance.bounds import least_bytes
from shardkit.ops.rebalance.problem import Measure, Placement, Problem

__all__ = ["MAX_FREE", "MAX_STEPS", "SURE", "best"]

MAX_FREE: Final = 40
"""Logical shards with a choice, above which it is not tried."""

SURE: Final = 12
"""Logical shards with a choice, up to which even the number of moves is the least."""

MAX_STEPS: Final = 20_000
"""Placements of one logical shard that are tried."""


def best(problem: Problem, known: Placement) -> tuple[Placement, bool]:
    """Return the best placement found, and whether it is proven that none is better.

    Args:
        problem: what is to be placed.
        known: a placement that keeps to the constraints.
    """
    free = [i for i, to in enumerate(problem.allowed) if len(to) > 1]
    if len(free) > MAX_FREE:
        return known, False
    excess, size_bytes, _ = problem.worth(known)
    if len(free) > SURE and excess == 0 and size_bytes == least_bytes(problem):
        return known, True
    search = _Search(problem, known, free)
    search.descend(0, 0, 0)
    return search.best, search.steps <= MAX_STEPS


class _Search:
    """One search: what is placed so far, and the best that was found."""

    def __init__(self, problem: Problem, known: Placement, free: list[int]) -> None:
        self.problem = problem
        self.best = known
        self.worth = problem.worth(known)
        self.steps = 0
        fixed = [(i, to[0]) for i, to in enumerate(problem.allowed) if len(to) == 1]
        self._order = sorted(free, key=lambda i: -problem.sizes[i])
        self._place = list(known)
        self._placed = [[0] * problem.n_places for _ in problem.measures]
        # What may still come to a place, if everything that is not placed yet came.
        self._coming = [[0] * problem.n_places for _ in problem.measures]
        for i, place in fixed:
            self._place[i] = place
            self._add(i, place, self._placed, 1)
        for i in free:
            for place in problem.allowed[i]:
                self._add(i, place, self._coming, 1)
        self._fixed_moves = [i for i, place in fixed if place != problem.home[i]]

    def _add(self, item: int, place: int, into: list[list[int]], sign: int) -> None:
        for measure, sums in zip(self.problem.measures, into, strict=True):
            sums[place] += sign * measure.amounts[item]

    def descend(self, depth: int, size_bytes: int, moves: int) -> None:
        """Place the logical shard of a depth everywhere it may be, and go on."""
        problem = self.problem
        if depth == 0:
            size_bytes = sum(problem.sizes[i] for i in self._fixed_moves)
            moves = len(self._fixed_moves)
        if moves > problem.max_moves or (self._least(), size_bytes, moves) >= self.worth:
            return
        if depth == len(self._order):
            self.best = tuple(self._place)
            self.worth = problem.worth(self.best)
            return
        item = self._order[depth]
        home = problem.home[item]
        for place in problem.allowed[item]:
            self._add(item, place, self._coming, -1)
        # Where it is comes first: plans that move little are found early, and prune the others.
        for place in sorted(problem.allowed[item], key=lambda place: place != home):
            self.steps += 1
            if self.steps > MAX_STEPS:
                break
            self._place[item] = place
            self._add(item, place, self._placed, 1)
            moved = place != home
            self.descend(depth + 1, size_bytes + moved * problem.sizes[item], moves + moved)
            self._add(item, place, self._placed, -1)
        for place in problem.allowed[item]:
            self._add(item, place, self._coming, 1)

    def _least(self) -> int:
        """Return the percents beyond the tolerance that no placement of the rest can mend."""
        return sum(
            _unavoidable(measure, place, placed[place], placed[place] + coming[place])
            for measure, placed, coming in zip(
                self.problem.measures, self._placed, self._coming, strict=True
            )
            for place in range(self.problem.n_places)
        )


def _unavoidable(measure: Measure, place: int, least: int, most: int) -> int:
    """Return the excess of a place that ends between two amounts, at best."""
    if least > measure.high[place]:
        return measure.excess(place, least)
    return measure.excess(place, most) if most < measure.low[place] else 0
