"""Transactions that append to lists and read them: what was seen of each list, kept small.

A list to which unique values are only ever appended tells its own history: whoever reads it reads
the order of all writes before. So the longest list that anybody read is the order of versions of
its key, every other read has to be a prefix of it, and of a read nothing has to be kept but its
length. That is what lets a million transactions fit into memory.

Operations are of kind `append`; `do` is a list of `["append", key, value]` and `["read", key]`,
`got` has the list that each read returned, in their order.

Source: Kingsbury & Alvaro, "Elle: Inferring Isolation Anomalies from Experimental Observations",
VLDB 2020, sections 3 and 4.3 (traceability and recoverability of lists).
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable
from typing import Any, Final

from tests.history.findings import Ref
from tests.history.records import HistoryError, Operation, Outcome

__all__ = ["FOREVER", "OK", "REPLICA", "SERIALIZABLE", "SNAPSHOT", "Appends", "Key"]

FOREVER: Final = (1 << 63) - 1
OK: Final = 1
FAIL: Final = 2
SNAPSHOT: Final = 4  # all its reads are of one snapshot
REPLICA: Final = 8
SERIALIZABLE: Final = 16
_LEVELS: Final = {
    "read committed": 0,
    "repeatable read": SNAPSHOT,
    "serializable": SNAPSHOT | SERIALIZABLE,
}


class Key:
    """One list.

    Attributes:
        name: of it.
        order: the longest list that was read: the versions, in order.
        reader: the transaction that read it.
        writers: transaction by value.
        readers: transactions that read a prefix of it, own values left out.
        lengths: how much of it each read.
        passing: values after which their transaction appended another.
        odd: reads that are no prefix of one another: transaction and list.
    """

    __slots__ = ("lengths", "name", "odd", "order", "passing", "reader", "readers", "writers")

    def __init__(self, name: Hashable) -> None:
        self.name = name
        self.order: list[Any] = []
        self.reader = -1
        self.writers: dict[Any, int] = {}
        self.readers = array("i")
        self.lengths = array("i")
        self.passing: set[Any] = set()
        self.odd: list[tuple[int, list[Any]]] = []

    def agreed(self) -> int:
        """Return how many versions all reads agree on; beyond it a length says nothing."""
        n = len(self.order)
        for _, read in self.odd:
            n = min(n, len(read))
            while self.order[:n] != read[:n]:
                n -= 1
        return n


class Appends:
    """All transactions of a history, by number.

    Attributes:
        invoked: when each was begun, in nanoseconds.
        answered: when each was known to have committed; `FOREVER` if it never was.
        flags: OK or FAIL or neither, and what it was promised.
        keys: the lists.
        n_appends: values that were to be appended.
        n_reads: lists that were read.
        internal: transactions whose reads contradict what they did before: number and text.
        sessions: what sessions saw: session, transaction, key, length of a read or None, value.
    """

    def __init__(self) -> None:
        self.invoked = array("q")
        self.answered = array("q")
        self.flags = bytearray()
        self.keys: dict[Any, Key] = {}
        self.n_appends = 0
        self.n_reads = 0
        self.internal: list[tuple[int, str]] = []
        self.sessions: list[tuple[str, int, Key, int | None, Any]] = []
        self._processes: dict[str, int] = {}
        self._names: list[str] = []
        self._process = array("i")
        self._n = array("q")

    def __len__(self) -> int:
        return len(self.flags)

    def ref(self, t: int) -> Ref:
        """Name the operation of a transaction."""
        return self._names[self._process[t]], self._n[t]

    def process_of(self, t: int) -> int:
        """Return the number of the process that ran a transaction."""
        return self._process[t]

    def add(self, op: Operation) -> None:
        """Take in one operation of kind `append`.

        Raises:
            HistoryError: a value is appended to one key by two operations, or an answer does not
                fit the question.
        """
        t = len(self.flags)
        number = self._processes.get(op.process)
        if number is None:
            number = self._processes[op.process] = len(self._names)
            self._names.append(op.process)
        self._process.append(number)
        self._n.append(op.n)
        self.invoked.append(op.invoked)
        if op.outcome is Outcome.OK:
            self.answered.append(op.answered or op.invoked)
            self.flags.append(OK | self._promised(op))
            self._committed(t, op)
        else:
            self.answered.append(FOREVER)
            self.flags.append(FAIL if op.outcome is Outcome.FAIL else 0)
            for mop in op.do:
                if mop[0] == "append":
                    self._append(t, op, mop, {})

    def _promised(self, op: Operation) -> int:
        more = op.more
        if not more:
            return SNAPSHOT if len(op.do) == 1 and op.do[0][0] == "read" else 0
        try:
            flags = _LEVELS[more.get("level", "read committed")]
        except KeyError as error:
            raise HistoryError(f"{op!r}: no level is called {error}") from None
        if more.get("role") == "replica":
            flags |= REPLICA
        if len(op.do) == 1 and op.do[0][0] == "read":
            flags |= SNAPSHOT  # one statement has one snapshot at every level
        return flags

    def _key(self, name: Hashable) -> Key:
        key = self.keys.get(name)
        if key is None:
            key = self.keys[name] = Key(name)
        return key

    def _append(self, t: int, op: Operation, mop: list[Any], mine: dict[Key, list[Any]]) -> None:
        key, value = self._key(mop[1]), mop[2]
        if value in key.writers:
            raise HistoryError(f"{op!r}: {value!r} was to be appended to {key.name!r} before")
        key.writers[value] = t
        self.n_appends += 1
        before = mine.get(key)
        if before is None:
            mine[key] = [value]
        else:
            key.passing.add(before[-1])
            before.append(value)

    def _committed(self, t: int, op: Operation) -> None:
        mine: dict[Key, list[Any]] = {}
        seen: dict[Key, int] = {}
        got = op.got or ()
        session = op.more.get("session")
        at = 0
        for mop in op.do:
            if mop[0] == "append":
                self._append(t, op, mop, mine)
                if session is not None:
                    self.sessions.append((session, t, self.keys[mop[1]], None, mop[2]))
                continue
            if mop[0] != "read" or at >= len(got):
                raise HistoryError(f"{op!r}: {len(got)} answers, and {mop} is to be answered")
            key, read = self._key(mop[1]), got[at]
            at += 1
            self.n_reads += 1
            self._read(t, key, read)
            n = len(read)
            own = mine.get(key)
            if own is not None:
                n -= len(own)
                if n < 0 or read[n:] != own:
                    text = f"read {key.name} as {read} after it had appended {own}"
                    self.internal.append((t, text))
                    continue
            if n != seen.setdefault(key, n) and self.flags[t] & SNAPSHOT:
                text = f"read {key.name} with {seen[key]} and with {n} values of others"
                self.internal.append((t, text))
            key.readers.append(t)
            key.lengths.append(n)
            if session is not None:
                self.sessions.append((session, t, key, len(read), None))

    def _read(self, t: int, key: Key, read: list[Any]) -> None:
        order = key.order
        n = len(order)
        if len(read) > n:
            if read[:n] != order:
                key.odd.append((key.reader, order))
            # The longer one is the order: it has more to say of what others read.
            key.order, key.reader = read, t
        elif order[: len(read)] != read:
            key.odd.append((t, read))
