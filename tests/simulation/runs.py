"""Runs one seed of one world and has it judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from tests.history.findings import Verdict
from tests.history.judge import Limits, judge, report
from tests.history.ledger import Ledger
from tests.history.records import Operation
from tests.simulation.breakerworld import BreakerWorld
from tests.simulation.bugs import BUGS
from tests.simulation.cacheworld import CacheWorld
from tests.simulation.failoverworld import FailoverWorld
from tests.simulation.world import World

__all__ = ["WORLDS", "Result", "run"]


@dataclass(frozen=True)
class Kind:
    """A world, and what is promised in it.

    Attributes:
        make: makes one of a seed.
        judges: who is asked; None for all.
        limits: what is promised in figures.
    """

    make: Callable[..., Any]
    judges: tuple[str, ...] | None
    limits: Limits


WORLDS: Final[Mapping[str, Kind]] = {
    # Clients begin again half a second after the last fault.
    "database": Kind(World, None, Limits(within=0.5)),
    # A failover takes a second or two, and clients begin again eight after the last fault.
    "failover": Kind(FailoverWorld, ("sets", "owners", "liveness"), Limits(within=7.0)),
    # The relay looks every 50 ms; a cache that is frozen or mute keeps it for less than this.
    "cache": Kind(CacheWorld, ("sessions", "caches"), Limits(bound=0.75)),
    # The longest open time with its jitter, the probes, and callers that die with one.
    "breaker": Kind(BreakerWorld, ("liveness",), Limits(within=180.0)),
}


@dataclass(frozen=True)
class Result:
    """What came of a run.

    Attributes:
        world: as it was at the end.
        verdicts: of the judges that were asked, by name.
        violations: how many there are.
        trace: lines, if it was traced.
        report: lines, if there is anything to tell.
        n_steps: of the simulation.
    """

    world: Any
    verdicts: Mapping[str, Verdict]
    violations: int
    trace: list[str]
    report: list[str]
    n_steps: int


def run(world: str, seed: int, *, bug: str | None = None, is_traced: bool = False) -> Result:
    """Run one seed of one world, with or without a bug, and judge it.

    Raises:
        AssertionError: what the world itself checks does not hold.
    """
    kind = WORLDS[world]
    more: dict[str, Any] = {}
    if bug is not None:
        more = {"bugs": frozenset([bug])}
        if world == "database":
            more |= BUGS[bug].world
    made = kind.make(seed, is_traced=is_traced, **more)
    try:
        made.run()
    except AssertionError as broken:
        for line in made.simulation.trace:
            broken.add_note(line)
        raise
    records = made.journal.records
    ledger = Ledger.of(records)
    verdicts = judge(ledger, kind.limits)
    if kind.judges is not None:
        verdicts = {name: verdicts[name] for name in kind.judges}
    violations = sum(verdict.violations for verdict in verdicts.values())
    lines: list[str] = []
    if violations or is_traced:
        found = {(op.process, op.n): op for op in records if isinstance(op, Operation)}
        faults = ledger.facts.get("fault", ())
        lines = [f"world {world}, seed {seed}:", *report(verdicts, found, faults=faults)]
    simulation = made.simulation
    return Result(made, verdicts, violations, simulation.trace, lines, simulation.n_steps)
