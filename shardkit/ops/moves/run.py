"""Moves as functions, for commands, rebalancing and tests; exported by `shardkit.ops.moves`."""

from __future__ import annotations

import uuid
from collections.abc import Callable

from shardkit.errors import (
    InvalidShardKeyError,
    MoveError,
    RefusedError,
    TryAgainError,
)
from shardkit.ops.moves.driver import Driver, Outcome
from shardkit.ops.moves.journal import Known, known_moves
from shardkit.ops.moves.machine import Goal, Step
from shardkit.ops.moves.planning import Options, plan
from shardkit.ops.moves.rows import Diff
from shardkit.ops.moves.transitions import Move
from shardkit.ops.moves.work import Report, Script, Work
from shardkit.ops.placed import as_led
from shardkit.topology import PhysicalShard, Topology

__all__ = ["abort", "clean", "move", "resume", "rollback", "status", "verify"]

_BACK = uuid.UUID("7b1d8f43-6b6e-4a52-9d33-6f1f5d0a8c11")
"""Name space of the ids of ways back: each follows from the move it takes back."""


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
    if goal is Goal.ABORT and known.is_decided:
        goal = Goal.MOVE  # there is no way but forward, to its very end
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
        notice=options.notice,
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
