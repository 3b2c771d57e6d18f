"""What clients did and were told, as lines of JSON: the format of a history.

A history is a folder with one file for each client process. The first line of a file says who
wrote it; then each operation is a line before it is begun and another when its answer is known:

    {"history": 1, "process": "client-3", "clock": "6f1c…"}
    {"type": "invoke", "n": 7, "at": 81230000, "kind": "append", "do": [["append", "k1", 5], …], …}
    {"type": "ok", "n": 7, "at": 81290000, "got": [[3, 5]], …}
    {"type": "fact", "at": 81300000, "fact": "fault", "name": "kill alpha", …}
    {"type": "end", "at": 99900000}

`at` is the machine's monotonic clock in nanoseconds, which processes of one machine share. Answers
are `ok`, `fail` (it certainly did not happen) and `info` (nobody knows); an operation without an
answer is unknown too. What else a line says is kept: `shard`, `endpoint`, `role`, `level`,
`session`, `token`, `stamp`, `deadline`, `final` (docs/testing.md has the table of kinds).

Source: the words are those of Jepsen's histories; the last line of a killed process may be torn.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any, Final

__all__ = ["FORMAT", "Fact", "HistoryError", "Operation", "Outcome", "files", "find", "read_file"]

FORMAT: Final = 1
Fact = Mapping[str, Any]
"""Something that is no operation: a fault, what was left behind, what a schema looked like."""


class HistoryError(Exception):
    """The files are no history: nothing can be said of what they hold."""


class Outcome(IntEnum):
    """What the client knows of an operation."""

    UNKNOWN = 0  # it may have happened, may still happen, or not
    OK = 1
    FAIL = 2  # it certainly did not happen and never will


class Operation:
    """One operation of one client.

    Attributes:
        process: the client.
        n: number of the operation in its process.
        kind: which judge it is for.
        do: what was asked.
        got: what was answered; None unless it is OK.
        invoked: when it was begun, in nanoseconds.
        answered: when the client was told, in nanoseconds; None if never.
        outcome: what it was told.
        more: everything else that its two lines say.
    """

    __slots__ = ("answered", "do", "got", "invoked", "kind", "more", "n", "outcome", "process")

    def __init__(
        self,
        process: str,
        n: int,
        kind: str,
        do: list[Any],
        got: Any,
        invoked: int,
        answered: int | None,
        outcome: Outcome,
        more: dict[str, Any],
    ) -> None:
        self.process = process
        self.n = n
        self.kind = kind
        self.do = do
        self.got = got
        self.invoked = invoked
        self.answered = answered
        self.outcome = outcome
        self.more = more

    def __repr__(self) -> str:
        return f"<{self.process} #{self.n} {self.kind} {self.do} {self.outcome.name} {self.got}>"


_BEGUN: Final = frozenset(("at", "kind", "do"))
_OUTCOMES: Final = {"ok": Outcome.OK, "fail": Outcome.FAIL, "info": Outcome.UNKNOWN}


def files(folder: Path) -> list[Path]:
    """Return the files of a history, in order of name.

    Raises:
        HistoryError: there are none.
    """
    found = sorted(folder.glob("*.jsonl")) if folder.is_dir() else []
    if not found:
        raise HistoryError(f"{folder}: no *.jsonl files; a recorder writes one for each process")
    return found


def read_file(path: Path) -> Iterator[dict[str, Any] | Operation]:
    """Yield the first line, then operations as they are answered and facts, then what is pending.

    A last line that is torn or has no end was being written when the process was killed: what it
    would have said is not known, so its operation is pending.

    Raises:
        HistoryError: with file and line, for anything else that is no history.
    """
    pending: dict[int, dict[str, Any]] = {}
    process, last = "", 0
    for number, line in _lines(path):
        try:
            kind = line["type"] if number > 1 else "first"
            if kind == "invoke":
                n = line["n"]
                if n <= last:
                    raise HistoryError(f"{path.name}:{number}: operation {n} after {last}")
                last, pending[n] = n, line
                if not line.keys() >= _BEGUN:
                    raise KeyError(*_BEGUN - line.keys())
            elif kind in _OUTCOMES:
                yield _operation(process, pending.pop(line["n"]), line)
            elif kind in {"fact", "end"}:
                yield line
            elif kind == "first":
                if line["history"] != FORMAT:
                    raise HistoryError(f"{path.name}: format {line['history']}, not {FORMAT}")
                process = line["process"]
                yield line
            else:
                raise HistoryError(f"{path.name}:{number}: no line is of type {kind!r}")
        except (KeyError, TypeError) as error:
            raise HistoryError(f"{path.name}:{number}: lacks {error} or answers nothing") from error
    for line in pending.values():
        yield _operation(process, line, None)


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    loads = json.loads
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return  # torn: only the last line can lack its end
            try:
                yield number, loads(line)
            except ValueError as error:
                raise HistoryError(f"{path.name}:{number}: not JSON: {line[:80]!r}") from error


_OWN: Final = frozenset(("type", "n", "at", "kind", "do", "got"))


def _operation(process: str, begun: dict[str, Any], told: dict[str, Any] | None) -> Operation:
    more = {word: value for word, value in begun.items() if word not in _OWN}
    outcome, got, answered = Outcome.UNKNOWN, None, None
    if told is not None:
        outcome, got, answered = _OUTCOMES[told["type"]], told.get("got"), told["at"]
        if len(told) > 4 or got is None:
            more |= {word: value for word, value in told.items() if word not in _OWN}
    return Operation(
        process, begun["n"], begun["kind"], begun["do"], got, begun["at"], answered, outcome, more
    )


def find(folder: Path, wanted: set[tuple[str, int]]) -> dict[tuple[str, int], Operation]:
    """Read some operations again, by process and number: reports tell of few among millions."""
    processes, found = {process for process, _ in wanted}, {}
    for path in files(folder):
        records = read_file(path)
        first = next(records, None)
        if not isinstance(first, dict) or first["process"] not in processes:
            continue
        for record in records:
            if isinstance(record, Operation) and (record.process, record.n) in wanted:
                found[record.process, record.n] = record
    return found
