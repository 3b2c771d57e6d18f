"""The stages between candidates and a ranked window, each a pure function of a list.

    first_pass   at most 100 of what may be 500 and more, by what is known without their rows
    ranked       by value, times trust
    demoted      integrity: what looks like spam is worth less, and is not removed
    varied       no author twice within a window, no format more than a few times in a row
    with_ads     an ad at certain places, never first, never beside another

Ties are broken by id, so the same candidates always have the same order.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from app.feed.ranking.candidates import Candidate, Source
from app.feed.ranking.rankers import HALF_LIFE, Ranker, features_of

__all__ = ["KEPT", "demoted", "first_pass", "ranked", "trust_of", "varied", "with_ads"]

KEPT: Final = 100
"""Candidates whose rows are read. Source: Instagram Explore's first stage (app.md, section 3)."""

EXPLORE_PRIOR: Final = 0.5
"""What a stranger's photo is worth beside one of the same age of somebody followed."""

EXPLORE_SHARE: Final = 10
"""One of so many is a stranger's, if there is any: nobody who is followed takes every place."""

AUTHOR_WINDOW: Final = 3
FORMAT_RUN: Final = 3
FIRST_AD, AD_EVERY = 3, 8

YOUNG: Final = 2 * 86_400.0
"""Seconds below which an account is new."""

MOST_TAGS: Final = 8
_TAG: Final = re.compile(r"#\w+")
_LINK: Final = re.compile(r"https?://|www\.", re.IGNORECASE)


def first_pass(candidates: Sequence[Candidate], n: int = KEPT) -> list[Candidate]:
    """Return the candidates that are worth reading, best first: age and source are all it knows."""

    def value(candidate: Candidate) -> float:
        prior = EXPLORE_PRIOR if candidate.source is Source.EXPLORE else 1.0
        return float(prior * 0.5 ** (candidate.age / HALF_LIFE))

    best = sorted(candidates, key=lambda each: (-value(each), -each.id))
    sure = [each for each in best if each.source is Source.EXPLORE][: n // EXPLORE_SHARE]
    rest = [each for each in best if each not in sure][: n - len(sure)]
    kept = {each.id for each in (*sure, *rest)}
    return [each for each in best if each.id in kept]


def ranked(candidates: Sequence[Candidate], ranker: Ranker) -> list[Candidate]:
    """Return candidates by value, best first."""
    values = ranker.values([features_of(candidate) for candidate in candidates])
    order = sorted(
        zip(values, candidates, strict=True),
        key=lambda pair: (-pair[0] * pair[1].trust if pair[0] > 0 else -pair[0], -pair[1].id),
    )
    return [candidate for _, candidate in order]


def trust_of(caption: str, account_age: float) -> float:
    """Return how much a photo is trusted: less with a link, many tags, or of a new account.

    Args:
        caption: of the photo.
        account_age: seconds since the owner signed up.
    """
    trust = 1.0
    if _LINK.search(caption):
        trust *= 0.7
    if len(_TAG.findall(caption)) > MOST_TAGS:
        trust *= 0.6
    if account_age < YOUNG and trust < 1.0:
        trust *= 0.5
    return trust


def demoted(candidate: Candidate, caption: str, account_age: float) -> Candidate:
    """Return a candidate with the trust it has."""
    return replace(candidate, trust=trust_of(caption, account_age))


def varied(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return candidates in nearly this order, authors and formats mixed where others are left.

    Each place is given to the first one that fits; where none does, to the first of all.
    """
    left = list(candidates)
    found: list[Candidate] = []
    while left:
        recent = {each.owner_id for each in found[-(AUTHOR_WINDOW - 1) :]}
        last = [each.shape for each in found[-FORMAT_RUN:]]
        full = last[0] if len(last) == FORMAT_RUN and len(set(last)) == 1 else None
        at = next(
            (
                n
                for n, each in enumerate(left)
                if each.owner_id not in recent and each.shape != full
            ),
            next((n for n, each in enumerate(left) if each.owner_id not in recent), 0),
        )
        found.append(left.pop(at))
    return found


def with_ads(candidates: Sequence[Candidate], ads: Sequence[Candidate]) -> list[Candidate]:
    """Return candidates with an ad before certain places; ads that are candidates too are left out.

    Args:
        candidates: in order.
        ads: best first.
    """
    shown = {candidate.id for candidate in candidates}
    left = [ad for ad in ads if ad.id not in shown]
    found: list[Candidate] = []
    for n, candidate in enumerate(candidates):
        if n >= FIRST_AD and (n - FIRST_AD) % AD_EVERY == 0 and left:
            found.append(left.pop(0))
        found.append(candidate)
    return found
