"""A database server that is simulated: snapshots, row locks, replicas, ownership, a sequence.

Serves as PostgreSQL does at READ COMMITTED and REPEATABLE READ: snapshots are of a point in the
order of commits, writers wait for row locks, and at REPEATABLE READ the second writer of a row
fails. Logical shards have an owner with an epoch and can be fenced and handed over. Each protection
can be switched off (`tests.simulation.bugs`), to see that judges notice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

from shardkit.ops.moves.transitions import Row
from shardkit.ownership import State
from tests.simulation.answers import Error, Ok, Place, Transaction
from tests.simulation.holding import Holding
from tests.simulation.scheduler import Reply, Simulation

__all__ = ["Database", "placed"]

_GONE: Final = Error("no transaction")
_LONGEST: Final = 2.0
"""Seconds after which a transaction is rolled back: its client is gone."""

_UPDATES: Final[dict[str, Callable[[Any, Any], Any]]] = {
    "append": lambda old, new: (*(old or ()), new),
    "set": lambda _, new: new,
    "add": lambda old, new: (old or 0) + new,
}


def placed() -> Row:
    """Return the ownership row of a first placement."""
    return Row(1, State.ACTIVE)


class Database(Holding):
    """A primary with one replica.

    Attributes:
        sequence: number of the last commit.
        timeline: grows with every promotion.
        replayed: number of the last commit that the replica shows.
        log: what each commit wrote, by number from 1.
    """

    def __init__(self, simulation: Simulation, name: str, bugs: frozenset[str]) -> None:
        super().__init__(simulation, name)
        self.bugs = bugs
        self.rows: dict[Place, list[tuple[int, Any]]] = {}
        self.log: list[dict[Place, Any]] = []
        self.sequence = 0
        self.timeline = 1
        self.replayed = 0
        self.lag = 0.01
        self._replays_at = 0.0
        self._open: dict[Any, Transaction] = {}
        self._closed: set[Any] = set()  # names that came to their end here: late statements fail
        self._holders: dict[Place, Transaction] = {}
        self._queue: dict[Place, list[Callable[[], bool]]] = {}

    # -- messages

    def handle(self, request: Any, reply: Reply) -> None:
        getattr(self, f"_on_{request[0]}")(reply, *request[1:])

    def _on_read(self, reply: Reply, name: Any, is_snapshot: bool, place: Place) -> None:
        if (t := self._transaction(name, is_snapshot)) is None:
            reply(_GONE)
            return
        if (refused := self.refused(place[0], t)) is not None:
            reply(self._failed(name, refused))
            return
        if place in t.writes:
            reply(Ok(t.writes[place]))
            return
        if "dirty read" in self.bugs:
            holder = self._holders.get(place)
            if holder is not None and place in holder.writes:
                reply(Ok(holder.writes[place]))
                return
        reply(Ok(self.value(place, self._point(t))))

    def _on_scan(self, reply: Reply, name: Any, is_snapshot: bool, shard: int, table: str) -> None:
        if (t := self._transaction(name, is_snapshot)) is None:
            reply(_GONE)
            return
        if (refused := self.refused(shard, t)) is not None:
            reply(self._failed(name, refused))
            return
        reply(Ok(dict(self.scan(shard, table, self._point(t)))))

    def _on_peek(self, reply: Reply, shard: int, table: str) -> None:
        """Read a table in a transaction of its own."""
        refused = self.refused(shard, None)
        reply(refused or Ok(dict(self.scan(shard, table, self.sequence))))

    def _on_update(
        self, reply: Reply, name: Any, is_snapshot: bool, place: Place, how: str, value: Any
    ) -> None:
        if (t := self._transaction(name, is_snapshot)) is None:
            reply(_GONE)
            return
        self._point(t)

        def attempt() -> bool:
            """Take the lock and write; False when it is not to be had yet."""
            if not t.is_open:
                return True
            if (refused := self.refused(place[0], t, writes=True)) is not None:
                reply(self._failed(name, refused))
                return True
            holder = self._holders.get(place)
            if (holder is not None and holder is not t) or self.is_locked(place[0], t):
                return False
            latest, versions = 0, self.rows.get(place)
            if versions:
                latest = versions[-1][0]
            if is_snapshot and latest > (t.seen or 0) and "lost update" not in self.bugs:
                reply(self._failed(name, Error("serialization")))
                return True
            self._holders[place] = t
            t.locks.add(place)
            old = t.writes[place] if place in t.writes else self.value(place, self.sequence)
            if "lost update" in self.bugs and is_snapshot and place not in t.writes:
                old = self.value(place, t.seen or 0)
            t.writes[place] = _UPDATES[how](old, value)
            reply(Ok(t.writes[place]))
            return True

        if not attempt():
            self._queue.setdefault(place, []).append(attempt)

    def _on_commit(self, reply: Reply, name: Any) -> None:
        t = self._open.get(name)
        if t is None:  # it was rolled back, or the server has restarted since
            reply(_GONE)
            return
        life = self.life

        def finish() -> None:
            """Commit once the replica has it: until then nobody sees it and locks are held."""
            if self.life != life or not t.is_open:
                return
            self._apply(t.writes)
            stamp = None
            for n in {place[0] for place in t.writes}:
                stamp = (self.name, self.timeline, self.epoch_of(n))
            self._forget(name)
            self._close(t)
            reply(Ok((self.sequence, stamp)))

        if t.writes and "lost by failover" not in self.bugs:
            self.simulation.at(self.simulation.random.random() * 0.004, finish)
        else:
            finish()

    def _on_rollback(self, reply: Reply, name: Any) -> None:
        self._failed(name, Error("rolled back"))
        reply(Ok())

    def _on_next(self, reply: Reply, shard: int) -> None:
        if (refused := self.refused(shard, None, writes=True)) is not None:
            reply(refused)
            return
        self.sequences[shard] = self.sequences.get(shard, 0) + 1
        reply(Ok(shard * 1_000_000 + self.sequences[shard]))

    def _on_replica(self, reply: Reply, place: Place, least: tuple[str, int, int]) -> None:
        """Read on the replica, if it has replayed what the token names."""
        server, timeline, sequence = least
        if (refused := self.refused(place[0], None)) is not None:
            reply(refused)
            return
        knows = server in {"", self.name} and timeline in {0, self.timeline}
        if not ("stale replica read" in self.bugs or (knows and sequence <= self.replayed)):
            reply(Error("behind"))
            return
        token = (self.name, self.timeline, self.replayed)
        reply(Ok((self.value(place, self.replayed), token)))

    # -- faults

    def crash(self) -> None:
        """Lose what is not committed."""
        super().crash()
        for t in self._open.values():
            t.is_open = False
        self._closed |= self._open.keys()
        self._open.clear()
        self._holders.clear()
        self._queue.clear()
        self._locked.clear()
        self._changing.clear()

    def promote(self) -> None:
        """Go on as the replica: on a new timeline, with what it has received."""
        if "lost by failover" in self.bugs:
            kept = self.replayed
            del self.log[kept:]
            for versions in self.rows.values():
                while versions and versions[-1][0] > kept:
                    versions.pop()
            self.sequence = kept
        self.timeline += 1
        self.replayed = self.sequence
        self.register()
        self.restart()
        self.simulation.say(self.name, f"is promoted to timeline {self.timeline}")

    # -- inside

    def value(self, place: Place, at: int) -> Any:
        """Return a row as of a commit."""
        for number, value in reversed(self.rows.get(place, ())):
            if number <= at:
                return value
        return None

    def scan(self, shard: int, table: str, at: int) -> Iterator[tuple[Any, Any]]:
        """Yield the rows of a table as of a commit."""
        for place in self.rows:
            if place[0] == shard and place[1] == table:
                value = self.value(place, at)
                if value is not None:
                    yield place[2], value

    def _transaction(self, name: Any, is_snapshot: bool) -> Transaction | None:
        t = self._open.get(name)
        if t is None and name not in self._closed:
            t = self._open[name] = Transaction(is_snapshot)
            self.simulation.at(_LONGEST, self._expire, name)
        return t

    def _expire(self, name: Any) -> None:
        if name in self._open:
            self._failed(name, _GONE)

    def _forget(self, name: Any) -> Transaction | None:
        self._closed.add(name)
        return self._open.pop(name, None)

    def _point(self, t: Transaction) -> int:
        """Return as of which commit a statement reads."""
        if t.seen is None:
            t.seen = self.sequence
        return t.seen if t.is_snapshot and "read skew" not in self.bugs else self.sequence

    def _failed(self, name: Any, error: Error) -> Error:
        t = self._forget(name)
        if t is not None:
            self._close(t)
        return error

    def _close(self, t: Transaction) -> None:
        t.is_open = False
        freed = list(t.locks)
        for place in freed:
            del self._holders[place]
        for place in freed:
            self.wake(place)

    def _apply(self, writes: dict[Place, Any]) -> None:
        if not writes:
            return
        if "lost write" in self.bugs and self.simulation.random.random() < 0.05:
            return
        self.sequence += 1
        self.log.append(writes)
        for place, value in writes.items():
            self.rows.setdefault(place, []).append((self.sequence, value))
        number, simulation = self.sequence, self.simulation
        lag = simulation.random.random() * self.lag
        self._replays_at = max(self._replays_at, simulation.now + lag)
        simulation.at(self._replays_at - simulation.now, self._replayed, number, self.timeline)

    def _replayed(self, number: int, timeline: int) -> None:
        if timeline == self.timeline:
            self.replayed = max(self.replayed, number)
