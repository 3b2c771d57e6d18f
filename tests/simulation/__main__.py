"""Runs seeds of the simulation; `python -m tests.simulation SEED` replays one and prints it.

    python -m tests.simulation 4711                      # that seed of every world, with its trace
    python -m tests.simulation 4711 --world cache        # of one world
    python -m tests.simulation 4711 --bug "dirty read"   # with a protection left out
    python -m tests.simulation 0 --seeds 10000           # many, without traces; prints what failed

Exit codes: 0 all is well, 1 something was found.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from tests.simulation.bugs import BUGS
from tests.simulation.failoverworld import FAILOVER_BUGS
from tests.simulation.runs import WORLDS, run

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("seed", type=int)
    parser.add_argument("--seeds", type=int, default=1, help="how many, from that one on")
    parser.add_argument("--world", choices=[*WORLDS], help="one of them only")
    parser.add_argument("--bug", choices=[*BUGS, *FAILOVER_BUGS], help="a protection to leave out")
    given = parser.parse_args(arguments)
    of_bug = "failover" if given.bug in FAILOVER_BUGS else "database"
    worlds = [given.world] if given.world else [of_bug] if given.bug else [*WORLDS]
    began, failed, n_steps = time.monotonic(), 0, 0
    for seed in range(given.seed, given.seed + given.seeds):
        for world in worlds:
            again = f" --bug '{given.bug}'" if given.bug else ""
            replay = f"replay: python -m tests.simulation {seed} --world {world}{again}"
            try:
                result = run(world, seed, bug=given.bug, is_traced=given.seeds == 1)
            except AssertionError as broken:  # what the world itself checks
                failed += 1
                print(*getattr(broken, "__notes__", ()), f"world {world}: {broken}", sep="\n")
                print(replay)
                continue
            n_steps += result.n_steps
            for line in result.trace:
                print(line)
            for line in result.report:
                print(line)
            if result.violations:
                failed += 1
                print(replay)
    seconds = time.monotonic() - began
    n = given.seeds * len(worlds)
    print(f"{n:,} runs, {n_steps:,} steps in {seconds:.1f} s: {failed} with violations")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
