"""Who owns a logical shard: the states of an ownership row, and the map that all rows make.

Every physical shard keeps one row for each logical shard that it has or had (`shardkit.ownership`
in its admin schema). `merged` makes the shard map of what the primaries have said; `accepted`
decides what of a new answer is believed. Pure: asked and told by `shardkit.mapwatch`, and by
simulations. Source: docs/moves.md.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final

from shardkit.topology import Hold, ShardMap

__all__ = [
    "LIFT_AFTER",
    "Answer",
    "Claimed",
    "State",
    "accepted",
    "arriving",
    "claims_of",
    "is_lawful",
    "merged",
]


LIFT_AFTER: Final = 5.0
"""Seconds, by the database's clock, after which anybody may lift a fence: a mover that died blocks
writes for no longer."""


class State(StrEnum):
    """What a physical shard is to a logical shard."""

    ACTIVE = "active"
    """Its owner."""

    IMPORTING = "importing"
    """It receives a copy, which nobody may use yet; else it is as if retired."""

    FENCED = "fenced"
    """Its owner still, and writes wait."""

    RETIRED = "retired"
    """It has handed it over."""


@dataclass(frozen=True, slots=True)
class Claimed:
    """What one physical shard says of one logical shard.

    Attributes:
        epoch: counts hand-overs and promotions; 0 before the first ownership.
        state: what it is to it.
        moved_to: where it goes or went; None for nowhere.
    """

    epoch: int
    state: State
    moved_to: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What the primary of a physical shard has said.

    Attributes:
        system: its system identifier.
        timeline: of its log.
        rows: what it says of logical shards, by number.
        registered: the timeline that was written down at the last promotion; None for unknown.
        tells: whether it has `shardkit.on_timeline`, which one of an older version lacks.
    """

    system: int
    timeline: int
    rows: Mapping[int, Claimed] = field(default_factory=dict)
    registered: int | None = None
    tells: bool = False


def claims_of(text: str) -> dict[int, Claimed]:
    """Return the rows of `"0 1 active,1 2 retired beta"`, as the servers are asked for them.

    Raises:
        ValueError: the text is something else.
    """
    rows = {}
    for part in filter(None, text.split(",")):
        number, epoch, state, *to = part.split(" ")
        rows[int(number)] = Claimed(int(epoch), State(state), to[0] if to else None)
    return rows


def accepted(known: Answer | None, new: Answer) -> Answer | None:
    """Return what is believed of a physical shard after a new answer; None to ignore the answer.

    Args:
        known: what was believed before.
        new: the answer.

    Returns:
        The answer, in which no epoch is lower than one already seen. None where the server is
        another one, or has not heard of a promotion yet.
    """
    if not is_lawful(known, new):
        return None  # promoted by somebody, and not put in order yet; or somebody else was
    if known is None:
        return new
    rows = dict(new.rows)
    for number, before in known.rows.items():
        found = rows.get(number)
        if found is None:
            # A row that counted cannot vanish; one of a copy that was given up may be tidied away.
            if before.state in {State.ACTIVE, State.FENCED}:
                rows[number] = before
        elif found.epoch < before.epoch:
            rows[number] = before
    return replace(new, rows=rows)


def is_lawful(known: Answer | None, new: Answer) -> bool:
    """Tell whether a server that takes writes is the primary of its physical shard.

    Its timeline is registered, and nobody has told of a later one.

    Args:
        known: what was believed of the physical shard before.
        new: what the server says.
    """
    return new.registered in {None, new.timeline} and (
        known is None or (new.system == known.system and new.timeline >= known.timeline)
    )


def merged(
    first: ShardMap, answers: Mapping[str, Answer], before: ShardMap, physical: Collection[str]
) -> ShardMap:
    """Return the shard map that physical shards make together.

    The highest epoch wins; of equal ones the active row. `retired` on top means that the logical
    shard was handed over and is not open yet where it went: everybody waits for that. Two owners
    of one epoch get nothing written.

    Args:
        first: the first placement, for logical shards of which nobody says anything.
        answers: what was last believed of each physical shard, by name.
        before: the map until now, whose owner stays where two claim to be it.
        physical: the names of all physical shards of the configuration.
    """
    owners, epochs = list(first.owners), list(first.epochs)
    held: dict[int, Hold] = {}
    best: dict[int, list[tuple[str, Claimed]]] = {}
    for name, answer in answers.items():
        for number, row in answer.rows.items():
            if row.epoch < 1 or number >= len(owners):
                continue  # a copy in the making, where it never was before
            found = best.setdefault(number, [])
            top = found[0][1].epoch if found else 0
            if row.epoch > top:
                best[number] = [(name, row)]
            elif row.epoch == top:
                found.append((name, row))
    for number, rows in best.items():
        owner, hold = _owner(rows, before.owners[number], physical)
        owners[number], epochs[number] = owner, rows[0][1].epoch
        if hold is not None:
            held[number] = hold
    return ShardMap(tuple(owners), tuple(epochs), held)


def arriving(
    answers: Mapping[str, Answer], shard_map: ShardMap
) -> dict[tuple[str, str], frozenset[int]]:
    """Return which logical shards are on their way, by physical shard from which and to which.

    Args:
        answers: what was last believed of each physical shard, by name.
        shard_map: what `merged` made of that.
    """
    found: dict[tuple[str, str], set[int]] = {}
    for name, answer in answers.items():
        for number, row in answer.rows.items():
            if number >= len(shard_map):
                continue
            if row.state is State.IMPORTING and shard_map.owners[number] != name:
                found.setdefault((shard_map.owners[number], name), set()).add(number)
            elif row.state is State.FENCED and row.moved_to is not None and row.moved_to in answers:
                found.setdefault((name, row.moved_to), set()).add(number)
    return {way: frozenset(numbers) for way, numbers in found.items()}


def _owner(
    rows: list[tuple[str, Claimed]], before: str, physical: Collection[str]
) -> tuple[str, Hold | None]:
    """Return the owner by rows of one epoch, and what is to wait for it."""
    for state, hold in ((State.ACTIVE, None), (State.FENCED, Hold.FENCED)):
        names = sorted(name for name, row in rows if row.state is state)
        if len(names) == 1:
            return names[0], hold
        if names:
            return before if before in names else names[0], Hold.DISPUTED
    name, row = rows[0]
    to = row.moved_to
    # Of a place that the configuration does not name nothing is known but that it is not here.
    return (to if to is not None and to in physical else name), Hold.HANDED_OVER
