"""Moves as functions, for commands, rebalancing and tests; exported by `shardkit.ops.moves`."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import psycopg

from shardkit.errors import (
    InvalidShardKeyError,
    MoveError,
    RefusedError,
    ShardkitError,
    TryAgainError,
)
from shardkit.ops.ledger import read_shards, shard_script
from shardkit.ops.moves.checks import LONG, Check, Side, checks
from shardkit.ops.moves.copying import size_of
from shardkit.ops.moves.driver import Driver, Hook, Outcome
from shardkit.ops.moves.journal import Known, known_moves
from shardkit.ops.moves.machine import FORWARD, Goal, Step
from shardkit.ops.moves.presence import open_connection
from shardkit.ops.moves.rows import Diff
from shardkit.ops.moves.transactions import LOCK_TIMEOUT
from shardkit.ops.moves.transitions import Move
from shardkit.ops.moves.work import Report, Script, Work
from shardkit.ops.placed import as_led, as_placed
from shardkit.ops.revisions import Revision
from shardkit.topology import PhysicalShard, Topology

__all__ = [
    "MovePlan",
    "Options",
    "abort",
    "clean",
    "move",
    "move_many",
    "plan",
    "resume",
    "revised",
    "rollback",
    "status",
    "verify",
]

_BACK = uuid.UUID("7b1d8f43-6b6e-4a52-9d33-6f1f5d0a8c11")
"""Name space of the ids of ways back: each follows from the move it takes back."""


@dataclass(frozen=True, slots=True)
class Options:
    """How a move is done.

    Attributes:
        lock_timeout: seconds that a fence queues for its locks; whoever writes waits behind it.
        long: seconds after which a writing transaction of the source is too long to begin.
        is_held: stop when all is ready for the fence; a resume goes on.
        free_bytes: how much room the target has; None to find out where that can be done.
        on_report: told how far it is.
        stop: set to have moves stop where that is safe; a resume goes on.
        hook: told of everything that is written down; for tests that crash there.
    """

    lock_timeout: float = LOCK_TIMEOUT
    long: float = LONG
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


def move(
    topology: Topology,
    logical_shard: int,
    target: str,
    *,
    script: Script,
    options: Options | None = None,
) -> Outcome:
    """Move a logical shard to another physical shard while its clients go on.

    The old copy is kept current for `rollback` until `clean`.

    Args:
        topology: the cluster; where its logical shards are is asked anew.
        logical_shard: its number.
        target: name of the physical shard where it is to go.
        script: makes the empty schema there: `revised`.
        options: None for the defaults.

    Raises:
        InvalidShardKeyError: there is no such logical shard.
        RefusedError: nothing was changed, and why.
        MoveError: it was given up; nothing is left of it, and the source goes on.
        TryAgainError: something was in the way; `resume` goes on (retryable).
        EndpointUnavailableError: a server does not answer (retryable).
    """
    options = options or Options()
    topology = as_led(topology)
    planned = plan(topology, logical_shard, target, options=options)
    if planned.problems:
        first = planned.problems[0]
        more = [check.problem for check in planned.problems[1:]]
        raise RefusedError(
            "; ".join([f"{first.name}: {first.problem}", *filter(None, more)]),
            hint=first.hint,
            logical_shard=logical_shard,
        )
    begun = Move(str(uuid.uuid4()))
    work = _work(topology, logical_shard, begun, planned.source, target, script, options)
    return _driver(work, Goal.MOVE, options).run()


def resume(
    topology: Topology,
    logical_shard: int,
    *,
    script: Script,
    options: Options | None = None,
) -> Outcome:
    """Go on with a move whose mover has died, or was stopped; with an abort, if that was begun.

    Raises:
        RefusedError: there is none, or its mover is at work.
        MoveError: as in `move`.
        TryAgainError: as in `move` (retryable).
        EndpointUnavailableError: a server does not answer (retryable).
    """
    topology = as_led(topology)
    known = _known(topology, logical_shard)
    return _taken_up(topology, known, known.journal.goal, script, options)


def abort(
    topology: Topology,
    logical_shard: int,
    *,
    script: Script | None = None,
    options: Options | None = None,
) -> Outcome:
    """Give a move up: the source goes on, nothing is left on the target.

    A move whose decision has been made cannot be given up: it is brought to its end, and the
    outcome says so; take it back with `rollback`.

    Raises:
        RefusedError: there is none, or its mover is at work, or it is over.
        TryAgainError: something was in the way; the same again goes on (retryable).
        EndpointUnavailableError: a server does not answer (retryable).
    """
    topology = as_led(topology)
    known = _known(topology, logical_shard)
    return _taken_up(topology, known, Goal.ABORT, script or _none, options)


def clean(topology: Topology, logical_shard: int, *, options: Options | None = None) -> Outcome:
    """Forget the old copy of a logical shard that was moved; there is no way back then.

    Raises:
        RefusedError: there is none, or the move is not over.
        TryAgainError: something was in the way; the same again goes on (retryable).
        EndpointUnavailableError: a server does not answer (retryable).
    """
    topology = as_led(topology)
    known = _known(topology, logical_shard)
    if not known.is_handed_over:
        raise RefusedError(
            "the move is not over",
            hint="shardkit move resume goes on, shardkit move abort gives it up",
            logical_shard=logical_shard,
        )
    return _taken_up(topology, known, Goal.CLEAN, _none, options)


def rollback(topology: Topology, logical_shard: int, *, options: Options | None = None) -> Outcome:
    """Move a logical shard back, without copying: the old copy was kept current.

    Raises:
        RefusedError: it was not moved, or was cleaned.
        MoveError: the way back was given up; it stays where it is, and the old copy is gone.
        TryAgainError: something was in the way; `resume` goes on (retryable).
        EndpointUnavailableError: a server does not answer (retryable).
    """
    options = options or Options()
    topology = as_led(topology)
    known = _known(topology, logical_shard)
    if not known.is_handed_over or Step.TURN not in known.journal.done(Goal.MOVE):
        raise RefusedError(
            "there is no way back: the move is not over",
            hint="shardkit move resume goes on, shardkit move abort gives it up",
            logical_shard=logical_shard,
        )
    assert known.source is not None
    assert known.target is not None
    back = Move(str(uuid.uuid5(_BACK, known.move_id)))
    work = _work(
        topology, logical_shard, back, known.target, known.source, _none, options,
        inherits=known.move_id,
    )  # fmt: skip
    return _driver(work, Goal.MOVE, options).run()


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


def verify(
    topology: Topology,
    logical_shard: int,
    *,
    on_report: Callable[[Report], None] = lambda _report: None,
) -> Diff:
    """Compare both copies of a logical shard, whichever of them is open.

    Raises:
        RefusedError: there are not two copies that follow one another.
        MoveError: the schemas differ, or one copy does not follow any more.
        EndpointUnavailableError: a server does not answer (retryable).
    """
    topology = as_led(topology)
    known = _known(topology, logical_shard)
    done = known.journal.done(Goal.MOVE)
    if Step.FOLLOW not in done or (known.is_handed_over and Step.TURN not in done):
        raise RefusedError(
            "there are no two copies to compare yet",
            hint="shardkit move status shows how far it is",
            logical_shard=logical_shard,
        )
    assert known.source is not None
    assert known.target is not None
    work = _work(
        topology,
        logical_shard,
        Move(known.move_id, known.attempt),
        known.source,
        known.target,
        _none,
        Options(on_report=on_report),
    )
    try:
        return work.compared(is_handed_over=known.is_handed_over)
    finally:
        work.end()


def status(topology: Topology) -> tuple[list[Known], dict[str, str]]:
    """Return the moves that are not over, and which servers do not answer and why."""
    return known_moves(as_led(topology))


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


def _known(topology: Topology, logical_shard: int) -> Known:
    if not 0 <= logical_shard < topology.n_logical_shards:
        raise InvalidShardKeyError(f"there is no logical shard {logical_shard}")
    moves, silent = known_moves(topology, logical_shard)
    # Of a move and its way back, the way back was begun later.
    inherited = {move_.journal.noted("inherits") for move_ in moves}
    moves = [move_ for move_ in moves if move_.move_id not in inherited]
    if not moves or moves[0].source is None or moves[0].target is None:
        if silent:
            name, why = next(iter(silent.items()))
            raise TryAgainError(
                f"physical shard {name!r} may know of its move, and does not answer: {why}",
                logical_shard=logical_shard,
            )
        raise RefusedError("it is not being moved", logical_shard=logical_shard)
    return moves[0]


def _taken_up(
    topology: Topology, known: Known, goal: Goal, script: Script, options: Options | None
) -> Outcome:
    options = options or Options()
    assert known.source is not None
    assert known.target is not None
    is_over = known.is_handed_over and Step.CHECK in known.journal.done(Goal.MOVE)
    if goal is Goal.ABORT and known.is_handed_over and is_over:
        raise RefusedError(
            "the move is over",
            hint="shardkit move rollback goes back, shardkit move clean forgets the old copy",
            logical_shard=known.logical_shard,
        )
    work = _work(
        topology,
        known.logical_shard,
        Move(known.move_id, known.attempt + 1),
        known.source,
        known.target,
        script,
        options,
        inherits=known.journal.noted("inherits"),
    )
    return _driver(work, goal, options, is_resumed=True).run()


def _driver(work: Work, goal: Goal, options: Options, *, is_resumed: bool = False) -> Driver:
    return Driver(
        work,
        goal,
        hook=options.hook,
        is_held=options.is_held,
        stop=options.stop,
        is_resumed=is_resumed,
    )


def _work(  # noqa: PLR0917  all that a move is
    topology: Topology,
    logical_shard: int,
    begun: Move,
    source: str,
    target: str,
    script: Script,
    options: Options,
    inherits: str | None = None,
) -> Work:
    return Work(
        topology,
        logical_shard,
        begun,
        topology.physical[source],
        topology.physical[target],
        script,
        options.on_report,
        options.lock_timeout,
        inherits,
    )


def _none(_target: PhysicalShard, _logical_shard: int, _source: object) -> str:
    """Stand for a script where no schema is made."""
    raise MoveError("the copy would have to be made again", hint="give the revisions")
