"""Writes one row through the cache, around the COMMIT that changes it."""

from __future__ import annotations

from typing import NamedTuple

from shardkit.caching.entries import carried
from shardkit.caching.lives import DEFAULT_LIVES, Lives
from shardkit.caching.operations import Answer, Cas, Kind, Op, Outcome, Request
from shardkit.caching.repair import Phase, Repair

__all__ = ["Writer"]


class Writer(NamedTuple):
    """Writes one row through, around the COMMIT of the transaction that changed it.

    Begin it while the row is locked and its version known, or before (`known`). Drive it until it
    `is_ready`, COMMIT, say how that ended (`committed`, `rolled_back` or `unknown`), and drive it
    until it `is_done`; only then acknowledge.

    Attributes:
        key: of the entry.
        version: that the row will have.
        payload: the row as it will be, encoded; None to leave no entry: the row is deleted, or
            its final contents are not known (triggers, a savepoint rolled back), or too large.
        lives: how long entries live.
        replaces: version that the change replaces, to let readers have the previous value from
            the cache until the writer has committed; None to send them to the database.
        phase: PEEK, MARK, READY, SETTLE, LOOK to DELETE while repairing, DONE.
        cas: of the marker; None when the server did not confirm it.
        previous: value for the marker to carry.
        repair: after SETTLE failed.
    """

    key: str
    version: int
    payload: bytes | None
    lives: Lives = DEFAULT_LIVES
    replaces: int | None = None
    phase: Phase = Phase.MARK
    cas: Cas = None
    previous: bytes | None = None
    repair: Repair | None = None

    @classmethod
    def begin(
        cls,
        key: str,
        version: int,
        payload: bytes | None,
        *,
        lives: Lives = DEFAULT_LIVES,
        replaces: int | None = None,
    ) -> Writer:
        """Return a writer that has asked nothing yet; see the attributes."""
        phase = Phase.MARK if replaces is None else Phase.PEEK
        return cls(key, version, payload, lives, replaces, phase)

    @property
    def is_ready(self) -> bool:
        """Whether COMMIT may be sent."""
        return self.phase is Phase.READY

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to ask."""
        return self.phase is Phase.DONE

    @property
    def is_clean(self) -> bool:
        """Whether the cache is known to hold nothing older; else the relay has to see to it."""
        return self.phase is Phase.DONE and (self.repair is None or self.repair.is_clean)

    @property
    def request(self) -> Request | None:
        """What to ask next, or None when it is ready or done."""
        phase = self.phase
        if self.repair is not None:
            return self.repair.request
        if phase is Phase.PEEK:
            return Request(Op.READ, self.key)
        if phase is Phase.MARK:
            marker = (Kind.MARKER, self.version, self.previous or b"", self.lives.marker)
            if self.previous is None:
                return Request(Op.PUT, self.key, None, *marker)
            return Request(Op.STORE, self.key, self.cas, *marker)
        if phase is Phase.SETTLE:
            if self.payload is None:
                return Request(Op.REMOVE, self.key, self.cas)
            value = (Kind.VALUE, self.version, self.payload, self.lives.value)
            return Request(Op.STORE, self.key, self.cas, *value)
        return None

    def advance(self, answer: Answer) -> Writer:
        """Return the machine after an answer to its request."""
        if self.repair is not None:
            return self._repairing(self.repair.advance(answer))
        outcome = answer.outcome
        if self.phase is Phase.PEEK:
            is_value = outcome is Outcome.FOUND and answer.kind is Kind.VALUE
            if not is_value or answer.version != self.replaces:
                return self._replace(phase=Phase.MARK)
            # Over that very value, so that a marker which arrives late, after the
            # acknowledgement, finds the value gone and does not show it again.
            return self._replace(phase=Phase.MARK, cas=answer.cas, previous=carried(answer))
        if self.phase is Phase.MARK:
            if outcome is Outcome.DIFFERS:  # the value is gone: a marker without it
                return self._replace(cas=None, previous=None)
            marker = answer.cas if outcome is Outcome.DONE else None
            return self._replace(phase=Phase.READY, cas=marker, previous=None)
        if self.phase is not Phase.SETTLE:
            raise ValueError(f"no answer is expected in phase {self.phase.name}")
        if outcome is Outcome.DONE:
            return self._replace(phase=Phase.DONE, cas=None)
        return self._repairing(Repair(self.key, self.version))

    def known(self, version: int, payload: bytes | None) -> Writer:
        """Return the machine of a row that is locked by now, whose marker was sent before.

        Begun with the least version that the change can have: one more than a version of the row
        that its transaction has read. Whoever repairs an older one may respect that marker, and
        nobody else. Should it get a lower one after all, as of an object that outlived a failover,
        somebody may have respected it wrongly, so nothing is stored.
        """
        return self._replace(version=version, payload=payload if version >= self.version else None)

    def committed(self) -> Writer:
        """Return the machine after a COMMIT that was confirmed."""
        if self.cas is None or self.phase is not Phase.READY:
            return self._repairing(Repair(self.key, self.version))
        return self._replace(phase=Phase.SETTLE)

    def rolled_back(self) -> Writer:
        """Return the machine after a transaction that certainly did not commit."""
        if self.cas is None or self.phase is not Phase.READY:
            return self._replace(phase=Phase.DONE, cas=None)
        return self._replace(phase=Phase.SETTLE, payload=None)

    def unknown(self) -> Writer:
        """Return the machine after a COMMIT whose answer was lost: the relay decides."""
        return self._replace(phase=Phase.DONE, cas=None)

    def _repairing(self, repair: Repair) -> Writer:
        return self._replace(phase=repair.phase, repair=repair, cas=None)
