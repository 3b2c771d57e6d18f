"""Judges a history: `python -m tests.history.judge DIR`.

Reads what the clients of a history test wrote, and says whether what happened to them is what was
promised. Prints what each judge looked at, and for each finding the reasoning and the lines of the
operations. Exit codes: 0 all is well, 1 something was found, 2 no history or wrong usage, 3 a
judge that was asked for, or whose operations are there, could check nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.history.findings import Finding, Ref, Verdict
from tests.history.k1 import judge_appends
from tests.history.k2 import judge_bank, judge_names, judge_registers, judge_sets
from tests.history.k3 import judge_caches, judge_sessions
from tests.history.k5 import judge_outbox
from tests.history.k6 import (
    judge_images,
    judge_leftovers,
    judge_liveness,
    judge_owners,
    judge_schemas,
    judge_secrets,
)
from tests.history.ledger import Ledger
from tests.history.records import Fact, HistoryError, Operation, find

__all__ = ["DEFAULT", "Limits", "judge", "main", "report", "vacuous"]


@dataclass(frozen=True)
class Limits:
    """What is promised in figures.

    Attributes:
        bound: seconds for which caches may show others less than what was acknowledged.
        within: seconds after the last fault from which operations succeed again.
        rate: share of them that does.
    """

    bound: float = 1.0
    within: float = 10.0
    rate: float = 0.999


DEFAULT: Final = Limits()
JUDGES: Final[Mapping[str, Callable[[Ledger, Limits], Verdict]]] = {
    "appends": lambda led, _: judge_appends(led.appends, has_one_clock=led.has_one_clock),
    "registers": lambda led, _: judge_registers(led),
    "sets": lambda led, _: judge_sets(led),
    "bank": lambda led, _: judge_bank(led),
    "names": lambda led, _: judge_names(led),
    "sessions": lambda led, _: judge_sessions(led),
    "caches": lambda led, limits: judge_caches(led, bound=limits.bound),
    "outbox": lambda led, _: judge_outbox(led),
    "images": lambda led, _: judge_images(led),
    "owners": lambda led, _: judge_owners(led),
    "schemas": lambda led, _: judge_schemas(led),
    "leftovers": lambda led, _: judge_leftovers(led),
    "secrets": lambda led, _: judge_secrets(led),
    "liveness": lambda led, limits: judge_liveness(led, within=limits.within, rate=limits.rate),
}
"""All judges, by the name that `--require` takes."""

_SHOWN: Final = 5
_AROUND: Final = 1_000_000_000
"""Nanoseconds before and after a finding in which faults are told of."""


def judge(ledger: Ledger, limits: Limits = DEFAULT) -> dict[str, Verdict]:
    """Return what every judge says, by name."""
    return {name: ask(ledger, limits) for name, ask in JUDGES.items()}


def vacuous(verdicts: Mapping[str, Verdict], required: Iterable[str] = ()) -> list[str]:
    """Return the judges that should have checked something and have not; all, if none has."""
    wanted = set(required)
    empty = [
        name
        for name, verdict in verdicts.items()
        if (verdict.is_concerned or name in wanted) and not verdict.has_checked
    ]
    others = [name for name in verdicts if name != "liveness"]
    if not any(verdicts[name].has_checked for name in others):
        return others
    return empty


def report(
    verdicts: Mapping[str, Verdict],
    found: Mapping[Ref, Operation],
    *,
    faults: Sequence[Fact] = (),
    most: int = _SHOWN,
) -> Iterable[str]:
    """Yield the lines that a human reads.

    Args:
        verdicts: of the judges.
        found: operations that findings name.
        faults: all of them; those around a finding are told with it.
        most: findings of one name to show.
    """
    for name, verdict in verdicts.items():
        if not verdict.is_concerned:
            continue
        counts = ", ".join(f"{n:,} {what}" for what, n in verdict.counts.items())
        n = verdict.violations
        word = "ok" if not n else f"{n:,} FOUND"
        yield f"{verdict.judge:4} {name:10} {word:9} {verdict.promise} ({counts})"
        for text in verdict.unchecked:
            yield f"       not checked: {text}"
        shown: dict[str, int] = {}
        for finding in verdict.findings:
            key = f"{finding.name}{finding.is_allowed}"
            shown[key] = shown.get(key, 0) + 1
            if shown[key] <= most and not finding.is_allowed:
                yield from _explained(finding, found, faults)
        for what, total in verdict.totals.items():
            yield f"       {total:,} of {what}"


def _explained(
    finding: Finding, found: Mapping[Ref, Operation], faults: Sequence[Fact]
) -> Iterable[str]:
    yield f"     ▸ {finding.name}: {finding.summary}"
    for line in finding.story:
        yield f"         {line}"
    ops = [found[ref] for ref in dict.fromkeys(finding.operations) if ref in found]
    for op in ops:
        more = " ".join(f"{word}={value}" for word, value in op.more.items())
        answered = "never" if op.answered is None else f"{op.answered / 1e9:.6f}"
        got = "" if op.got is None else f" → {_cut(json.dumps(op.got))}"
        yield (
            f"         {op.process} #{op.n} {op.kind} {_cut(json.dumps(op.do))} {op.outcome.name}"
            f"{got} [{op.invoked / 1e9:.6f} … {answered} s] {more}".rstrip()
        )
    if ops:
        since = min(op.invoked for op in ops) - _AROUND
        until = max(op.answered or op.invoked for op in ops) + _AROUND
        near = [
            fault
            for fault in faults
            if fault["began"] <= until and (fault.get("healed") or until) >= since
        ]
        for fault in near[:_SHOWN]:
            healed = fault.get("healed")
            end = "never" if healed is None else f"{healed / 1e9:.6f}"
            yield f"         meanwhile: {fault['name']} [{fault['began'] / 1e9:.6f} … {end} s]"


def _cut(text: str, most: int = 160) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge a folder and print the report; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.history.judge", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", action="store_true", help="one JSON document instead of text")
    parser.add_argument(
        "--require",
        default="",
        help=f"judges that must have checked something, by comma: {', '.join(JUDGES)}",
    )
    parser.add_argument("--bound", type=float, default=Limits.bound, help="K4, in seconds")
    parser.add_argument("--within", type=float, default=Limits.within, help="K11, in seconds")
    parser.add_argument("--rate", type=float, default=Limits.rate, help="K11, from 0 to 1")
    parser.add_argument("--most", type=int, default=_SHOWN, help="findings of one name to show")
    given = parser.parse_args(arguments)
    required = [name for name in given.require.split(",") if name]
    if unknown := set(required) - set(JUDGES):
        parser.error(f"no judge is called {', '.join(sorted(unknown))}")
    limits = Limits(given.bound, given.within, given.rate)
    began = time.process_time()
    gc.disable()  # millions of small objects that all stay: to look for garbage is a third of it
    try:
        ledger = Ledger.read(given.folder)
        verdicts = judge(ledger, limits)
    except HistoryError as error:
        print(json.dumps({"error": str(error)}) if given.json else error, file=sys.stderr)
        return 2
    seconds = time.process_time() - began
    empty = vacuous(verdicts, required)
    violations = sum(verdict.violations for verdict in verdicts.values())
    code = 1 if violations else 3 if empty else 0
    if given.json:
        document = {
            "operations": ledger.total,
            "processes": len(ledger.processes),
            "cpu_seconds": round(seconds, 3),
            "violations": violations,
            "checked_nothing": empty,
            "exit_code": code,
            "judges": {name: verdict.as_json() for name, verdict in verdicts.items()},
        }
        print(json.dumps(document, default=str))
        return code
    refs = {ref for v in verdicts.values() for each in v.findings for ref in each.operations}
    found = find(given.folder, refs) if refs else {}
    for line in report(verdicts, found, faults=ledger.facts.get("fault", ()), most=given.most):
        print(line)
    for name in empty:
        print(f"{name} has checked nothing: that is no proof of anything")
    n_processes = len(ledger.processes)
    print(
        f"{ledger.total:,} operations of {n_processes} processes in {seconds:.1f} s of CPU: ",
        end="",
    )
    print(f"{violations:,} violations" if violations else "no violation")
    return code


if __name__ == "__main__":
    sys.exit(main())
