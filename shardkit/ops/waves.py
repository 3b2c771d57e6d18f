"""Which logical shards a roll-out reaches when: pure.

A revision meets one logical shard first, then a hundredth of them, a tenth, half, and all; each
wave begins when the one before went well. Called by `shardkit.ops.apply` and the command line.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shardkit.errors import ConfigurationError

__all__ = ["DEFAULT", "SMALLEST", "Wave", "parse", "waves"]

DEFAULT = (0.0, 1.0, 10.0, 50.0, 100.0)
"""Per cent of the logical shards reached after each wave; 0 stands for one, the canary."""

SMALLEST = 16
"""Logical shards to migrate from which the command line rolls out in waves unasked."""


@dataclass(frozen=True, slots=True)
class Wave:
    """One part of a roll-out.

    Attributes:
        name: `canary`, or how far the roll-out is after it, as `10 %`.
        logical_shards: those it reaches first.
    """

    name: str
    logical_shards: frozenset[int]


def waves(
    by_physical: Iterable[Sequence[int]], percentages: Sequence[float] = DEFAULT
) -> tuple[Wave, ...]:
    """Return the waves over logical shards; none is empty, and each shard is in one.

    Args:
        by_physical: the logical shards with something to do, of each physical shard; every wave
            takes from all of them in turn, so that a server of another kind is met early.
        percentages: ascending; a last wave for the rest is added where they end below 100.
    """
    lists = [list(numbers) for numbers in by_physical]
    longest = max((len(numbers) for numbers in lists), default=0)
    order = [numbers[n] for n in range(longest) for numbers in lists if n < len(numbers)]
    found: list[Wave] = []
    start = 0
    for percentage in (*percentages, 100.0):
        end = max(1, math.ceil(len(order) * percentage / 100))
        if end > start and order[start:end]:
            name = "canary" if percentage == 0 else f"{percentage:g} %"
            found.append(Wave(name, frozenset(order[start:end])))
            start = end
    return tuple(found)


def parse(text: str) -> tuple[float, ...]:
    """Return the percentages that `--wave` names: `canary,1,10,50,100`, or `all` for one wave.

    Raises:
        ConfigurationError: it names something else, or they do not ascend.
    """
    if text == "all":
        return (100.0,)
    try:
        found = tuple(
            0.0 if part.strip() == "canary" else float(part.strip().rstrip("%"))
            for part in text.split(",")
        )
    except ValueError:
        found = ()
    ascending = all(a < b for a, b in itertools.pairwise(found))
    if not found or not ascending or not all(0 <= value <= 100 for value in found):
        raise ConfigurationError(
            f"--wave {text!r} is no roll-out",
            hint='write "all", or ascending per cent as "canary,1,10,50,100"',
        )
    return found
