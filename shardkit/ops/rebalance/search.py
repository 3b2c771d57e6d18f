"""Looks for the placement with the fewest bytes moved: pure, and the same for the same question.

Few logical shards are tried exhaustively (`exact`). Many are placed step by step: from the fullest
to the emptiest physical shard, what mends most for its bytes; then whatever turns out not to have
been needed goes back, and large ones are exchanged for smaller ones that do. How far from the
best that can be is said by `bounds`.
"""

from __future__ import annotations

import math
from typing import Final

from shardkit.ops.rebalance import exact
from shardkit.ops.rebalance.problem import Placement, Problem

__all__ = ["search"]

_EPSILON: Final = 1e-9
"""Percent: below this two placements are as near to the tolerance as each other."""


def search(problem: Problem) -> tuple[Placement, bool]:
    """Return the best placement found, and whether it is proven that none is better.

    A further search that begins with the answer changes nothing, unless the number of moves is
    bounded: then the next ones follow.
    """
    found, proven = _once(problem)
    while not proven and problem.max_moves >= len(problem.home):
        again = Problem(found, problem.allowed, problem.measures, problem.max_moves)
        better, _ = _once(again)
        if better == found:
            break
        found = better
    return found, proven


def _once(problem: Problem) -> tuple[Placement, bool]:
    state = _State(problem)
    state.settle()
    stay = tuple(state.place)
    while state.mend():
        pass
    state.spare()
    # Steps that mend a little may cost what the rounded excess does not show.
    known = min(stay, tuple(state.place), key=problem.worth)
    return exact.best(problem, known)


class _State:
    """A placement that is changed step by step."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.place = list(problem.home)
        self.sums = [measure.sums(problem.home) for measure in problem.measures]
        self.moves = 0

    def settle(self) -> None:
        """Move what may not stay: the largest first, to where it disturbs least."""
        problem = self.problem
        leave = [i for i, place in enumerate(self.place) if place not in problem.allowed[i]]
        for i in sorted(leave, key=lambda i: -problem.sizes[i]):
            self._move(i, min(problem.allowed[i], key=lambda to: (self._crowding(i, to), to)))

    def mend(self) -> bool:
        """Take the one step that mends most for its bytes; return whether there was one."""
        if self.moves >= self.problem.max_moves or self._distance() <= _EPSILON:
            return False
        pairs = self._pairs()
        # Nearly always the two extremes have something for each other.
        for wanted in (pairs[:1], pairs[1:]):
            steps = [step for source, target in wanted for step in self._steps(source, target)]
            if steps:
                _, _, i, target = min(steps)
                self._move(i, target)
                return True
        return self._swap(pairs)

    def spare(self) -> None:
        """Take back what was not needed, and exchange large ones for smaller ones that do."""
        problem = self.problem
        changed = True
        while changed:
            changed = False
            moved = [i for i, place in enumerate(self.place) if place != problem.home[i]]
            for i in sorted(moved, key=lambda i: -problem.sizes[i]):
                home, place = problem.home[i], self.place[i]
                if home not in problem.allowed[i]:
                    continue
                if self._change([(i, home)]) <= _EPSILON:
                    self._move(i, home)
                    changed = True
                    continue
                smaller = [
                    j
                    for j, here in enumerate(self.place)
                    if here == home == problem.home[j]
                    and problem.sizes[j] < problem.sizes[i]
                    and place in problem.allowed[j]
                ]
                for j in sorted(smaller, key=lambda j: problem.sizes[j]):
                    if self._change([(i, home), (j, place)]) <= _EPSILON:
                        self._move(i, home)
                        self._move(j, place)
                        changed = True
                        break

    def _move(self, item: int, target: int) -> None:
        source, home = self.place[item], self.problem.home[item]
        for measure, sums in zip(self.problem.measures, self.sums, strict=True):
            sums[source] -= measure.amounts[item]
            sums[target] += measure.amounts[item]
        self.moves += (target != home) - (source != home)
        self.place[item] = target

    def _distance(self) -> float:
        return sum(
            measure.distance(place, amount)
            for measure, sums in zip(self.problem.measures, self.sums, strict=True)
            for place, amount in enumerate(sums)
        )

    def _change(self, moves: list[tuple[int, int]]) -> float:
        """Return by how much moves change the distance from the tolerance."""
        change = 0.0
        for measure, sums in zip(self.problem.measures, self.sums, strict=True):
            after: dict[int, int] = {}
            for item, target in moves:
                source = self.place[item]
                after[source] = after.get(source, sums[source]) - measure.amounts[item]
                after[target] = after.get(target, sums[target]) + measure.amounts[item]
            for place, amount in after.items():
                change += measure.distance(place, amount) - measure.distance(place, sums[place])
        return change

    def _crowding(self, item: int, target: int) -> float:
        """Return how full a place would be with an item, as a multiple of what is due to it."""
        return max(
            (sums[target] + measure.amounts[item]) / measure.percents[target]
            for measure, sums in zip(self.problem.measures, self.sums, strict=True)
        )

    def _pairs(self) -> list[tuple[int, int]]:
        """Return pairs of places, from the one with most for its share to that with least."""
        open_places = [n for n, percent in enumerate(self.problem.measures[0].percents) if percent]
        found: list[tuple[float, int, int]] = []
        for measure, sums in zip(self.problem.measures, self.sums, strict=True):
            # Nothing is said of a measure that is within the tolerance everywhere.
            if all(measure.distance(place, sums[place]) <= _EPSILON for place in open_places):
                continue
            fill = {place: sums[place] / measure.percents[place] for place in open_places}
            found += [
                (fill[target] - fill[source], source, target)
                for source in open_places
                for target in open_places
                if fill[source] > fill[target]
            ]
        return [(source, target) for _, source, target in sorted(found)]

    def _steps(self, source: int, target: int) -> list[tuple[float, int, int, int]]:
        """Return moves from one place to another that mend something; the best is the least."""
        problem = self.problem
        found = []
        for i, place in enumerate(self.place):
            if place != source or target not in problem.allowed[i]:
                continue
            change = self._change([(i, target)])
            if change < -_EPSILON:
                size = 0 if place != problem.home[i] else problem.sizes[i]
                # Of those that mend as much for a byte, the largest: fewer moves.
                found.append((change / size if size else -math.inf, -size, i, target))
        return found

    def _swap(self, pairs: list[tuple[int, int]]) -> bool:
        """Exchange two logical shards where no single move mends anything."""
        problem = self.problem
        if self.moves + 2 > problem.max_moves:
            return False
        best: tuple[float, int, int] | None = None
        for source, target in pairs[:_SWAPPED_PAIRS]:
            out = [
                i for i, p in enumerate(self.place) if p == source and target in problem.allowed[i]
            ]
            back = [
                i for i, p in enumerate(self.place) if p == target and source in problem.allowed[i]
            ]
            for i in out[:_SWAPPED]:
                for j in back[:_SWAPPED]:
                    change = self._change([(i, target), (j, source)])
                    if change < -_EPSILON and (best is None or (change, i, j) < best):
                        best = (change, i, j)
        if best is None:
            return False
        _, i, j = best
        here, there = self.place[i], self.place[j]
        self._move(i, there)
        self._move(j, here)
        return True


_SWAPPED_PAIRS: Final = 3
"""Pairs of places that are looked at for an exchange."""

_SWAPPED: Final = 200
"""Logical shards of each place that are."""
