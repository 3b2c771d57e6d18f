"""Runs many seeds of a world for the tests, and counts what has happened in them.

Ten thousand in `make test`, shared by two files so that two workers have half of the work each;
`python -m tests.simulation 0 --seeds N` has as many as wanted.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

from tests.history.records import Operation
from tests.simulation.breakerworld import BreakerWorld
from tests.simulation.cacheworld import CacheWorld
from tests.simulation.failoverworld import FailoverWorld
from tests.simulation.runs import run
from tests.simulation.world import World

__all__ = ["EXPECTED", "SEEDS", "counted"]

SEEDS: Final = {"database": 4000, "failover": 1500, "cache": 3000, "breaker": 1500}
"""Ten thousand in all."""

EXPECTED: Final = {
    "database": (
        *("appends", "registers", "sets", "bank", "names", "sessions", "outbox", "owners"),
        *("liveness", "moves", "failovers", "given up", "killed movers", "OK", "FAIL", "UNKNOWN"),
    ),
    "failover": ("sets", "owners", "liveness", "failovers", "rejoined", "copied"),
    "cache": ("sessions", "caches", "cached"),
    "breaker": ("liveness", "opened", "refused"),
}
"""What has to have happened, in a tenth of the seeds at least."""


def counted(world: str, seeds: range) -> Counter[str]:
    """Run seeds, in which nothing may be found; return what has happened in them.

    Raises:
        AssertionError: something was found; the message says how to replay it.
    """
    counts: Counter[str] = Counter()
    for seed in seeds:
        again = f"replay: python -m tests.simulation {seed} --world {world}"
        try:
            result = run(world, seed)
        except AssertionError as broken:
            raise AssertionError(f"{broken}\n{again}") from broken
        assert not result.violations, "\n".join([*result.report, again])
        counts.update(name for name, verdict in result.verdicts.items() if verdict.has_checked)
        _count(counts, result.world)
        if isinstance(result.world, CacheWorld):
            counts["cached"] += result.verdicts["caches"].counts["reads from caches"]
    return counts


def _count(counts: Counter[str], made: object) -> None:
    if isinstance(made, World):
        counts["moves"] += made.n_moves
        counts["failovers"] += made.n_failovers
        counts["given up"] += made.n_given_up
        counts["killed movers"] += made.n_killed_movers
        ops = [record for record in made.journal.records if isinstance(record, Operation)]
        counts.update(op.outcome.name for op in ops)
    elif isinstance(made, FailoverWorld):
        counts["failovers"] += made.n_failovers
        counts["rejoined"] += made.counts["Rejoin"]
        counts["copied"] += made.counts["copies"]
    elif isinstance(made, BreakerWorld):
        counts["opened"] += made.times_opened
        counts["refused"] += made.refused
