"""The journal of a move, and where a move that was begun stands: read from every primary.

The journal is on the target, since the copy it speaks of is there; which move has a logical shard
is in the ownership rows. So nothing about a move is known to the mover alone. Called by
`shardkit.ops.moves` and its driver; changes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import psycopg

from shardkit.errors import EndpointUnavailableError
from shardkit.ops.direct import connect
from shardkit.ops.moves.machine import Goal, Step
from shardkit.ops.moves.transitions import Row
from shardkit.ownership import State
from shardkit.topology import Topology

__all__ = ["Entry", "Journal", "Known", "known_moves", "read_journal"]

_STEPS = frozenset(step.value for step in Step)
_GOALS = frozenset(goal.value for goal in Goal)

# AccessShareLock on two small tables.
_KNOWN = """
SELECT o.logical_shard, o.epoch, o.state, o.moved_to, o.move_id::text, o.attempt,
    pg_catalog.date_part('epoch', o.fenced_at), o.fence_timeline
FROM shardkit.ownership AS o
WHERE (o.move_id IS NOT NULL OR o.logical_shard = %(one)s)
    AND (%(one)s::integer IS NULL OR o.logical_shard = %(one)s)
"""

_JOURNAL = """
SELECT move_id::text, attempt, step, is_done, detail,
    pg_catalog.date_part('epoch', pg_catalog.clock_timestamp() - noted)
