"""Histories by hand, for tests: one call for each operation, times as they come."""

from __future__ import annotations

from typing import Any

from tests.history.findings import Verdict
from tests.history.judge import DEFAULT, Limits, judge
from tests.history.ledger import Ledger
from tests.history.records import Operation, Outcome

__all__ = ["Script"]


class Script:
    """A history that is written down operation by operation.

    Times are milliseconds; an operation without times takes one, after all before it.
    """

    def __init__(self) -> None:
        self.records: list[dict[str, Any] | Operation] = []
        self.now = 0
        self._numbers: dict[str, int] = {}

    def op(
        self,
        process: str,
        kind: str,
        do: list[Any],
        got: Any = None,
        *,
        at: tuple[int, int | None] | None = None,
        outcome: Outcome = Outcome.OK,
        **more: Any,
    ) -> Operation:
        """Add an operation; `at` is when it was begun and answered."""
        n = self._numbers[process] = self._numbers.get(process, 0) + 1
        if n == 1:
            self.records.append({"history": 1, "process": process, "clock": "hand"})
        begun, ended = at or (self.now + 1, self.now + 2)
        self.now = max(self.now, begun, ended or 0)
        answered = None if ended is None else ended * 1_000_000
        op = Operation(process, n, kind, do, got, begun * 1_000_000, answered, outcome, more)
        self.records.append(op)
        return op

    def txn(self, process: str, *steps: Any, **more: Any) -> Operation:
        """Add a transaction on lists: `("x", 1)` appends, `("x", [1])` reads."""
        do: list[Any] = []
        got: list[Any] = []
        for key, value in steps:
            if isinstance(value, list):
                do.append(["read", key])
                got.append(value)
            else:
                do.append(["append", key, value])
        more.setdefault("level", "repeatable read")
        return self.op(process, "append", do, got, **more)

    def fact(self, fact: str, **more: Any) -> None:
        """Add a fact."""
        self.records.append({"type": "fact", "at": self.now, "fact": fact, **more})

    def ledger(self) -> Ledger:
        """Return it as judges read it."""
        return Ledger.of(self.records)

    def judged(self, name: str, limits: Limits = DEFAULT) -> Verdict:
        """Return what one judge says."""
        return judge(self.ledger(), limits)[name]

    def found(self, name: str, limits: Limits = DEFAULT) -> list[str]:
        """Return the names of what one judge finds, allowed or not."""
        return sorted(self.judged(name, limits).totals)
