"""Many moves with limits. Called by the command line and by `shardkit.ops.rebalance`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from shardkit.errors import ShardkitError
from shardkit.ops.moves.driver import Outcome
from shardkit.ops.moves.planning import Options
from shardkit.ops.moves.run import clean, move
from shardkit.ops.moves.work import Script
from shardkit.ops.placed import as_placed
from shardkit.topology import Topology

__all__ = ["move_many"]


def move_many(
    topology: Topology,
    wanted: Sequence[tuple[int, str]],
    *,
    script: Script,
    options: Options | None = None,
    at_once: int = 2,
    per_server: int = 1,
    cleans: bool = False,
    on_end: Callable[[int, Outcome | ShardkitError], None] = lambda _n, _o: None,
) -> dict[int, Outcome | ShardkitError]:
    """Move many logical shards; one that fails does not stop the others.

    Args:
        topology: the cluster.
        wanted: logical shards and where they are to go.
        script: as in `move`.
        options: as in `move`; `on_report` and `hook` are called from several threads.
        at_once: moves at the same time.
        per_server: of those, how many may have the same source or target.
        cleans: whether each old copy is forgotten at once.
        on_end: told what has become of each.

    Returns:
        What has become of each, by logical shard.
    """
    options = options or Options()
    room = {name: threading.BoundedSemaphore(max(1, per_server)) for name in topology.physical}
    owners = as_placed(topology).shard_map.owners

    def one(number: int, target: str) -> Outcome | ShardkitError:
        names = {target} | ({owners[number]} if 0 <= number < len(owners) else set())
        with ExitStack() as stack:
            for name in sorted(names & room.keys()):  # in one order, so that none waits in a ring
                stack.enter_context(room[name])
            found: Outcome | ShardkitError
            try:
                found = move(topology, number, target, script=script, options=options)
                if cleans:
                    clean(topology, number, options=options)
            except ShardkitError as error:
                found = error
        on_end(number, found)
        return found

    with ThreadPoolExecutor(max(1, at_once)) as pool:
        futures = {number: pool.submit(one, number, target) for number, target in wanted}
        try:
            return {number: future.result() for number, future in futures.items()}
        except KeyboardInterrupt:
            options.stop.set()
            pool.shutdown(cancel_futures=True)
            raise