FROM shardkit.move_journal WHERE logical_shard = %s AND move_id = %s::uuid
ORDER BY entry
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the journal.

    Attributes:
        age: seconds since it was written.
    """

    move_id: str
    attempt: int
    step: str
    is_done: bool
    detail: Mapping[str, Any]
    age: float


@dataclass(frozen=True, slots=True)
class Journal:
    """What the journal says of one move.

    Attributes:
        entries: oldest first.
    """

    entries: tuple[Entry, ...] = ()

    def done(self, goal: Goal) -> frozenset[Step]:
        """Return the steps that are done for a goal; a copy that was begun anew undoes some."""
        found: set[Step] = set()
        for entry in self.entries:
            name, _, step = entry.step.rpartition(": ")
            if (name or Goal.MOVE) != goal or step.lower() not in _STEPS:
                continue
            if entry.is_done:
                found.add(Step(step.lower()))
        return frozenset(found)

    @property
    def goal(self) -> Goal:
        """The last goal that was written down."""
        for entry in reversed(self.entries):
            name, _, _ = entry.step.rpartition(": ")
            if name in _GOALS:
                return Goal(name)
        return Goal.MOVE

    @property
    def ends(self) -> tuple[str, str] | None:
        """Names of source and target, as they were written down at the beginning."""
        for entry in self.entries:
            if "source" in entry.detail:
                return entry.detail["source"], entry.detail["target"]
        return None

    def noted(self, key: str) -> Any:
        """Return what was last noted under a name, or None."""
        for entry in reversed(self.entries):
            if key in entry.detail:
                return entry.detail[key]
        return None


@dataclass(frozen=True, slots=True)
class Known:
    """A move that somebody has begun and that is not over.

    Attributes:
        logical_shard: that is moved.
        move_id: a UUID.
        attempt: the last.
        source: name; None where only its target is known.
        target: name; None where nobody says.
        rows: ownership rows of the logical shard, by physical shard.
        journal: what the target has written.
    """

    logical_shard: int
    move_id: str
    attempt: int
    source: str | None
    target: str | None
    rows: Mapping[str, Row] = field(default_factory=dict)
    journal: Journal = field(default_factory=Journal)

    @property
    def step(self) -> str:
        """The last step that was begun or done."""
        for entry in reversed(self.journal.entries):
            if entry.step.rpartition(": ")[2].lower() in _STEPS:
                return f"{entry.step.lower()} {'done' if entry.is_done else 'begun'}"
        return "begun"

    @property
    def since(self) -> float | None:
        """Seconds since the journal was written to."""
        return self.journal.entries[-1].age if self.journal.entries else None

    @property
    def advice(self) -> str:
        """What its operator may do."""
        if self.is_handed_over and Step.CHECK in self.journal.done(Goal.MOVE):
            return "moved: clean, or rollback"
        if self.is_handed_over:
            return "resume; handed over"
        if self.journal.goal is Goal.ABORT:
            return "resume goes on giving up"
        return "resume or abort, if its mover has gone"

    @property
    def is_decided(self) -> bool:
        """Whether the source has handed over, as far as it answers."""
        row = self.rows.get(self.source or "")
        return row is not None and row.state is State.RETIRED and row.moved_to == self.target

    @property
    def is_handed_over(self) -> bool:
        """Whether the target is open."""
        row = self.rows.get(self.target or "")
        return row is not None and row.state in {State.ACTIVE, State.FENCED}


def read_journal(connection: psycopg.Connection[Any], logical_shard: int, move_id: str) -> Journal:
    """Return the journal of a move from its target; elsewhere an empty one."""
    rows = connection.execute(_JOURNAL, (logical_shard, move_id))
    return Journal(tuple(Entry(*row) for row in rows))


def known_moves(
    topology: Topology, logical_shard: int | None = None
) -> tuple[list[Known], dict[str, str]]:
    """Return the moves that are not over, by logical shard, and which servers do not answer.

    Args:
        topology: the cluster.
        logical_shard: only this one; None for all.
    """
    names = list(topology.physical)
    with ThreadPoolExecutor(len(names)) as pool:
        asked = pool.map(lambda name: _rows(topology, name, logical_shard), names)
        answers = dict(zip(names, asked, strict=True))
        silent = {name: found for name, found in answers.items() if isinstance(found, str)}
        rows: dict[int, dict[str, Row]] = {}
        for name, found in answers.items():
            for number, row in [] if isinstance(found, str) else found:
                rows.setdefault(number, {})[name] = row
        claims = {
            (number, row.move_id)
            for number, at in rows.items()
            for row in at.values()
            if row.move_id is not None
        }
        up = [name for name in names if name not in silent] if claims else []
        read = pool.map(lambda name: _journals(topology, name, claims), up)
        journals = {
            key: (name, journal)
            for name, found in zip(up, read, strict=True)
            for key, journal in found.items()
        }
    moves = [_known(number, move_id, rows[number], journals) for number, move_id in sorted(claims)]
    return moves, silent


def _known(
    number: int,
    move_id: str,
    rows: Mapping[str, Row],
    journals: Mapping[tuple[int, str], tuple[str, Journal]],
) -> Known:
    claimed = {name: row for name, row in rows.items() if row.move_id == move_id}
    where, journal = journals.get((number, move_id), (None, Journal()))
    source, target = journal.ends or (None, where)
    for name, row in claimed.items():
        if row.moved_to is not None and row.state in {State.FENCED, State.RETIRED}:
            source, target = source or name, target or row.moved_to
        elif row.state is State.IMPORTING:
            target = target or name
    attempt = max(row.attempt for row in claimed.values())
    return Known(number, move_id, attempt, source, target, rows, journal)


def _rows(topology: Topology, name: str, logical_shard: int | None) -> list[tuple[int, Row]] | str:
    try:
        with (
            suppress(psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn),
            connect(topology.physical[name], application="shardkit moves", patience=5.0) as asked,
        ):
            return [
                (number, Row(epoch, State(state), *others))
                for number, epoch, state, *others in asked.execute(_KNOWN, {"one": logical_shard})
            ]
    except (EndpointUnavailableError, psycopg.OperationalError) as error:
        return str(error).strip().splitlines()[0]
    return []


def _journals(
    topology: Topology, name: str, claims: Collection[tuple[int, str]]
) -> dict[tuple[int, str], Journal]:
    with (
        suppress(EndpointUnavailableError, psycopg.Error),
        connect(topology.physical[name], application="shardkit moves", patience=5.0) as asked,
    ):
        found = {claim: read_journal(asked, *claim) for claim in claims}
        return {claim: journal for claim, journal in found.items() if journal.entries}
    return {}
