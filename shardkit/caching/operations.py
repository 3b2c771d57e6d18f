"""What is asked of a cache server about one key, and what it may answer.

The machines of `shardkit.cache` make requests and are given answers; the backends of
`shardkit.caches` carry requests out, many in one round trip. `apply` says what a server that is
in order does with each: the memory backend runs it, the model checker searches it, and one suite
of tests compares every other backend with it.
"""

from __future__ import annotations

from collections.abc import Hashable
from enum import IntEnum
from typing import Final, NamedTuple

__all__ = ["UNKNOWN", "Answer", "Cas", "Entry", "Kind", "Op", "Outcome", "Request", "apply"]

Cas = Hashable
"""Names one state of one entry. Never used again for another state, also not after a restart:
Memcached's own counter begins anew then, so its backend adds which life of the server it is."""


class Kind(IntEnum):
    """What an entry is."""

    VALUE = 0  # the row as of a version
    ABSENCE = 1  # "no such row"; has version 0 and a short life
    MARKER = 2  # a writer intends this version; the payload is the previous value, or empty
    LEASE = 3  # somebody is filling it
    GARBAGE = 4  # bytes that nobody of us wrote


class Op(IntEnum):
    """What a server is asked to do; every one is atomic there."""

    LEASE = 0  # read the entry; if there is none, make a lease and say so
    READ = 1  # read the entry
    PUT = 2  # write an entry over whatever is there; markers only
    STORE = 3  # write an entry if the present one is the one named by `cas`
    REMOVE = 4  # delete the entry if it is the one named by `cas`
    DELETE = 5  # delete the entry


class Outcome(IntEnum):
    """How a request ended."""

    FOUND = 0  # LEASE, READ: there is an entry
    WON = 1  # LEASE: there was none; the lease is the caller's
    NOTHING = 2  # READ: there is none
    DONE = 3  # PUT, STORE, REMOVE, DELETE; also a DELETE of nothing
    DIFFERS = 4  # STORE, REMOVE: there is another entry, or none
    UNKNOWN = 5  # no answer: it may have happened, may still happen, or not


class Request(NamedTuple):
    """One operation on one key.

    Attributes:
        op: what to do.
        key: of the entry.
        cas: which state of it, for STORE and REMOVE.
        kind: of the entry to write.
        version: of the entry to write.
        payload: of the entry to write.
        ttl: seconds that what is written lives; for LEASE, the lease.
    """

    op: Op
    key: str
    cas: Cas = None
    kind: Kind = Kind.VALUE
    version: int = 0
    payload: bytes = b""
    ttl: float = 0.0


class Answer(NamedTuple):
    """How it ended, and the entry for FOUND.

    Attributes:
        outcome: how it ended.
        cas: names the entry that was found or written; None when there is none.
        kind: of the entry found.
        version: of the entry found.
        payload: of the entry found.
    """

    outcome: Outcome
    cas: Cas = None
    kind: Kind = Kind.VALUE
    version: int = 0
    payload: bytes = b""


UNKNOWN: Final = Answer(Outcome.UNKNOWN)
_NOTHING: Final = Answer(Outcome.NOTHING)
_DIFFERS: Final = Answer(Outcome.DIFFERS)


class Entry(NamedTuple):
    """What a server holds under a key."""

    cas: Cas
    kind: Kind
    version: int
    payload: bytes


def apply(entry: Entry | None, request: Request, fresh: Cas) -> tuple[Entry | None, Answer]:
    """Return what becomes of an entry, and the answer.

    Args:
        entry: the present one, or None.
        request: what is asked.
        fresh: names the entry if one is written.
    """
    op = request.op
    if op is Op.LEASE and entry is None:
        return Entry(fresh, Kind.LEASE, 0, b""), Answer(Outcome.WON, fresh)
    if op is Op.LEASE or op is Op.READ:
        return entry, _NOTHING if entry is None else Answer(Outcome.FOUND, *entry)
    if op is Op.DELETE:
        return None, Answer(Outcome.DONE)
    if op is not Op.PUT and (entry is None or entry.cas != request.cas):
        return entry, _DIFFERS
    if op is Op.REMOVE:
        return None, Answer(Outcome.DONE)
    written = Entry(fresh, request.kind, request.version, request.payload)
    return written, Answer(Outcome.DONE, fresh)
