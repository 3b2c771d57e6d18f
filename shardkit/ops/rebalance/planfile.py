"""Plans in files: what was decided, of which cluster, and whether it still is the right thing.

`shardkit rebalance plan --out FILE` writes one, `apply FILE` does what it says. `remaining` is
pure: it compares the file with the cluster of now, and returns what is left to be done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shardkit.errors import ConfigurationError, RefusedError
from shardkit.ops.files import replace_file
from shardkit.ops.rebalance.facts import Constraints, Plan, PlannedMove, Situation
from shardkit.ops.rebalance.planner import excess_with

__all__ = ["PlanFile", "read", "remaining", "write", "write_text"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Constraints(_Part):
    weights: Mapping[str, Fraction]
    drained: Sequence[str]
    pins: Mapping[int, str]
    tolerance: Fraction
    load_tolerance: Fraction | None
    max_moves: int | None


class _Move(_Part):
    logical_shard: int
    source: str
    target: str
    epoch: int
    size_bytes: Annotated[int, Field(ge=0)]
    why: str


class PlanFile(_Part):
    """What stands in a file.

    Attributes:
        version: of this layout.
        cluster: name of the cluster.
        made: when, as ISO 8601 in UTC.
        constraints: what the plan keeps to.
        owners: the owner of every logical shard when it was made, by number.
        moves: what is to be done, in this order.
    """

    version: Literal[1] = 1
    cluster: str
    made: str
    constraints: _Constraints
    owners: Sequence[str]
    moves: Sequence[_Move]

    @property
    def planned(self) -> tuple[PlannedMove, ...]:
        """The moves as values."""
        return tuple(PlannedMove(**move.model_dump()) for move in self.moves)

    @property
    def kept(self) -> Constraints:
        """The constraints as values."""
        found = self.constraints
        return Constraints(
            weights=dict(found.weights),
            drained=frozenset(found.drained),
            pins=dict(found.pins),
            tolerance=found.tolerance,
            load_tolerance=found.load_tolerance,
            max_moves=found.max_moves,
        )


def write(
    path: Path, situation: Situation, constraints: Constraints, plan: Plan, *, made: str
) -> None:
    """Write a plan whole or not at all.

    Args:
        path: the file; one that exists is replaced.
        situation: what the plan was made from.
        constraints: what it keeps to.
        plan: what is to be done.
        made: the time now, as ISO 8601.

    Raises:
        ConfigurationError: the file cannot be written.
    """
    found = PlanFile(
        cluster=situation.cluster,
        made=made,
        constraints=_Constraints(
            weights=constraints.weights,
            drained=sorted(constraints.drained),
            pins=constraints.pins,
            tolerance=constraints.tolerance,
            load_tolerance=constraints.load_tolerance,
            max_moves=constraints.max_moves,
        ),
        owners=[shard.owner for shard in situation.shards],
        moves=[_Move.model_validate(move, from_attributes=True) for move in plan.moves],
    )
    write_text(path, found.model_dump_json(indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, readable by all.

    Raises:
        ConfigurationError: it cannot be written.
    """
    try:
        replace_file(path, text, 0o644)
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be written: {error.strerror}") from error


def read(path: Path) -> PlanFile:
    """Read a plan.

    Raises:
        ConfigurationError: there is no such file, or it holds something else.
    """
    try:
        return PlanFile.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigurationError(
            f"{path}: cannot be read: {error.strerror}",
            hint="shardkit rebalance plan --out writes a plan",
        ) from error
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise ConfigurationError(
            f"{path}: is no plan: {where or 'the file'}: {problem['msg']}",
            hint="shardkit rebalance plan --out writes a plan",
        ) from None


def remaining(file: PlanFile, situation: Situation) -> tuple[PlannedMove, ...]:
    """Return the moves of a plan that are left to be done.

    Args:
        file: the plan.
        situation: the cluster now.

    Raises:
        RefusedError: the plan is of another cluster, or the cluster is not any more what it was
            made from; the message says what has changed.
    """
    if file.cluster != situation.cluster:
        raise _stale(f"it is for the cluster {file.cluster!r}, and this is {situation.cluster!r}")
    if len(file.owners) != len(situation.shards):
        raise _stale(f"it knows {len(file.owners)} logical shards of {len(situation.shards)}")
    planned = {move.logical_shard: move for move in file.planned}
    for shard, owner in zip(situation.shards, file.owners, strict=True):
        move = planned.pop(shard.number, None)
        ends = {owner} if move is None else {move.source, move.target}
        if shard.owner not in ends:
            raise _stale(
                f"logical shard {shard.number} was on {owner!r} and is on {shard.owner!r} now"
            )
    if planned:
        raise _stale(f"it moves logical shard {min(planned)}, which does not exist")
    owners = {shard.number: shard.owner for shard in situation.shards}
    left = tuple(move for move in file.planned if owners[move.logical_shard] == move.source)
    unknown = {move.target for move in left} - set(situation.physical)
    if unknown:
        raise _stale(f"no physical shard is called {min(unknown)!r} any more")
    if left and all(move.why == "balance" for move in left):
        now, then = excess_with(situation, file.kept, left)
        if then > now:
            raise _stale(
                f"sizes have changed: it would leave physical shards {then} % beyond the "
                f"tolerance together, and now they are {now} %"
            )
    return left


def _stale(why: str) -> RefusedError:
    return RefusedError(
        f"the plan is stale: {why}", hint="make a new one with shardkit rebalance plan --out"
    )
