"""Everything in a history, sorted by the judge it is for; made in one pass over the files."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, NamedTuple

from tests.history.appends import Appends
from tests.history.findings import Ref
from tests.history.records import Fact, HistoryError, Operation, Outcome, files, read_file

__all__ = ["KINDS", "Ledger", "Stamp", "Timings", "View"]

KINDS: Final = (
    "append", "register", "set", "bank", "name", "row", "emit", "deliver", "effects", "call",
)  # fmt: skip
"""What operations may be; `call` is for those that only have to end in time."""


class View(NamedTuple):
    """What a session wrote or was shown of a row.

    Attributes:
        session: the session, or the token's chain.
        key: of the row.
        version: that was written or shown; versions of a row grow.
        invoked: when that was asked for, in nanoseconds.
        answered: when it was answered, in nanoseconds.
        is_write: whether it was written.
        is_cached: whether a cache answered.
        ref: the operation.
    """

    session: str
    key: Any
    version: int
    invoked: int
    answered: int
    is_write: bool
    is_cached: bool
    ref: Ref


class Stamp(NamedTuple):
    """What a database said of itself in a row that it wrote.

    Attributes:
        shard: the logical shard.
        system: system identifier and timeline.
        epoch: of ownership.
        invoked: when the write was begun, in nanoseconds.
        answered: when it was acknowledged, in nanoseconds.
        ref: the operation.
    """

    shard: int
    system: tuple[Any, Any]
    epoch: int
    invoked: int
    answered: int
    ref: Ref


class Timings:
    """When each operation was begun and answered, and how long it was allowed to take.

    Attributes:
        invoked: in nanoseconds.
        answered: in nanoseconds; -1 for no answer.
        good: 1 for those that had the answer that was asked for, or an honest no.
        late: operations past their deadline: operation, seconds, deadline.
        pending: operations without an answer.
    """

    def __init__(self) -> None:
        self.invoked = array("q")
        self.answered = array("q")
        self.good = bytearray()
        self.n_deadlines = 0
        self.late: list[tuple[Ref, float, float]] = []
        self.pending: list[Ref] = []

    def add(self, op: Operation) -> None:
        """Take in an operation of any kind."""
        self.invoked.append(op.invoked)
        self.answered.append(-1 if op.answered is None else op.answered)
        is_refused = op.outcome is Outcome.FAIL and op.more.get("is_refused") is True
        self.good.append(op.outcome is Outcome.OK or is_refused)
        if op.answered is None:
            self.pending.append((op.process, op.n))
        deadline = op.more.get("deadline")
        if deadline is not None:
            self.n_deadlines += 1
            seconds = ((op.answered or 0) - op.invoked) / 1e9
            if seconds > deadline + SLACK:
                self.late.append(((op.process, op.n), seconds, deadline))


SLACK: Final = 0.25
"""Seconds that a call may take beyond its deadline. Source: goal R9."""


class Ledger:
    """A history, taken in.

    Attributes:
        appends: transactions on lists.
        operations: operations of the kinds that are few or kept as they are, by kind.
        views: what sessions wrote and saw of rows.
        stamps: what databases said of themselves.
        minted: ids that the database gave, with who was given them.
        doubled: ids that were given twice.
        timings: of all operations.
        facts: by name, in order of time.
        processes: those that wrote a file.
        ended: those that ended by themselves.
        clocks: the clocks of the files.
        total: how many operations there are.
    """

    def __init__(self) -> None:
        self.appends = Appends()
        self.operations: dict[str, list[Operation]] = {}
        self.views: list[View] = []
        self.stamps: list[Stamp] = []
        self.minted: dict[Any, Ref] = {}
        self.doubled: list[tuple[Any, Ref, Ref]] = []
        self.timings = Timings()
        self.facts: dict[str, list[Fact]] = {}
        self.processes: list[str] = []
        self.ended: set[str] = set()
        self.clocks: set[str] = set()
        self.total = 0

    @classmethod
    def read(cls, folder: Path, *, tell: Callable[[int], None] = lambda _: None) -> Ledger:
        """Take in all files of a folder.

        Args:
            folder: of the history.
            tell: told after each file how many operations there are so far.

        Raises:
            HistoryError: the files are no history.
        """
        ledger = cls()
        for path in files(folder):
            for record in read_file(path):
                ledger.add(record)
            tell(ledger.total)
        ledger.sort_facts()
        return ledger

    @classmethod
    def of(cls, records: Iterable[dict[str, Any] | Operation]) -> Ledger:
        """Take in what a simulation recorded, of one clock."""
        ledger = cls()
        for record in records:
            ledger.add(record)
        ledger.sort_facts()
        return ledger

    @property
    def has_one_clock(self) -> bool:
        """Whether times of all processes can be compared."""
        return len(self.clocks) <= 1

    def sort_facts(self) -> None:
        """Put facts in the order of their times."""
        for facts in self.facts.values():
            facts.sort(key=lambda fact: fact.get("at", 0))

    def add(self, record: dict[str, Any] | Operation) -> None:
        """Take in one record.

        Raises:
            HistoryError: it is of no kind that is known.
        """
        if isinstance(record, Operation):
            self._add(record)
        elif record.get("type") == "fact":
            self.facts.setdefault(record["fact"], []).append(record)
        elif record.get("type") == "end":
            self.ended.add(self.processes[-1])
        else:
            if record["process"] in self.processes:
                raise HistoryError(f"two files are of process {record['process']}")
            self.processes.append(record["process"])
            self.clocks.add(record.get("clock", ""))

    def _add(self, op: Operation) -> None:
        self.total += 1
        self.timings.add(op)
        kind = op.kind
        if kind == "append":
            self.appends.add(op)
        elif kind == "row":
            self._view(op)
        elif kind not in KINDS:
            raise HistoryError(f"{op!r}: no kind; there are {', '.join(KINDS)}")
        elif kind != "call":
            self.operations.setdefault(kind, []).append(op)
        if op.more and op.outcome is Outcome.OK:
            self._extra(op)

    def _view(self, op: Operation) -> None:
        if op.outcome is Outcome.OK:
            assert op.answered is not None, "it is OK"
            verb, key = op.do[0], op.do[1]
            session = op.more.get("session", op.process)
            is_cached = op.more.get("source") == "cache"
            self.views.append(
                View(
                    session, key, op.got, op.invoked, op.answered, verb == "write", is_cached,
                    (op.process, op.n),
                )
            )  # fmt: skip

    def _extra(self, op: Operation) -> None:
        ref = (op.process, op.n)
        stamp = op.more.get("stamp")
        if stamp is not None:
            system, timeline, epoch = stamp
            assert op.answered is not None, "it is OK"
            where = (system, timeline)
            self.stamps.append(Stamp(op.more["shard"], where, epoch, op.invoked, op.answered, ref))
        for id_ in op.more.get("ids", ()):
            first = self.minted.setdefault(id_, ref)
            if first is not ref:
                self.doubled.append((id_, first, ref))
