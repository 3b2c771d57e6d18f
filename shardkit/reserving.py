"""The steps by which one row takes a unique value and gives it up, as generators without I/O.

A generator yields what it needs to know or to have done, and is sent the answer; `shardkit.lookup`
puts the requests to servers, and a test puts them to a model, in every order and with a crash
after every step. A lookup row holds pairs of id and ticket: the rows that may have the value. A
ticket is the number of an advisory lock that the transaction writing the row holds to its end, so
whoever waits for it and then reads the row knows whether the pair counts. Source: docs/lookup.md.
"""

from __future__ import annotations

from collections.abc import Collection, Generator
from dataclasses import dataclass
from typing import Any, Final

__all__ = [
    "Busy",
    "Insert",
    "Own",
    "Pair",
    "Pairs",
    "Read",
    "Request",
    "Steps",
    "Swap",
    "Taken",
    "Verify",
    "note",
    "release",
    "reserve",
]

ATTEMPTS: Final = 20
"""How often a row that changes meanwhile is read again."""


@dataclass(frozen=True, slots=True, order=True)
class Pair:
    """A row that may have a value.

    Attributes:
        id: of the row.
        ticket: the advisory lock of the transaction that said so.
    """

    id: int
    ticket: int


Pairs = tuple[Pair, ...]
"""A lookup row: who may have its value; empty stands for no row."""


@dataclass(frozen=True, slots=True)
class Insert:
    """Add the lookup row with this pair alone, unless there is one: was it added?"""

    pair: Pair


@dataclass(frozen=True, slots=True)
class Read:
    """Which pairs has the lookup row?"""


@dataclass(frozen=True, slots=True)
class Swap:
    """Replace the pairs if they are still the old ones; none deletes the row: was it done?"""

    old: Pairs
    new: Pairs


@dataclass(frozen=True, slots=True)
class Verify:
    """Wait for the end of the ticket's transaction, then look: does the committed row match?"""

    pair: Pair


@dataclass(frozen=True, slots=True)
class Own:
    """Does the row match as this transaction sees it?"""

    id: int


Request = Insert | Read | Swap | Verify | Own
Steps = Generator[Request, Any, None]


class Taken(Exception):  # noqa: N818 - an answer, which sessions turn into an error
    """Another row has the value.

    Attributes:
        id: of that row.
    """

    def __init__(self, id: int) -> None:  # noqa: A002 - the glossary's word
        self.id = id
        super().__init__(id)


class Busy(Exception):  # noqa: N818 - an answer, which sessions turn into an error
    """The lookup row changed too often, or another transaction does not end."""


def reserve(mine: Pair, tickets: Collection[int], leaving: Collection[int]) -> Steps:
    """Take the value for a row that this transaction is about to write.

    What stands in the lookup row is only added to, but for pairs whose transaction has ended and
    whose row does not match: whatever becomes of this transaction, no row loses its pair.

    Args:
        mine: id of the row; a ticket whose lock this transaction holds already.
        tickets: every ticket of this transaction, its own included.
        leaving: ids of rows that this transaction has locked and is about to write without the
            value.

    Raises:
        Taken: another row has it.
        Busy: it changes too often.
    """
    if (yield Insert(mine)):
        return
    for _ in range(ATTEMPTS):
        pairs: Pairs = yield Read()
        if not pairs:
            if (yield Insert(mine)):
                return
            continue
        kept = []
        for pair in pairs:
            if pair.ticket in tickets:
                # Its row may come back with a savepoint, so the pair stays to the end.
                if pair.id not in {mine.id, *leaving} and (yield Own(pair.id)):
                    raise Taken(pair.id)
                kept.append(pair)
                continue
            matches = yield Verify(pair)
            if matches and pair.id != mine.id:
                # Committed: only a row that this transaction changes may still make way.
                if pair.id not in leaving and (yield Own(pair.id)):
                    raise Taken(pair.id)
                kept.append(pair)
        if mine in kept:
            return  # its lock has been held since, so nobody has passed it by
        if (yield Swap(pairs, (*kept, mine))):
            return
    raise Busy


def note(mine: Pair) -> Steps:
    """Add a committed row to the lookup row of its value, whoever else is there.

    Args:
        mine: id of the row, and a ticket that nothing holds.

    Raises:
        Busy: it changes too often.
    """
    for _ in range(ATTEMPTS):
        if (yield Insert(mine)):
            return
        pairs: Pairs = yield Read()
        if any(pair.id == mine.id for pair in pairs):
            return
        if pairs and (yield Swap(pairs, (*pairs, mine))):
            return
    raise Busy


def release(ids: Collection[int] | None, tickets: Collection[int] = ()) -> Steps:
    """Remove the pairs that do not count any more.

    Safe at any time and for any value: each is verified first.

    Args:
        ids: rows that may have given the value up; None for all.
        tickets: of transactions that ended; their pairs are looked at too.

    Raises:
        Busy: it changes too often.
    """
    for _ in range(ATTEMPTS):
        pairs: Pairs = yield Read()
        kept: list[Pair] = []
        for pair in reversed(pairs):  # of two for one row the newer stays: see docs/lookup.md
            concerned = ids is None or pair.id in ids or pair.ticket in tickets
            is_double = pair.id in {newer.id for newer in kept}
            if not concerned or ((yield Verify(pair)) and not is_double):
                kept.insert(0, pair)
        if tuple(kept) == pairs or (yield Swap(pairs, tuple(kept))):
            return
    raise Busy
