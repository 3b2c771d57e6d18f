"""How few bytes a rebalance can do with at least: what no search has to look below. Pure.

A physical shard that is too full has to give away at least what it has too much, and at least as
many logical shards as the largest of them need for that, so as many of the smallest; one that
has too little has to be given it. Load is shed with the fewest bytes by parts of the logical shards
with the most load a byte, were they divisible (Dantzig's bound of the knapsack problem, Operations
Research 5, 1957). Givers and takers are counted apart, since each byte leaves one and reaches one.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from shardkit.ops.rebalance.problem import Problem

__all__ = ["least_bytes"]


def least_bytes(problem: Problem) -> int:
    """Return a lower bound of the bytes of every plan that ends within the tolerance."""
    return max(_given(problem), _taken(problem))


def _given(problem: Problem) -> int:
    total = 0
    for place in range(problem.n_places):
        here = [i for i, home in enumerate(problem.home) if home == place]
        leave = [i for i in here if place not in problem.allowed[i]]
        may = [i for i in here if place in problem.allowed[i] and len(problem.allowed[i]) > 1]
        come = [
            i for i, to in enumerate(problem.allowed) if to == (place,) and problem.home[i] != place
        ]
        most = 0
        for measure in problem.measures:
            if not measure.percents[place]:
                continue
            amounts = measure.amounts
            stays = sum(amounts[i] for i in here) - sum(amounts[i] for i in leave)
            too_much = stays + sum(amounts[i] for i in come) - measure.high[place]
            most = max(most, _covering(problem.sizes, amounts, may, too_much))
        total += sum(problem.sizes[i] for i in leave) + most
    return total


def _taken(problem: Problem) -> int:
    total = 0
    for place in range(problem.n_places):
        come = [
            i for i, to in enumerate(problem.allowed) if to == (place,) and problem.home[i] != place
        ]
        may = [
            i
            for i, to in enumerate(problem.allowed)
            if place in to and problem.home[i] != place and to != (place,)
        ]
        most = 0
        for measure in problem.measures:
            if not measure.percents[place]:
                continue
            amounts = measure.amounts
            stays = sum(
                amounts[i]
                for i, home in enumerate(problem.home)
                if home == place and place in problem.allowed[i]
            )
            too_little = measure.low[place] - stays - sum(amounts[i] for i in come)
            most = max(most, _covering(problem.sizes, amounts, may, too_little))
        total += sum(problem.sizes[i] for i in come) + most
    return total


def _covering(
    sizes: Sequence[int], amounts: Sequence[int], indexes: Sequence[int], needed: int
) -> int:
    """Return a lower bound of the bytes of a subset that has an amount."""
    if needed <= 0:
        return 0
    count, left = 0, needed
    for amount in sorted((amounts[i] for i in indexes), reverse=True):
        if left <= 0:
            break
        count, left = count + 1, left - amount
    fewest = sum(sorted(sizes[i] for i in indexes)[:count])
    divided, left = 0, needed
    useful = [i for i in indexes if amounts[i]]
    for i in sorted(useful, key=lambda i: Fraction(sizes[i], amounts[i])):
        if left <= 0:
            break
        divided += sizes[i] if amounts[i] <= left else -(-sizes[i] * left // amounts[i])
        left -= amounts[i]
    return max(fewest, divided)
