"""Runs the history test: servers, clients, a schedule of moves and faults, and judges at the end.

    python -m tests.history.live.run --seconds 300 --seed 4711          # make test-history

Prints what was done and what was found. Exit codes: 0 all is well; 1 something was found, a client
was told of an error, a judge had nothing to judge, or (`--goals`) too little was done.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psycopg

from shardkit.errors import LocalServerError
from tests.history.findings import Verdict
from tests.history.judge import Limits, judge, report, vacuous
from tests.history.ledger import Ledger
from tests.history.live.faults import FAULTS
from tests.history.live.keeping import Keeper
from tests.history.live.movers import RealMover, StandInMover, movers
from tests.history.live.nemesis import Mover, Nemesis
from tests.history.live.plan import KINDS, Plan
from tests.history.live.stage import Stage, described
from tests.history.live.witness import (
    look,
    note_secrets,
    note_state,
    wait_for_empty_outboxes,
)
from tests.history.records import find

__all__ = ["Result", "main", "run"]

Moves = Callable[[Stage], Sequence[Mover]]

GOALS: Final = {"moves": 200, "failovers": 50, "failovers during a move": 15}
"""What 1,500 seconds have to bring about; shorter runs their share of it. Source: issue 8."""

_LOST: Final = (
    "lost write", "lost transfer", "lost name", "lost event", "lost effect", "vanished",
)  # fmt: skip
_DOUBLED: Final = ("duplicate write", "duplicate id", "duplicate effect")


@dataclass(frozen=True)
class Result:
    """What came of a run.

    Attributes:
        folder: of the history.
        counts: what was done.
        errors: what clients were told, by text.
        verdicts: of the judges, by name.
        lines: of the report of the judges.
        seconds: it took, by part.
        said: what movers and the watcher said, by text.
        broken: what the schedule could not do, such as heal a server; None for nothing.
    """

    folder: Path
    counts: Mapping[str, int]
    errors: Mapping[str, int]
    verdicts: Mapping[str, Verdict]
    lines: Sequence[str]
    seconds: Mapping[str, float] = field(default_factory=dict)
    said: Mapping[str, int] = field(default_factory=dict)
    broken: str | None = None

    @property
    def violations(self) -> int:
        """How many findings must not be."""
        return sum(verdict.violations for verdict in self.verdicts.values())

    def lacks(self, seconds: float) -> list[str]:
        """Return what a run of so many seconds should have done more of."""
        share = min(1.0, seconds / 1500)
        return [
            f"{self.counts.get(what, 0)} {what}, not {int(n * share)}"
            for what, n in GOALS.items()
            if self.counts.get(what, 0) < int(n * share)
        ]

    def totals(self) -> str:
        """Return in one line what was done, and what became of the promises."""
        n = {what: self.counts.get(what, 0) for what in GOALS}
        found: Counter[str] = Counter()
        for verdict in self.verdicts.values():
            found.update(verdict.totals)
        return (
            f"{n['moves']:,} moves, {n['failovers']:,} failovers, "
            f"{n['failovers during a move']:,} of them during a move; "
            f"{sum(found[what] for what in _LOST):,} lost, "
            f"{sum(found[what] for what in _DOUBLED):,} doubled, "
            f"{self.n_errors:,} errors of clients, {found['left behind']:,} left behind"
        )

    @property
    def n_errors(self) -> int:
        """Operations that the default retry has not spared an error."""
        return sum(n for text, n in self.errors.items() if not text.startswith("("))

    def found(self, name: str) -> set[str]:
        """Return the names of what a judge has found."""
        return set(self.verdicts[name].totals)


def run(
    folder: Path,
    *,
    seconds: float,
    calm: float = 3.0,
    seed: int = 0,
    clients: int = 2,
    relays: int = 1,
    moves: Moves = lambda stage: [StandInMover(stage)],
    limits: Limits | None = None,
    nemesis: Mapping[str, Any] | None = None,
    shaped: Mapping[str, Any] | None = None,
    **planned: Any,
) -> Result:
    """Run clients while servers move and fail; judge what they wrote down.

    Args:
        folder: for the servers and the history; made if missing.
        seconds: that things move and break.
        calm: seconds that clients go on afterwards.
        seed: of all chance.
        clients: client processes.
        relays: relay processes.
        moves: makes what moves.
        limits: what is promised in figures.
        nemesis: further arguments of it.
        shaped: changes to the shape of the cluster.
        planned: further attributes of the plan.
    """
    took, began = {}, time.monotonic()
    history = folder / "history"
    history.mkdir(parents=True)
    limits = limits or Limits(bound=10.0, within=calm / 2)
    plan = Plan(config="", folder=str(history), seed=seed, seconds=seconds + calm, **planned)
    counts: Counter[str] = Counter()
    said: Counter[str] = Counter()
    broken: str | None = None
    with ExitStack() as stack:
        stage = Stage.open(plan, folder / "servers", stack, **(shaped or {}))
        stack.callback(stage.end_at_once)
        note_state(stage, "before")
        stage.begin(clients=clients, relays=relays)
        keeper = stack.enter_context(Keeper(stage))
        took["start"] = time.monotonic() - began
        hands = moves(stage)
        for mover in hands:
            stack.callback(mover.close)
        schedule = Nemesis(stage, hands, **(nemesis or {}))
        try:
            schedule.run(seconds)
        except (
            AssertionError,
            LocalServerError,
        ) as error:  # what clients did is judged all the same
            broken = str(error)
        counts.update(schedule.counts + keeper.counts)
        for mover in hands:
            if isinstance(mover, RealMover):
                counts.update(mover.counts)
                said.update(mover.said)
        if schedule.losses is not None:
            told = schedule.losses.watching.said.items()
            said.update({f"watcher: {what}": n for what, n in told})
        time.sleep(calm)
        note_secrets(stage, [history, folder / "servers" / "logs"])
        stage.end("client")
        if relays and broken is None:
            try:
                wait_for_empty_outboxes(stage, 120.0)
            except AssertionError as error:
                broken = str(error)
        stage.end("relay")
        unread = _noted_at_the_end(stage, history)
        broken = broken or unread
        stage.recorder.end()
        errors = Counter(stage.errors)
        for log in folder.glob("servers/logs/*.log"):  # of servers, which are gone in a moment
            shutil.copy(log, history)
    took["run"] = time.monotonic() - began - took["start"]
    ledger = Ledger.read(history)
    verdicts, lines = _judged(ledger, history, limits)
    counts["operations"] = ledger.total
    errors.update(fact["text"] for fact in ledger.facts.get("error", ()))
    took["judge"] = time.monotonic() - began - took["start"] - took["run"]
    return Result(history, counts, errors, verdicts, lines, took, said, broken)


def _noted_at_the_end(stage: Stage, history: Path) -> str | None:
    """Write down what there is for good; return why that cannot be, or None."""
    try:
        look(stage, history)
        note_state(stage, "after")
    except (AssertionError, psycopg.Error) as error:
        return f"what there is at the end cannot be read: {error}"
    return None


def _judged(ledger: Ledger, history: Path, limits: Limits) -> tuple[dict[str, Verdict], list[str]]:
    verdicts = judge(ledger, limits)
    refs = {ref for v in verdicts.values() for each in v.findings for ref in each.operations}
    found = find(history, refs) if refs else {}
    lines = list(report(verdicts, found, faults=ledger.facts.get("fault", ())))
    return verdicts, lines


_MOVERS: Final[Mapping[str, Callable[[int], Moves]]] = {
    "real": movers,
    "stand-in": lambda _hands: lambda stage: [StandInMover(stage)],
    "none": lambda _hands: lambda _stage: [],
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.history.live.run", description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0, help="that things move and break")
    parser.add_argument("--calm", type=float, default=10.0, help="that clients go on afterwards")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clients", type=int, default=3, help="processes")
    parser.add_argument("--threads", type=int, default=4, help="clients of each process")
    parser.add_argument("--relays", type=int, default=2, help="processes")
    parser.add_argument("--shards", type=int, default=4, help="logical shards")
    parser.add_argument("--think", type=float, default=0.1, help="longest pause of a client")
    parser.add_argument("--deadline", type=float, default=60.0, help="of each operation")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS)
    parser.add_argument("--faults", nargs="*", choices=[*FAULTS], default=[*FAULTS])
    parser.add_argument("--pause", type=float, default=1.5, help="seconds between faults, about")
    parser.add_argument("--move-pause", type=float, default=0.5, help="between moves, about")
    parser.add_argument("--failover-pause", type=float, default=4.0, help="between them, about")
    parser.add_argument("--hands", type=int, default=2, help="movers side by side")
    parser.add_argument("--goals", action="store_true", help="fail where too little was done")
    parser.add_argument("--mover", choices=(*_MOVERS,), default="real")
    parser.add_argument("--no-failovers", action="store_true")
    parser.add_argument("--pooler", choices=("pgbouncer", "none"), default="pgbouncer")
    parser.add_argument("--cache", choices=("memcached", "redis"), default="memcached")
    parser.add_argument("--keep", type=Path, help="a new folder to leave the history in")
    given = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # clients end with it
    with tempfile.TemporaryDirectory(prefix="history-") as made:
        folder = Path(made)
        folder.chmod(0o755)
        result = run(
            folder,
            seconds=given.seconds, calm=given.calm, seed=given.seed, clients=given.clients,
            relays=given.relays, threads=given.threads, logical_shards=given.shards,
            think=given.think, deadline=given.deadline, kinds=tuple(given.kinds), cache=given.cache,
            moves=_MOVERS[given.mover](given.hands), shaped={"pgbouncer": given.pooler == "pgbouncer"},
            nemesis={
                "faults": given.faults, "pause": given.pause, "move_pause": given.move_pause,
                "failover_pause": given.failover_pause, "is_watched": not given.no_failovers,
            },
        )  # fmt: skip
        if given.keep:
            shutil.copytree(result.folder, given.keep)
    for line in result.lines:
        print(line)
    print("done: " + ", ".join(f"{n:,} {what}" for what, n in sorted(result.counts.items())))
    print("seconds: " + ", ".join(f"{what} {s:.1f}" for what, s in result.seconds.items()))
    for line in described(result.said, 30):
        print(line)
    print(f"{result.n_errors:,} errors of clients")
    for line in described(result.errors):
        print(line)
    wrong = [f"{name} had nothing to judge" for name in vacuous(result.verdicts)]
    if result.broken is not None:
        wrong.append(f"broken: {result.broken}")
    if given.goals:
        wrong += result.lacks(given.seconds)
    for line in wrong:
        print(line)
    print(f"seed {given.seed}: {result.totals()}; {result.violations:,} violations")
    return 1 if result.violations or result.n_errors or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
