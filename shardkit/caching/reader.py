"""Reads one row through the cache, and fills it on a miss."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from shardkit.caching.entries import uncarried
from shardkit.caching.lives import DEFAULT_LIVES, DEFAULT_PATIENCE, Lives, Patience
from shardkit.caching.operations import Answer, Cas, Kind, Op, Outcome, Request
from shardkit.caching.repair import Phase

__all__ = ["Reader", "Source"]


class Source(IntEnum):
    """Where a reader has its row from."""

    CACHE = 0
    DATABASE = 1


class Reader(NamedTuple):
    """Reads one row through the cache, and fills it on a miss.

    Drive it until it `is_done` or `must_load`. To load: read the row from the primary, in a
    statement that starts now and sees nothing uncommitted, and say `loaded`; when that is
    impossible (an older snapshot, own changes, a failed statement), say `not_loaded`.

    Attributes:
        key: of the entry.
        floor: least version that the session may be shown.
        lives: how long entries live.
        patience: how long it waits for others.
        phase: ASK, REMOVE, LOAD, FILL or DONE.
        marked: times it met a marker.
        leased: times it met the lease of another.
        cas: of the lease it holds, or of the garbage it removes.
        source: where the row is from, once DONE.
        kind: VALUE, or ABSENCE when there is no such row, once DONE.
        version: of the row.
        payload: the row, encoded.

    *Invariant:* it stores only on a lease that it won before it read the database.
    """

    key: str
    floor: int = 0
    lives: Lives = DEFAULT_LIVES
    patience: Patience = DEFAULT_PATIENCE
    phase: Phase = Phase.ASK
    marked: int = 0
    leased: int = 0
    cas: Cas = None
    source: Source | None = None
    kind: Kind = Kind.VALUE
    version: int = 0
    payload: bytes = b""

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to ask."""
        return self.phase is Phase.DONE

    @property
    def must_load(self) -> bool:
        """Whether the row has to come from the database."""
        return self.phase is Phase.LOAD

    @property
    def holds_lease(self) -> bool:
        """Whether others wait for this one."""
        return self.phase is Phase.LOAD and self.cas is not None

    @property
    def pause(self) -> float:
        """Longest time to wait before the next request, in seconds; draw from zero to it."""
        n = self.marked + self.leased
        if self.phase is not Phase.ASK or n == 0:
            return 0.0
        return min(self.patience.longest, self.patience.first * 2.0 ** min(n - 1, 16))

    @property
    def request(self) -> Request | None:
        """What to ask next, or None when it has to load or is done."""
        phase = self.phase
        if phase is Phase.ASK:
            return Request(Op.LEASE, self.key, ttl=self.lives.marker)
        if phase is Phase.REMOVE:
            return Request(Op.REMOVE, self.key, self.cas)
        if phase is Phase.FILL:
            is_row = self.kind is Kind.VALUE
            ttl = self.lives.value if is_row else self.lives.absence
            return Request(Op.STORE, self.key, self.cas, self.kind, self.version, self.payload, ttl)
        return None

    def advance(self, answer: Answer) -> Reader:
        """Return the machine after an answer to its request."""
        if self.phase is Phase.ASK:
            if answer.kind is Kind.VALUE and answer.outcome is Outcome.FOUND:  # nearly always
                return self._shown(answer)
            return self._asked(answer)
        if self.phase is Phase.FILL:  # stored, or somebody was quicker: the row is good
            return self._replace(phase=Phase.DONE, cas=None)
        if self.phase is Phase.REMOVE:
            after = Phase.DONE if self.source is Source.DATABASE else Phase.LOAD
            return self._replace(phase=after, cas=None)
        raise ValueError(f"no answer is expected in phase {self.phase.name}")

    def _asked(self, answer: Answer) -> Reader:
        outcome = answer.outcome
        if outcome is Outcome.FOUND:
            return self._found(answer)
        if outcome is Outcome.WON:
            return self._replace(phase=Phase.LOAD, cas=answer.cas)
        return self._replace(phase=Phase.LOAD)

    def loaded(self, version: int, payload: bytes | None) -> Reader:
        """Return the machine after the database answered; a payload of None is no such row."""
        phase = Phase.DONE if self.cas is None else Phase.FILL
        return self._replace(
            phase=phase,
            source=Source.DATABASE,
            kind=Kind.ABSENCE if payload is None else Kind.VALUE,
            version=0 if payload is None else version,
            payload=payload or b"",
        )

    def not_loaded(self) -> Reader:
        """Return the machine after a load that may not be stored; it gives up its lease."""
        phase = Phase.DONE if self.cas is None else Phase.REMOVE
        return self._replace(phase=phase, source=Source.DATABASE)

    def rejected(self) -> Reader:
        """Return the machine after the caller could not decode the payload from the cache."""
        return self._replace(phase=Phase.REMOVE, source=None, version=0, payload=b"")

    def _found(self, entry: Answer) -> Reader:
        kind = entry.kind
        if kind is Kind.VALUE:
            return self._shown(entry)
        if kind is Kind.ABSENCE:
            if self.floor > 0:  # the session has written the row
                return self._replace(phase=Phase.LOAD)
            done = self._replace(phase=Phase.DONE, source=Source.CACHE, kind=kind, cas=entry.cas)
            return done._replace(payload=entry.payload)  # empty, but in the model
        if kind is Kind.MARKER:
            if len(entry.payload) >= 8:  # see `Writer.replaces`
                version, payload = uncarried(entry.payload)
                if version >= self.floor:
                    return self._shown(entry._replace(version=version, payload=payload))
            again = self.marked < self.patience.markers
            return self._replace(marked=self.marked + 1) if again else self._gave_up()
        if kind is Kind.LEASE:
            again = self.leased < self.patience.leases
            return self._replace(leased=self.leased + 1) if again else self._gave_up()
        return self._replace(phase=Phase.REMOVE, cas=entry.cas)

    def _shown(self, entry: Answer) -> Reader:
        if entry.version < self.floor:
            return self._replace(phase=Phase.LOAD)
        # All fields in their order: `_replace` would be a tenth of a hit.
        return Reader(
            self.key,
            self.floor,
            self.lives,
            self.patience,
            Phase.DONE,
            self.marked,
            self.leased,
            entry.cas,
            Source.CACHE,
            Kind.VALUE,
            entry.version,
            entry.payload,
        )

    def _gave_up(self) -> Reader:
        return self._replace(phase=Phase.LOAD, cas=None)
