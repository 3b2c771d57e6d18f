"""Decides what the demo consists of: everybody and everything, from one number, no I/O."""

from __future__ import annotations

import datetime as dt
import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from app.demo import words

__all__ = [
    "DEMO_PERSON",
    "DEMO_USERNAME",
    "DemoPlan",
    "PlannedComment",
    "PlannedPerson",
    "PlannedPhoto",
    "make",
]

DEMO_USERNAME = "demo"
"""The account to try; it follows many and has photos of its own."""

DEMO_PERSON = 0
"""Who that is, by position."""

SPAN = dt.timedelta(days=21)
"""Over which the photos are spread, the newest some minutes old."""


@dataclass(frozen=True, slots=True)
class PlannedPerson:
    """A person to be."""

    username: str
    display_name: str
    bio: str


@dataclass(frozen=True, slots=True)
class PlannedPhoto:
    """A photo to be; its blob key ends with `name`, and `age` counts back from the load."""

    owner: int
    caption: str
    seed: int
    name: str
    age: dt.timedelta


@dataclass(frozen=True, slots=True)
class PlannedComment:
    """A comment to be."""

    author: int
    body: str


@dataclass(frozen=True, slots=True)
class DemoPlan:
    """The whole demo; people and photos are named by their position.

    Attributes:
        people: the first is the account to try.
        photos: oldest first, so that ids sort as the photos do.
        follows: followees by follower.
        likes: likers by photo.
        comments: comments by photo.
    """

    people: Sequence[PlannedPerson]
    photos: Sequence[PlannedPhoto]
    follows: Mapping[int, Sequence[int]]
    likes: Mapping[int, Sequence[int]]
    comments: Mapping[int, Sequence[PlannedComment]]


def make(n_people: int, seed: int) -> DemoPlan:
    """Return the demo of a seed; the same every time.

    Args:
        n_people: at least 2.
        seed: any number.
    """
    rng = random.Random(seed)  # noqa: S311 - a demo, not a secret
    people = _people(n_people)
    weights = [1 / (rank + 3) ** 0.7 for rank in range(n_people)]
    photos = _photos(rng, n_people, seed)
    follows = {
        person: _pick(rng, weights, 45 if person == 0 else rng.randint(6, 24), not_this=person)
        for person in range(n_people)
    }
    likes = {
        n: _pick(rng, weights, rng.choice((2, 3, 5, 8, 13, 21)), not_this=photo.owner)
        for n, photo in enumerate(photos)
    }
    comments = {
        n: [
            PlannedComment(author, body)
            for author, body in zip(
                _pick(rng, weights, rng.choice((0, 1, 2, 2, 3, 5)), not_this=photo.owner),
                rng.sample(words.COMMENTS, 5),
                strict=False,
            )
        ]
        for n, photo in enumerate(photos)
    }
    return DemoPlan(people, photos, follows, likes, comments)


def _people(n: int) -> list[PlannedPerson]:
    found = [PlannedPerson(DEMO_USERNAME, "Demo Visitor", "The account to try.")]
    for number in range(n - 1):
        first = words.FIRST_NAMES[number % len(words.FIRST_NAMES)]
        lap = number // len(words.FIRST_NAMES)
        last = words.LAST_NAMES[(number * 7 + lap) % len(words.LAST_NAMES)]
        suffix = "" if lap < len(words.TRADES) else str(lap)
        username = f"{first.lower()}.{words.TRADES[lap % len(words.TRADES)]}{suffix}"
        bio = words.BIOS[number % len(words.BIOS)]
        found.append(PlannedPerson(username, f"{first} {last}", bio))
    return found


def _photos(rng: random.Random, n_people: int, seed: int) -> list[PlannedPhoto]:
    owners = [person for person in range(n_people) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    owners += [0] * 5
    rng.shuffle(owners)
    step = SPAN / len(owners)
    return [
        PlannedPhoto(
            owner=owner,
            caption=rng.choice(words.CAPTIONS),
            seed=seed * 1_000_003 + n,
            name=hashlib.sha256(f"demo {seed} {n_people} {n}".encode()).hexdigest()[8:32],
            age=step * (len(owners) - n - rng.random()),
        )
        for n, owner in enumerate(owners)
    ]


def _pick(rng: random.Random, weights: Sequence[float], n: int, *, not_this: int) -> Sequence[int]:
    """Return different people, well-known ones more often."""
    drawn = dict.fromkeys(rng.choices(range(len(weights)), weights, k=n + n // 2))
    return [person for person in drawn if person != not_this][:n]
