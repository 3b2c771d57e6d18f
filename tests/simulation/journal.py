"""Records what simulated clients do as the operations that judges read, without files."""

from __future__ import annotations

from typing import Any

from tests.history.records import Operation, Outcome
from tests.simulation.scheduler import Simulation

__all__ = ["Journal"]


class Journal:
    """The history of a simulation.

    Attributes:
        records: first lines, operations and facts, as a reader of files yields them.
    """

    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation
        self.records: list[dict[str, Any] | Operation] = []
        self._numbers: dict[str, int] = {}

    def invoke(self, process: str, kind: str, do: list[Any], **more: Any) -> Operation:
        """Note that an operation begins; it is of unknown outcome until more is said."""
        n = self._numbers[process] = self._numbers.get(process, 0) + 1
        if n == 1:
            self.records.append({"history": 1, "process": process, "clock": "virtual"})
        at = self.simulation.nanoseconds()
        op = Operation(process, n, kind, do, None, at, None, Outcome.UNKNOWN, more)
        self.records.append(op)
        self.simulation.say(process, f"{kind} {do} begins")
        return op

    def ok(self, op: Operation, got: Any = None, **more: Any) -> None:
        """Note that it happened."""
        self._answer(op, Outcome.OK, more)
        op.got = got

    def fail(self, op: Operation, **more: Any) -> None:
        """Note that it did not and will not happen."""
        self._answer(op, Outcome.FAIL, more)

    def unknown(self, op: Operation, **more: Any) -> None:
        """Note that nobody knows."""
        self._answer(op, Outcome.UNKNOWN, more)

    def fact(self, fact: str, **more: Any) -> None:
        """Note something that is no operation."""
        at = self.simulation.nanoseconds()
        self.records.append({"type": "fact", "at": at, "fact": fact, **more})

    def _answer(self, op: Operation, outcome: Outcome, more: dict[str, Any]) -> None:
        op.outcome, op.answered = outcome, self.simulation.nanoseconds()
        op.more = op.more | more
        self.simulation.say(op.process, f"{op.kind} {op.do} {outcome.name} {op.got}")
