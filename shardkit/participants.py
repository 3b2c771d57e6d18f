"""What joins the transactions of a writer: unique values, events and so on.

`WriteSession` decides when, each participant what. The stages of a transaction, in their order:

    flushing → flushed → written     around everything that a flush writes
    writing                          before each INSERT, UPDATE and DELETE that the program gives
    said                             before each statement for a logical shard given by number
    send                             what is said with the commit: events
    prepare                          what must be true before COMMIT and could still prevent it
    decide                           over several servers: the moment from which it holds
    COMMIT                           by SQLAlchemy, where nothing was decided
    finish                           it holds: what is left to do about that; cannot fail any more
    settle                           the transaction is over, however it ended

What begins in an order ends in the reverse order, so that whoever comes last before COMMIT comes
first after it: `finish` and `settle` go backwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any

from shardkit.parts import Part

__all__ = ["Ending", "Participant", "Participants"]


class Ending(Enum):
    """How a transaction ended."""

    COMMITTED = "committed"
    ROLLED_BACK = "rolled back"
    UNKNOWN = "unknown"  # COMMIT may have been sent, and no answer says what became of it


class Participant:
    """One thing that joins a writer's transactions; every stage may be left out."""

    def flushing(self) -> None:
        """Objects are placed and have their ids; nothing of this flush is written yet."""

    def flushed(self) -> None:
        """SQLAlchemy has written; what the objects were before is still known."""

    def written(self) -> None:
        """The flush is over; statements may be run."""

    def writing(self, statement: Any, found: Sequence[Part]) -> None:
        """Take note of a write statement that is about to run.

        Args:
            statement: an INSERT, UPDATE or DELETE.
            found: its parts, each for one logical shard.
        """

    def said(self, statement: Any, shard: int) -> None:
        """Take note of a statement for one logical shard, given by number, that may write.

        Args:
            statement: any that is no SELECT of SQLAlchemy's.
            shard: the logical shard.
        """

    def send(self) -> None:
        """Write what is to be said with the commit; everything is flushed."""

    def prepare(self) -> None:
        """Do what has to be done before COMMIT, or prevent it; nothing is written after this."""

    def decide(self) -> None:
        """Make the commit hold, where COMMIT on one server does not."""

    def finish(self) -> None:
        """The commit holds. Raise nothing."""

    def settle(self, ending: Ending) -> None:
        """The transaction is over and its connections are returned; the next one may begin."""

    def began(self, savepoint: object) -> None:
        """A savepoint begins."""

    def undone(self, transaction: object) -> None:
        """Everything since a savepoint, or since the beginning, was rolled back."""


class Participants(Participant):
    """The participants of one session as one, in their order.

    Args:
        *members: in the order in which they take their turns before COMMIT.
    """

    def __init__(self, *members: Participant) -> None:
        self._members = members
        self._backwards = members[::-1]

    def flushing(self) -> None:
        """Tell all, in order."""
        for member in self._members:
            member.flushing()

    def flushed(self) -> None:
        """Tell all, in order."""
        for member in self._members:
            member.flushed()

    def written(self) -> None:
        """Tell all, in order."""
        for member in self._members:
            member.written()

    def writing(self, statement: Any, found: Sequence[Part]) -> None:
        """Tell all, in order."""
        for member in self._members:
            member.writing(statement, found)

    def said(self, statement: Any, shard: int) -> None:
        """Tell all, in order."""
        for member in self._members:
            member.said(statement, shard)

    def send(self) -> None:
        """Tell all, in order."""
        for member in self._members:
            member.send()

    def prepare(self) -> None:
        """Tell all, in order."""
        for member in self._members:
            member.prepare()

    def decide(self) -> None:
        """Tell all, in order."""
        for member in self._members:
            member.decide()

    def finish(self) -> None:
        """Tell all, the last one first."""
        for member in self._backwards:
            member.finish()

    def settle(self, ending: Ending) -> None:
        """Tell all, the last one first."""
        for member in self._backwards:
            member.settle(ending)

    def began(self, savepoint: object) -> None:
        """Tell all, in order."""
        for member in self._members:
            member.began(savepoint)

    def undone(self, transaction: object) -> None:
        """Tell all, in order."""
        for member in self._members:
            member.undone(transaction)
