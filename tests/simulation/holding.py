"""Ownership on a simulated server: production rows and steps, journals, copies that follow.

Rows change by `shardkit.ops.moves.transitions.step` and in no other way. What a step asks for is
done as PostgreSQL does it: a lock waits for writers under way and holds up those that come, and
all of it holds at COMMIT or none. Subscriptions are of the server, not of the mover.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from shardkit.errors import RefusedError
from shardkit.ops.moves.transitions import (
    Action,
    Decide,
    Event,
    Expire,
    Fence,
    Move,
    Promote,
    Row,
    step,
)
from shardkit.ownership import State
from tests.simulation.answers import Error, Ok, Place, Transaction
from tests.simulation.scheduler import LOST, Call, Reply, Server, Steps

__all__ = ["Holding", "Subscription", "Timed"]

_LOCK_TIMEOUT: Final = 0.25
_SEQUENCE_MARGIN: Final = 100


@dataclass(frozen=True, slots=True)
class Timed:
    """An event that is made of the server's time and timeline.

    Attributes:
        kind: `Fence`, `Decide` or `Expire`.
        about: its other values.
    """

    kind: type[Fence | Decide | Expire]
    about: tuple[Any, ...]

    def __call__(self, at: float, timeline: int) -> Event:
        """Return the event."""
        if self.kind is Expire:
            return Expire(at, timeline, *self.about)
        if self.kind is Fence:
            move, to = self.about
            return Fence(move, to, at, timeline)
        (move,) = self.about
        return Decide(move, timeline)


@dataclass(slots=True)
class Subscription:
    """A copy that follows its source.

    Attributes:
        source: the server that it follows.
        at: number of the last commit of the source that was applied.
        timeline: of the source when it began: its slot does not follow a failover.
        broken: why it cannot go on, or None.
    """

    source: Holding
    at: int
    timeline: int
    broken: str | None = None


class Holding(Server):
    """What a server knows of logical shards, besides their rows.

    Attributes:
        shards: ownership rows by logical shard.
        sequences: ids that were handed out, by logical shard.
        journal: steps that are done, by move: attempt, goal, step.
        subscriptions: copies that follow, by logical shard.
        attempts: the last one that was noted, by move.
    """

    bugs: frozenset[str]
    rows: dict[Place, list[tuple[int, Any]]]
    log: list[dict[Place, Any]]
    sequence: int
    timeline: int
    _open: dict[Any, Transaction]
    _queue: dict[Place, list[Callable[[], bool]]]
    _apply: Callable[[dict[Place, Any]], None]
    scan: Callable[..., Any]

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.shards: dict[int, Row] = {}
        self.sequences: dict[int, int] = {}
        self.journal: dict[str, list[tuple[int, str, str]]] = {}
        self.subscriptions: dict[int, Subscription] = {}
        self.attempts: dict[str, int] = {}
        self._locked: set[int] = set()
        self._changing: set[int] = set()

    def state_of(self, n: int) -> State | None:
        """Return what the server is to a logical shard."""
        row = self.shards.get(n)
        return None if row is None else row.state

    def refused(self, n: int, t: Transaction | None, *, writes: bool = False) -> Error | None:
        """Return why a statement may not run here, or None."""
        row = self.shards.get(n)
        if row is None or row.state in {State.RETIRED, State.IMPORTING}:
            if row is not None and row.epoch and "old owner writes" in self.bugs:
                return None
            return Error("moved", row.moved_to if row else "")
        if writes and row.state is State.FENCED and not (t and t.has_written(n)):
            return Error("fenced")
        return None

    def epoch_of(self, n: int) -> int:
        """Return the epoch with which the server stamps what it writes."""
        row = self.shards[n]
        return row.epoch - (row.state is State.RETIRED)

    # -- ownership rows

    def _on_change(self, reply: Reply, n: int, event: Event | Timed) -> None:
        """Let an event happen to a row in one transaction; as `transactions.change` does."""
        if n in self._changing:
            reply(Error("busy"))
            return
        if isinstance(event, Timed):
            event = event(self.simulation.now, self.timeline)
        before = self.shards.get(n)
        try:
            decided = step(before, event)
        except RefusedError as refused:
            reply(Error("refused", str(refused)))
            return
        self._changing.add(n)
        life, row = self.life, decided.row
        if isinstance(event, Decide) and "epoch not raised" in self.bugs and before is not None:
            row = replace(row, epoch=before.epoch)

        def finish() -> None:
            """Commit; locks are held until then."""
            if self.life != life:
                return
            self.shards[n] = row
            self._unlock(n)
            reply(Ok((before, row, self.sequence)))

        def commit() -> None:
            self.simulation.at(self.simulation.random.random() * 0.004, finish)

        if Action.LOCK not in decided.actions or "unlocked fence" in self.bugs:
            commit()
            return
        until = self.simulation.now + _LOCK_TIMEOUT
        self._locked.add(n)

        def look() -> None:
            if self.life != life:
                return
            if not any(t.has_written(n) for t in self._open.values()):
                commit()
            elif self.simulation.now >= until:
                self._unlock(n)
                reply(Error("busy"))
            else:
                self.simulation.at(0.01, look)

        look()

    def _unlock(self, n: int) -> None:
        self._changing.discard(n)
        self._locked.discard(n)
        for place in [place for place in self._queue if place[0] == n]:
            self.wake(place)

    def is_locked(self, n: int, t: Transaction) -> bool:
        """Tell whether a writer has to wait for whoever locks the tables of a logical shard."""
        return n in self._locked and not t.has_written(n)

    def wake(self, place: Place) -> None:
        """Let those go on who wait for a row and can."""
        waiting = self._queue.pop(place, [])
        while waiting and waiting[0]():
            waiting.pop(0)
        if waiting:
            self._queue.setdefault(place, [])[:0] = waiting

    def _on_look(self, reply: Reply, n: int, move: str) -> None:
        """Say what is known of a logical shard and of a move."""
        reply(
            Ok(
                (
                    self.shards.get(n), self.timeline, self.simulation.now, self.sequence,
                    tuple(self.journal.get(move, ())), self.subscriptions.get(n),
                )
            )
        )  # fmt: skip

    def _on_note(self, reply: Reply, move: str, attempt: int, goal: str, step_: str) -> None:
        self.journal.setdefault(move, []).append((attempt, goal, step_))
        reply(Ok())

    # -- copies

    def _on_as(self, reply: Reply, move: Move, request: tuple[Any, ...]) -> None:
        """Do what a mover asks for, unless a later attempt has taken over: messages come late."""
        if move.attempt < self.attempts.get(move.id, 0):
            reply(Error("refused", "another attempt"))
            return
        self.handle(request, reply)

    def _on_attempt(self, reply: Reply, move: Move) -> None:
        """Note that an attempt begins."""
        self.attempts[move.id] = max(move.attempt, self.attempts.get(move.id, 0))
        reply(Ok())

    def _on_changes(self, reply: Reply, n: int, since: int) -> None:
        """Return what commits after one have written in a logical shard, and the last number."""
        changes = [
            {place: value for place, value in writes.items() if place[0] == n}
            for writes in self.log[since:]
        ]
        reply(Ok((changes, self.sequence, self.timeline)))

    def _on_drop(self, reply: Reply, n: int) -> None:
        """Forget the rows of a logical shard that is not owned."""
        assert self.state_of(n) not in {State.ACTIVE, State.FENCED}, "nobody drops what is used"
        for place in [place for place in self.rows if place[0] == n]:
            del self.rows[place]
        reply(Ok())

    def _on_copy(self, reply: Reply, n: int, changes: list[dict[Place, Any]]) -> None:
        for writes in changes:
            self._apply(writes)
        reply(Ok())

    def _on_follow(self, reply: Reply, n: int, source: Holding, at: int, timeline: int) -> None:
        if n not in self.subscriptions:
            found = self.subscriptions[n] = Subscription(source, at, timeline)
            self.simulation.spawn(f"apply {n}", self._follows(n, found))
        reply(Ok())

    def _follows(self, n: int, mine: Subscription) -> Steps:
        """Apply what the source commits, in order, until it is dropped or cannot go on."""
        while self.subscriptions.get(n) is mine and mine.broken is None:
            yield 0.1 if "catch-up not awaited" in self.bugs else 0.01
            answer = yield Call(mine.source, ("changes", n, mine.at), 0.2)
            if answer is LOST or not self.is_up:
                continue
            changes, at, timeline = answer.value
            if timeline != mine.timeline:
                mine.broken = "the slot went with the old primary"
            elif self.subscriptions.get(n) is mine:
                for writes in changes:
                    self._apply(writes)
                mine.at = at

    def _on_unfollow(self, reply: Reply, n: int) -> None:
        self.subscriptions.pop(n, None)
        reply(Ok())

    def _on_rows(self, reply: Reply, n: int, at: int | None) -> None:
        """Return the rows of a logical shard as of a commit, or now."""
        point = self.sequence if at is None else at
        reply(
            Ok(
                {
                    place: value
                    for place in self.rows
                    if place[0] == n and (value := self.value(place, point)) is not None
                }
            )
        )

    def value(self, place: Place, at: int) -> Any:
        """Return a row as of a commit."""
        raise NotImplementedError

    def _on_sequence(self, reply: Reply, n: int, value: int) -> None:
        """Let ids go on behind those of the source."""
        self.sequences[n] = 0 if "sequence not advanced" in self.bugs else value
        reply(Ok())

    def _on_last_id(self, reply: Reply, n: int) -> None:
        reply(Ok(self.sequences.get(n, 0)))

    # -- failover

    def register(self) -> None:
        """Raise the epochs of what a promoted server owns; as `transactions.promote` does."""
        for n, row in self.shards.items():
            self.shards[n] = step(row, Promote()).row
            # Beyond what was handed out and not replicated.
            self.sequences[n] = self.sequences.get(n, 0) + _SEQUENCE_MARGIN
