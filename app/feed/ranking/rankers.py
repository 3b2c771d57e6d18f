"""The final ranker: a number for each candidate, by a protocol that a trained network can have.

`LinearRanker` is what there is now; its weights are chosen by hand, not learnt. It says nothing
about quality on real people. No I/O.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

from app.feed.ranking.candidates import Candidate, Source

__all__ = ["FEATURES", "LinearRanker", "Ranker", "features_of"]

HALF_LIFE: Final = 12 * 3600.0
"""Seconds in which a photo is worth half as much."""

FEATURES: Final = (
    "freshness",
    "likes",
    "comments",
    "is_followed",
    "is_mine",
    "is_liked",
    "bid",
)
"""Names of the features, in their order."""

WEIGHTS: Final[Mapping[str, float]] = {
    "freshness": 2.0,
    "likes": 0.25,
    "comments": 0.35,
    "is_followed": 1.0,
    "is_mine": 0.3,
    "is_liked": -0.6,
    "bid": 1.0,
}


class Ranker(Protocol):
    """Values candidates for one viewer. Pure: the same features have the same values."""

    def values(self, features: Sequence[Sequence[float]]) -> Sequence[float]:
        """Return a value for each row of features, in the order of `FEATURES`."""
        ...


class LinearRanker:
    """A weighted sum.

    Args:
        weights: by name of the feature; those left out are 0.
    """

    def __init__(self, weights: Mapping[str, float] = WEIGHTS) -> None:
        self._weights = tuple(weights.get(name, 0.0) for name in FEATURES)

    def values(self, features: Sequence[Sequence[float]]) -> Sequence[float]:
        """Return a value for each row of features."""
        weights = self._weights
        return [sum(map(float.__mul__, weights, row)) for row in features]


def features_of(candidate: Candidate) -> tuple[float, ...]:
    """Return what a ranker knows of a candidate, in the order of `FEATURES`."""
    return (
        0.5 ** (candidate.age / HALF_LIFE),
        math.log1p(candidate.likes),
        math.log1p(candidate.comments),
        float(candidate.source is Source.FOLLOWING),
        float(candidate.is_mine),
        float(candidate.is_liked),
        candidate.bid,
    )
