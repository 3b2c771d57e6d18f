"""Removes what is older than a committed version: the machine that deletes and never writes."""

from __future__ import annotations

from enum import IntEnum
from typing import Final, NamedTuple

from shardkit.caching.operations import Answer, Cas, Kind, Op, Outcome, Request

__all__ = ["REPAIR_ROUNDS", "Phase", "Repair", "is_current"]

REPAIR_ROUNDS: Final = 4
"""How often a repair looks before it deletes without looking."""


class Phase(IntEnum):
    """Where a machine stands."""

    PEEK = 0  # writer: reads the value that its marker is to carry
    MARK = 1  # writer: writes its marker
    READY = 2  # writer: waits to hear how COMMIT ended
    SETTLE = 3  # writer: replaces its marker
    LOOK = 4  # repair: reads what is there
    REMOVE = 5  # repair: removes what is older; reader: removes garbage or gives up a lease
    DELETE = 6  # repair: deletes
    ASK = 7  # reader: asks for the entry or a lease
    LOAD = 8  # reader: waits for the row from the database
    FILL = 9  # reader: stores the row
    DONE = 10


class Repair(NamedTuple):
    """Sees to it that the cache holds nothing older than a version that is committed.

    Run by a writer whose marker was lost, and by the relay for every change.

    Attributes:
        key: of the entry.
        version: that is committed.
        phase: LOOK, REMOVE, DELETE or DONE.
        rounds: how often it has looked.
        cas: of the older entry that was found.
        is_clean: once DONE: whether that is so; False when the server did not answer.

    *Invariant:* it deletes and never writes, and a delete makes nothing stale.
    """

    key: str
    version: int
    phase: Phase = Phase.LOOK
    rounds: int = 0
    cas: Cas = None
    is_clean: bool = False

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to ask."""
        return self.phase is Phase.DONE

    @property
    def request(self) -> Request | None:
        """What to ask next, or None when it is done."""
        if self.phase is Phase.LOOK:
            return Request(Op.READ, self.key)
        if self.phase is Phase.REMOVE:
            return Request(Op.REMOVE, self.key, self.cas)
        if self.phase is Phase.DELETE:
            return Request(Op.DELETE, self.key)
        return None

    def advance(self, answer: Answer) -> Repair:
        """Return the machine after an answer to its request."""
        outcome = answer.outcome
        if self.phase is Phase.DELETE:
            return self._replace(phase=Phase.DONE, is_clean=outcome is Outcome.DONE, cas=None)
        if outcome is Outcome.UNKNOWN:
            return self._replace(phase=Phase.DELETE, cas=None)
        if self.phase is Phase.LOOK:
            if outcome is Outcome.NOTHING or is_current(answer, self.version):
                return self._replace(phase=Phase.DONE, is_clean=True)
            return self._replace(phase=Phase.REMOVE, rounds=self.rounds + 1, cas=answer.cas)
        if outcome is Outcome.DONE:
            return self._replace(phase=Phase.DONE, is_clean=True, cas=None)
        last = self.rounds >= REPAIR_ROUNDS
        return self._replace(phase=Phase.DELETE if last else Phase.LOOK, cas=None)


def is_current(found: Answer, version: int) -> bool:
    """Tell whether an entry cannot show or become anything older than a committed version.

    A value must not be older. A marker must be of a later writer, who had read what was committed
    before it wrote, and so will store, or leave behind, nothing older. A marker of this very
    version is removed: it may carry the previous value, and its writer may be dead.
    """
    if found.kind is Kind.VALUE:
        return found.version >= version
    return found.kind is Kind.MARKER and found.version > version
