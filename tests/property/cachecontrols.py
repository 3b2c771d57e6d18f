"""Seven well-known cache protocols, as machines that the model checker runs beside our own.

Each of them shows something old for ever under some interleaving or fault. If the checker did
not find it, the checker would be broken. They have the faces of `Writer` and `Reader`.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple

from shardkit.caching.operations import (
    Answer,
    Cas,
    Entry,
    Kind,
    Op,
    Outcome,
    Request,
    apply,
)
from shardkit.caching.reader import Source

NAMES = {
    "P1": "cache-aside: delete after commit, reader SET",
    "P2": "blind write-through SET",
    "P3": "delete after commit, reader ADD",
    "P4": "set-if-newer, absent = store",
    "P5": "fill lease + delete",
    "P6": "tombstone + CAS",
    "P7": "lease + versioned write-through",
}


class Other(IntEnum):
    """What these ask of a server besides our operations."""

    ADD = 10  # write if there is no entry
    NEWER = 11  # write unless there is a value of this version or a later one


def carry_out(entry: Entry | None, request: Request, fresh: Cas) -> tuple[Entry | None, Answer]:
    """Return what becomes of an entry, and the answer."""
    op: Any = request.op
    if op in (Other.ADD, Other.NEWER):
        is_newer = op is Other.NEWER and entry is not None and entry.version < request.version
        if entry is None or is_newer:
            return apply(entry, request._replace(op=Op.PUT), fresh)
        return entry, Answer(Outcome.DIFFERS)
    return apply(entry, request, fresh)


class ControlWriter(NamedTuple):
    """Writes after COMMIT only."""

    protocol: str
    key: str
    version: int
    payload: bytes | None
    step: int = 0  # 0 waits for COMMIT, 1 first operation, 2 second, 3 done
    previous: None = None

    @property
    def is_ready(self) -> bool:
        return self.step == 0

    @property
    def is_done(self) -> bool:
        return self.step == 3

    @property
    def request(self) -> Request | None:
        if self.step not in {1, 2}:
            return None
        value = Request(Op.PUT, self.key, None, Kind.VALUE, self.version, self.payload or b"")
        if self.protocol in {"P1", "P3", "P5"} or self.payload is None:
            return Request(Op.DELETE, self.key)
        if self.protocol == "P4":
            other: Any = Other.NEWER
            return value._replace(op=other)
        if self.protocol == "P6":
            return value._replace(kind=Kind.MARKER, payload=b"")
        if self.protocol == "P7" and self.step == 1:
            return Request(Op.READ, self.key)
        return value

    def advance(self, answer: Answer) -> ControlWriter:
        if self.protocol == "P7" and self.step == 1:
            has = answer.outcome is Outcome.FOUND and answer.kind is Kind.VALUE
            if not (has and answer.version >= self.version):
                return self._replace(step=2)
        return self._replace(step=3)

    def committed(self) -> ControlWriter:
        return self._replace(step=1)

    def rolled_back(self) -> ControlWriter:
        return self._replace(step=3)


class ControlReader(NamedTuple):
    """Reads, and fills on a miss, without leases."""

    protocol: str
    key: str
    step: int = 0  # 0 asks, 1 loads, 2 fills, 3 done
    cas: Cas = None
    source: Source | None = None
    kind: Kind = Kind.VALUE
    version: int = 0
    payload: bytes = b""

    @property
    def is_done(self) -> bool:
        return self.step == 3

    @property
    def must_load(self) -> bool:
        return self.step == 1

    @property
    def request(self) -> Request | None:
        if self.step == 0:
            return Request(Op.READ, self.key)
        if self.step != 2:
            return None
        value = Request(Op.PUT, self.key, self.cas, self.kind, self.version, self.payload)
        if self.protocol == "P6" and self.cas is not None:
            return value._replace(op=Op.STORE)
        other: Any = {"P3": Other.ADD, "P6": Other.ADD, "P4": Other.NEWER}.get(
            self.protocol, Op.PUT
        )
        return value._replace(op=other)

    def advance(self, answer: Answer) -> ControlReader:
        if self.step == 2:
            return self._replace(step=3)
        if answer.outcome is Outcome.FOUND and answer.kind in {Kind.VALUE, Kind.ABSENCE}:
            return self._replace(step=3, source=Source.CACHE, **_row(answer))
        if answer.outcome is Outcome.UNKNOWN:
            return self._replace(step=3, source=Source.DATABASE)
        return self._replace(step=1, cas=answer.cas)

    def loaded(self, version: int, payload: bytes | None) -> ControlReader:
        kind = Kind.ABSENCE if payload is None else Kind.VALUE
        return self._replace(
            step=2, source=Source.DATABASE, kind=kind, version=version, payload=payload or b""
        )


def _row(answer: Answer) -> dict[str, Any]:
    return {"kind": answer.kind, "version": answer.version, "payload": answer.payload}
