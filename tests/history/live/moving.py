"""A mover process: `python -m tests.history.live.moving PLAN`; does what standard input says.

One line of JSON for each thing to do, and one for what came of it; between them one for each step,
after which it waits for a line, so that what is broken there is broken at that step. It may be
killed and frozen at any point: whoever comes next resumes. `bug` of the plan is left out here, too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from shardkit.config import load
from shardkit.errors import MoveError, RefusedError, ShardkitError
from shardkit.ops import moves
from shardkit.testing import schema_script
from shardkit.topology import Topology
from tests.history import bugs
from tests.history.live.plan import Plan
from tests.history.live.tables import Base

__all__ = ["main"]


def main(path: str) -> int:
    """Do what is asked for until there is nothing more."""
    plan = Plan.read(path)
    bugs.apply(plan.bug)
    _, topology = load(plan.config)
    script = schema_script(Base.metadata)
    options = moves.Options(hook=_told)
    while line := sys.stdin.readline():
        asked = json.loads(line)
        print(json.dumps(_done(topology, asked, script, options)), flush=True)
    return 0


def _told(step: str) -> None:
    print(json.dumps({"step": step}), flush=True)
    if not sys.stdin.readline():
        raise SystemExit(1)  # nobody is there any more


def _done(
    topology: Topology, asked: dict[str, Any], script: Any, options: moves.Options
) -> dict[str, Any]:
    shard = asked["shard"]
    ways: dict[str, Callable[[], Any]] = {
        "move": lambda: moves.move(
            topology, shard, asked["target"], script=script, options=options
        ),
        "resume": lambda: moves.resume(topology, shard, script=script, options=options),
        "abort": lambda: moves.abort(topology, shard, script=script, options=options),
        "rollback": lambda: moves.rollback(topology, shard, options=options),
        "clean": lambda: moves.clean(topology, shard, options=options),
    }
    try:
        outcome = ways[asked["do"]]()
    except MoveError as error:
        return {"end": "given up", "why": str(error)}
    except RefusedError as error:
        return {"end": "refused", "why": str(error)}
    except ShardkitError as error:
        end = "again" if error.retryable else "failed"
        return {"end": end, "why": f"{type(error).__name__}: {error}"}
    except Exception as error:  # noqa: BLE001  a driver's error is to be seen, and tried again
        return {"end": "again", "why": f"(raw) {type(error).__name__}: {error}"}
    return {"end": "moved" if outcome.is_moved else "not moved", "why": str(outcome)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
