"""A rebalance as integers: who may go where, what is due to whom, and what a placement is worth.

Pure. `problem_of` makes it of what was measured and refuses constraints that nothing can meet;
`shardkit.ops.rebalance.search` looks for the placement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from typing import Final

from shardkit.errors import ConfigurationError, RefusedError, TryAgainError
from shardkit.ops.rebalance.facts import Constraints, LogicalShard, Situation

__all__ = ["Measure", "Placement", "Problem", "Worth", "problem_of"]

Placement = tuple[int, ...]
"""The place of every logical shard, by index of each."""

Worth = tuple[int, int, int]
"""Percent beyond the tolerance, bytes that travel, moves: the least of these is the best plan."""

_PERCENT: Final = 100


@dataclass(frozen=True, slots=True)
class Measure:
    """What is to be evened out: bytes, or load.

    Attributes:
        amounts: of every logical shard.
        due: what every physical shard should have; 0 for one that is drained.
        low: the least that every physical shard should have; 0 where nothing is due.
        high: the most.
        percents: what one percent of its share is, at least 1; 0 where nothing is due.
    """

    amounts: tuple[int, ...]
    due: tuple[Fraction, ...]
    low: tuple[int, ...]
    high: tuple[int, ...]
    percents: tuple[int, ...]

    def excess(self, place: int, amount: int) -> int:
        """Return by how many percent of its share, rounded up, a place is beyond the tolerance."""
        percent = self.percents[place]
        if not percent:
            return 0  # it is being drained: what may stay there is not a question of degree
        beyond = max(amount - self.high[place], self.low[place] - amount, 0)
        return -(-beyond // percent)

    def distance(self, place: int, amount: int) -> float:
        """Return the same, not rounded."""
        percent = self.percents[place]
        if not percent:
            return 0.0
        return max(amount - self.high[place], self.low[place] - amount, 0) / percent

    def share(self, place: int, amount: int) -> float:
        """Return an amount as a multiple of what is due to a place; 0 where nothing is."""
        return float(amount / self.due[place]) if self.due[place] else 0.0

    def sums(self, placement: Sequence[int]) -> list[int]:
        """Return what every place has of it."""
        found = [0] * len(self.low)
        for amount, place in zip(self.amounts, placement, strict=True):
            found[place] += amount
        return found


@dataclass(frozen=True, slots=True)
class Problem:
    """A rebalance as integers.

    Attributes:
        home: where every logical shard is, by index of the physical shard.
        allowed: where each may be.
        measures: what is evened out; the first is bytes.
        max_moves: how many may move.
    """

    home: Placement
    allowed: tuple[tuple[int, ...], ...]
    measures: tuple[Measure, ...]
    max_moves: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of every logical shard."""
        return self.measures[0].amounts

    @property
    def n_places(self) -> int:
        """How many physical shards there are."""
        return len(self.measures[0].low)

    def excess(self, placement: Sequence[int]) -> int:
        """Return the percents beyond the tolerance of all places and measures together."""
        return sum(
            measure.excess(place, amount)
            for measure in self.measures
            for place, amount in enumerate(measure.sums(placement))
        )

    def worth(self, placement: Sequence[int]) -> Worth:
        """Return what a placement is worth; the least is the best."""
        moved = [i for i, place in enumerate(placement) if place != self.home[i]]
        return self.excess(placement), sum(self.sizes[i] for i in moved), len(moved)


def problem_of(situation: Situation, constraints: Constraints) -> tuple[Problem, tuple[bool, ...]]:
    """Return the problem, and of every logical shard whether it has to leave.

    Raises:
        ConfigurationError: a physical shard or logical shard that is named does not exist.
        RefusedError: constraints that cannot be met together; the message names them.
        TryAgainError: a logical shard that has to leave is being moved already (retryable).
    """
    _check_names(situation, constraints)
    places = {name: n for n, name in enumerate(situation.physical)}
    open_places = tuple(n for name, n in places.items() if name not in constraints.drained)
    if not open_places:
        raise RefusedError(
            "every physical shard is to be drained",
            hint="leave one out of --drain: the rows have to be somewhere",
        )
    allowed = tuple(_allowed(shard, constraints, places, open_places) for shard in situation.shards)
    home = tuple(places[shard.owner] for shard in situation.shards)
    forced = tuple(place not in to for place, to in zip(home, allowed, strict=True))
    limit = constraints.max_moves
    if limit is not None and sum(forced) > limit:
        raise RefusedError(
            f"drains and pins need {sum(forced)} moves, and --max-moves is {limit}",
            hint=f"allow --max-moves {sum(forced)}, or drain fewer physical shards at once",
        )
    weights = _integers(situation, constraints)
    measures = [_measure([s.size_bytes for s in situation.shards], weights, constraints.tolerance)]
    if constraints.load_tolerance is not None and situation.has_load:
        loads = [s.load for s in situation.shards]
        measures.append(_measure(loads, weights, constraints.load_tolerance))
    n = len(home)
    return Problem(home, allowed, tuple(measures), n if limit is None else limit), forced


def _check_names(situation: Situation, constraints: Constraints) -> None:
    named = {
        "--drain": constraints.drained,
        "weight": constraints.weights.keys(),
        "pin": set(constraints.pins.values()),
    }
    for key, names in named.items():
        if unknown := sorted(set(names) - set(situation.physical)):
            raise ConfigurationError(
                f"{key}: no physical shard is called {unknown[0]!r}",
                hint=f"there are {', '.join(situation.physical)}",
            )
    numbers = {shard.number for shard in situation.shards}
    if beyond := sorted(set(constraints.pins) - numbers):
        raise ConfigurationError(
            f"pin: there is no logical shard {beyond[0]}", hint=f"the last is {max(numbers)}"
        )


def _allowed(
    shard: LogicalShard,
    constraints: Constraints,
    places: dict[str, int],
    open_places: tuple[int, ...],
) -> tuple[int, ...]:
    """Return where a logical shard may be."""
    pin = constraints.pins.get(shard.number)
    if pin is not None and pin in constraints.drained:
        raise RefusedError(
            f"logical shard {shard.number} is pinned to {pin!r}, which is to be drained",
            hint=f"take the pin away, or leave {pin!r} where it is",
            logical_shard=shard.number,
        )
    here = places[shard.owner]
    found = open_places if pin is None else (places[pin],)
    if shard.held and here not in found:
        raise TryAgainError(
            f"logical shard {shard.number} has to leave {shard.owner!r}, and {shard.held}",
            hint="wait for that move to end, or abort it; see shardkit move status",
            logical_shard=shard.number,
        )
    return (here,) if shard.held else found


def _integers(situation: Situation, constraints: Constraints) -> list[int]:
    """Return the weights as integers of the same proportions; 0 for what is drained."""
    weights = [
        Fraction(0) if name in constraints.drained else constraints.weights.get(name, Fraction(1))
        for name in situation.physical
    ]
    scale = lcm(*(weight.denominator for weight in weights))
    return [int(weight * scale) for weight in weights]


def _measure(amounts: list[int], weights: list[int], tolerance: Fraction) -> Measure:
    total, parts = sum(amounts), sum(weights)
    due = tuple(Fraction(total * weight, parts) for weight in weights)
    return Measure(
        tuple(amounts),
        due,
        low=tuple(max(0, -(-share * (1 - tolerance) // 1)) for share in due),
        high=tuple(share * (1 + tolerance) // 1 for share in due),
        percents=tuple(
            max(1, share // _PERCENT) if weight else 0
            for share, weight in zip(due, weights, strict=True)
        ),
    )
