"""Do the judges bite? Runs one short scenario for each bug; `make test-bites`.

    python -m tests.history.live.bites                      # all of them; a table
    python -m tests.history.live.bites "blind retry …"      # one

Each bug is left out in processes of its own, on servers of its own. Exit codes: 0 every bug was
found by the judge that is named for it, 1 one was not.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.history import bugs
from tests.history.judge import Limits
from tests.history.live.movers import StandInMover
from tests.history.live.run import Result, run

__all__ = ["BITES", "Bite", "bitten", "main"]


@dataclass(frozen=True)
class Bite:
    """A bug, and who has to find it.

    Attributes:
        judge: by the name that `--require` takes.
        findings: of which there has to be one.
        run: arguments of the run that shows it.
        has_moves: whether logical shards move meanwhile.
        nemesis: what else happens.
        shaped: what the cluster is like.
    """

    judge: str
    findings: tuple[str, ...]
    run: Mapping[str, Any] = field(default_factory=dict)
    has_moves: bool = False
    nemesis: Mapping[str, Any] = field(default_factory=dict)
    shaped: Mapping[str, Any] = field(default_factory=dict)


_LONE: Final = {"replicas": 0, "confirm": 0, "pgbouncer": False}
_SETS: Final = {"kinds": ("set",), "think": 0.0, "logical_shards": 2}
_LOST: Final = ("lost write",)

_MOVED: Final[dict[str, Any]] = {
    "has_moves": True, "shaped": _LONE, "nemesis": {"faults": (), "move_pause": 0.2},
}  # fmt: skip


def _of_failover(deaf: int, confirm: int, *findings: str, judge: str = "sets") -> Bite:
    return Bite(
        judge,
        findings,
        {**_SETS, "think": 0.02},
        nemesis={"faults": (), "is_watched": True, "deaf": deaf},
        shaped={"replicas": 2, "confirm": confirm, "pgbouncer": False},
    )


BITES: Final[dict[str, Bite]] = {
    "fence without the lock": Bite("sets", _LOST, {**_SETS, "hold": 0.3, "is_named": False}, **_MOVED),
    "fence without revoke": Bite("sets", _LOST, _SETS, **_MOVED),
    "catch-up not awaited": Bite("sets", _LOST, _SETS, **_MOVED),
    "activation before decision": Bite("sets", _LOST, _SETS, **_MOVED),
    "sequence not advanced": Bite("sets", ("duplicate id",), _SETS, **_MOVED),
    "unversioned cache set": Bite(
        "caches",
        ("stale cache",),
        {"kinds": ("page",), "think": 0.0, "logical_shards": 2, "limits": Limits(bound=1.0)},
        nemesis={"faults": ()},
        shaped=_LONE,
    ),
    "map never refreshed": Bite(
        "liveness", ("not recovered",), {**_SETS, "deadline": 2.0}, **_MOVED
    ),
    "blind retry of unknown outcomes": Bite(
        "sets",
        ("duplicate write",),
        {**_SETS, "hold": 0.01},
        nemesis={"faults": ("lose answer",), "pause": 0.05},
        shaped={"replicas": 0, "confirm": 0},
    ),
    "lookup without reservation": Bite(
        "names", ("two owners",), {"kinds": ("name",), "think": 0.0}, nemesis={"faults": ()},
        shaped=_LONE,
    ),
    "effect without dedupe": Bite(
        "outbox", ("duplicate effect",), {"kinds": ("emit",), "think": 0.0, "relays": 2},
        nemesis={"faults": ("kill relay",), "pause": 0.3}, shaped=_LONE,
    ),
    "token ignored by reads": Bite(
        "sessions", ("read your writes",), {"kinds": ("note",), "think": 0.0},
        nemesis={"faults": ("pause replay",), "pause": 0.1},
        shaped={"replicas": 1, "confirm": 0, "pgbouncer": False},
    ),
    "event outside its transaction": Bite(
        "outbox", ("aborted event",), {"kinds": ("emit",)}, nemesis={"faults": ()}, shaped=_LONE
    ),
    "promoted replica not the most advanced": _of_failover(1, 1, *_LOST),
    "failover without a new epoch": _of_failover(0, 1, "two owners", judge="owners"),
    "asynchronous failover": _of_failover(2, 0, *_LOST),
}  # fmt: skip
"""Every bug of `tests.history.bugs`, with the judge that has to find it."""


def bitten(name: str, folder: Path, *, seconds: float = 6.0, seed: int = 0) -> Result:
    """Run the scenario of a bug in this process, which has the bug from now on."""
    bite = BITES[name]
    bugs.apply(name)
    return run(
        folder,
        seconds=seconds, seed=seed, bug=name,
        moves=lambda stage: [StandInMover(stage)] if bite.has_moves else [],
        nemesis=bite.nemesis, shaped=bite.shaped,
        **{"calm": 3.0, "relays": int("emit" in bite.run.get("kinds", ())), **bite.run},
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.history.live.bites", description=__doc__)
    parser.add_argument("bug", nargs="*", help="a bug, else all of them")
    parser.add_argument("--here", action="store_true", help="in this process; for one bug only")
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.bug if name not in BITES]:
        parser.error(f"no bug {unknown[0]!r}; there are {', '.join(BITES)}")
    if given.here:
        return _here(given.bug[0], given.seconds, given.seed)
    print(f"{'bug':40} {'judge':10} {'seconds':>7}  found")
    missed = 0
    for name in given.bug or BITES:
        began = time.monotonic()
        more = ["--seconds", str(given.seconds), "--seed", str(given.seed)]
        command = [sys.executable, "-m", "tests.history.live.bites", name, "--here", *more]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = done.stdout.splitlines()
        said = lines[-1] if done.returncode in {0, 1} and lines else done.stderr.strip()[-300:]
        missed += done.returncode != 0
        seconds = time.monotonic() - began
        print(f"{name:40} {BITES[name].judge:10} {seconds:7.1f}  {said}", flush=True)
    print(f"{len(given.bug or BITES) - missed} of {len(given.bug or BITES)} bugs were found")
    return 1 if missed else 0


def _here(name: str, seconds: float, seed: int) -> int:
    bite = BITES[name]
    with tempfile.TemporaryDirectory(prefix="bite-") as made:
        folder = Path(made)
        folder.chmod(0o755)
        result = bitten(name, folder / "run", seconds=seconds, seed=seed)
    found = result.found(bite.judge)
    is_found = not set(bite.findings).isdisjoint(found)
    totals = result.verdicts[bite.judge].totals
    told = ", ".join(f"{n:,} of {what}" for what, n in totals.items()) or "nothing"
    if not is_found:
        print("\n".join(result.lines), file=sys.stderr)
        print(dict(result.counts), dict(result.errors), file=sys.stderr)
    print(told if is_found else f"NOT FOUND: {told}")
    return 0 if is_found else 1


if __name__ == "__main__":
    sys.exit(main())
