"""What a move would do, and what is refused before it begins; for `shardkit.ops.moves.run`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final

import psycopg

from shardkit.config import MAP_AGE
from shardkit.errors import InvalidShardKeyError, MoveError, RefusedError, TryAgainError
from shardkit.ops.ledger import read_shards, shard_script
from shardkit.ops.moves.checks import LONG, Check, Side, checks
from shardkit.ops.moves.copying import size_of
from shardkit.ops.moves.driver import Hook
from shardkit.ops.moves.journal import known_moves
from shardkit.ops.moves.machine import FORWARD
from shardkit.ops.moves.presence import open_connection
from shardkit.ops.moves.transactions import LOCK_TIMEOUT
from shardkit.ops.moves.work import Report, Script
from shardkit.ops.placed import as_led, as_placed
from shardkit.ops.revisions import Revision
from shardkit.topology import PhysicalShard, Topology

__all__ = ["NOTICE", "MovePlan", "Options", "plan", "revised"]

NOTICE: Final = MAP_AGE / 2 + 0.5
"""Seconds: every client asks every server twice as often as `limits.map_age`, and then connects."""


@dataclass(frozen=True, slots=True)
class Options:
    """How a move is done.

    Attributes:
        lock_timeout: seconds that a fence queues for its locks; whoever writes waits behind it.
        long: seconds after which a writing transaction of the source is too long to begin.
        notice: seconds that clients have between the beginning of the copy and the fence, to hear
            of it and to connect to the target; `NOTICE` is enough for all of them.
        is_held: stop when all is ready for the fence; a resume goes on.
        free_bytes: how much room the target has; None to find out where that can be done.
        on_report: told how far it is.
        stop: set to have moves stop where that is safe; a resume goes on.
        hook: told of everything that is written down; for tests that crash there.
    """

    lock_timeout: float = LOCK_TIMEOUT
    long: float = LONG
    notice: float = 0.0
    is_held: bool = False
    free_bytes: int | None = None
    on_report: Callable[[Report], None] = lambda _report: None
    stop: threading.Event = field(default_factory=threading.Event)
    hook: Hook = lambda _name: None


@dataclass(frozen=True, slots=True)
class MovePlan:
    """What a move would do.

    Attributes:
        logical_shard: that would be moved.
        source: name of its owner.
        target: name of where it would go.
        size_bytes: of its tables and indexes.
        checks: what was looked at.
        steps: names of the steps, in order.
    """

    logical_shard: int
    source: str
    target: str
    size_bytes: int
    checks: tuple[Check, ...]
    steps: tuple[str, ...] = tuple(FORWARD)

    @property
    def problems(self) -> list[Check]:
        """The checks that speak against it."""
        return [check for check in self.checks if check.problem]


def revised(revisions: Sequence[Revision]) -> Script:
    """Return what makes an empty logical shard of the revisions that its source has.

    Args:
        revisions: all known ones, oldest first.
    """
    known = {revision.id: revision for revision in revisions}

    def script(target: PhysicalShard, logical_shard: int, source: psycopg.Connection[Any]) -> str:
        applied, partial = read_shards(source, [logical_shard])
        if partial:
            raise MoveError(
                "a revision is half done on the source", hint="run shardkit migrate apply first"
            )
        names = applied[logical_shard].keys() - {"shardkit"}
        if unknown := sorted(names - known.keys()):
            raise MoveError(
                f"revision {unknown[0]} is applied on the source but unknown here",
                hint="run the version of the code that has it, or a newer one",
            )
        wanted = [revision for revision in revisions if revision.id in names]
        return shard_script(logical_shard, own=True, roles=target.roles, revisions=wanted)

    return script


def plan(
    topology: Topology, logical_shard: int, target: str, *, options: Options | None = None
) -> MovePlan:
    """Return what a move would do, and what speaks against it; changes nothing.

    Args:
        topology: the cluster; where its logical shards are is asked anew.
        logical_shard: its number.
        target: name of the physical shard where it is to go.
        options: as in `move`.

    Raises:
        InvalidShardKeyError: there is no such logical shard.
        RefusedError: it is there already, is being moved, or there is no such target.
        EndpointUnavailableError: a server does not answer (retryable).
    """
    options = options or Options()
    topology = as_led(topology)
    source = _owner(topology, logical_shard, target)
    with ExitStack() as stack:
        here, there = (
            Side(shard, stack.enter_context(open_connection(shard, logical_shard)))
            for shard in (topology.physical[source], topology.physical[target])
        )
        free = None
        if options.free_bytes is not None:
            free = lambda _side: options.free_bytes  # noqa: E731
        found = checks(here, there, logical_shard, long=options.long, free_bytes=free)
        size = size_of(here.connection, logical_shard)
    return MovePlan(logical_shard, source, target, size, tuple(found))


def _owner(topology: Topology, logical_shard: int, target: str) -> str:
    if not 0 <= logical_shard < topology.n_logical_shards:
        raise InvalidShardKeyError(
            f"there is no logical shard {logical_shard}",
            hint=f"they are numbered 0 to {topology.n_logical_shards - 1}",
        )
    if target not in topology.physical:
        raise RefusedError(
            f"there is no physical shard {target!r}",
            hint=f"there are {', '.join(topology.physical)}",
            logical_shard=logical_shard,
        )
    moves, silent = known_moves(topology, logical_shard)
    if moves:
        move_ = moves[0]
        what = "was moved" if move_.is_handed_over else "is being moved"
        raise RefusedError(
            f"it {what} from {move_.source} to {move_.target} by move {move_.move_id}",
            hint="shardkit move clean forgets the old copy, rollback goes back"
            if move_.is_handed_over
            else "shardkit move status shows how far it is; resume goes on, abort gives it up",
            logical_shard=logical_shard,
        )
    if silent:
        name, why = next(iter(silent.items()))
        raise TryAgainError(
            f"physical shard {name!r} does not say whether it has the logical shard: {why}",
            logical_shard=logical_shard,
        )
    placed = as_placed(topology).shard_map
    source = placed.owner(logical_shard)
    if source == target:
        raise RefusedError(
            f"it is on {target} already", hint="nothing to do", logical_shard=logical_shard
        )
    if logical_shard in placed.held:
        raise RefusedError(f"it is {placed.held[logical_shard]}", logical_shard=logical_shard)
    return source
