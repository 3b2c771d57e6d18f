"""The steps of the cache model for a list or count, whose writers do not lock each other.

    python -m tests.property.modelcheck P9 --lists --writers 3 --readers 1 --faults evict

Each writer adds one row to every list of its transaction, and what a list shows is which writers'
rows are in it, as bits. Writers commit in any order: the number of a transaction says nothing about
that. What a fill has is as new as the oldest transaction that was running when it was read; in a
`next` configuration, as a control, as new as the newest that had begun. Everything else, the
machines, the server and the faults, is the model of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from shardkit.caching.operations import Entry, Kind
from shardkit.caching.reader import Reader, Source
from shardkit.caching.writer import Writer
from tests.property.cachecontrols import ControlReader, ControlWriter
from tests.property.cachemodel import (
    _BUDGET,
    _EPOCH,
    _FIRST,
    _PATIENCE,
    _PENDING,
    _RELAY,
    _SEQ,
    Actor,
    Configuration,
    Model,
    State,
    _ghost,
    _put,
    _shown,
    _tidy,
)

_EMPTY = 1
"""Contents of a list to which no writer has added; its bit is always set."""


class Listed(NamedTuple):
    """One list in the database.

    Attributes:
        running: numbers of the transactions that have not ended.
        content: rows that are committed.
        acknowledged: rows of writers that were told.
        floor: least version that the session which wrote those may be shown.
        before: version and rows as a replica has them that is one commit behind.
    """

    running: tuple[int, ...] = ()
    content: int = _EMPTY
    acknowledged: int = _EMPTY
    floor: int = 0
    before: tuple[int, int] = (0, 0)


class ListModel(Model):
    """All the steps of one configuration of writers of the same lists."""

    def __init__(self, configuration: Configuration) -> None:
        super().__init__(configuration)
        assert "failover" not in self.names
        assert not configuration.deletes
        assert not configuration.previous

    def starts(self) -> Iterator[State]:
        """Every list cached as it is, and none."""
        first = self.rows(Listed())
        for number in (0, self.entries(Entry((0, 0), Kind.VALUE, 1, _ghost(_EMPTY)))):
            fixed = [1, 0, 0, 1, 1, self.flights(()), self.outboxes(())]
            fixed += [self.budgets(self.full), self.idle]
            n = self.c.n_keys
            yield (*fixed, *[first] * n, *[number] * n, *[self.idle] * self.n_actors)

    def is_stale(self, s: State) -> bool:
        """Whether the cache shows something that is not what the database has."""
        for key in range(self.c.n_keys):
            shown = _shown(self.entries.values[s[self.at_slots + key]])
            if shown is not None and shown != self.rows.values[s[_FIRST + key]].content:
                return True
        return False

    # -- writers: `Actor.began` is the number of the transaction, `serials` the bits it adds

    def _lock(self, s: State, i: int) -> State:
        """Write; nobody waits for anybody."""
        number, bit = s[_SEQ], 2 << (i - self.at_actors)
        changed = list(s)
        changed[_SEQ] += 1
        machines: list[Any] = []
        for key in range(self.c.n_keys):
            row = self.rows.values[s[_FIRST + key]]
            running = (*row.running, number)
            changed[_FIRST + key] = self.rows(row._replace(running=running))
            if self.ours:
                machines.append(Writer.begin(f"k{key}", number + 1, None))
            else:  # what it would write through is what it sees with its own row
                seen = _ghost(row.content | bit)
                machines.append(ControlWriter(self.c.protocol, f"k{key}", number + 1, seen))
        bits = (bit,) * self.c.n_keys
        changed[i] = self.actors(Actor(1, s[_EPOCH], tuple(machines), bits, number))
        return tuple(changed)

    def _unlock(self, s: State, i: int) -> State:
        """End a transaction that has not committed."""
        actor = self.actors.values[s[i]]
        is_writer = i - self.at_actors < self.c.writers
        return self._ended(s, actor.began) if is_writer and actor.step == 1 else s

    def _ended(self, s: State, number: int, bit: int = 0) -> State:
        changed = list(s)
        for key in range(self.c.n_keys):
            row = self.rows.values[s[_FIRST + key]]
            running = tuple(n for n in row.running if n != number)
            before = row.before
            if bit and "replica" in self.names:
                before = (self._version(s, row), row.content)
            content = row.content | bit
            changed[_FIRST + key] = self.rows(
                row._replace(running=running, content=content, before=before)
            )
        return tuple(changed)

    def _version(self, s: State, row: Listed) -> int:
        """What `pg_snapshot_xmin` says now."""
        return s[_SEQ] if self.c.next or not row.running else min(row.running)

    def _commit(self, s: State, i: int, actor: Actor, who: str) -> tuple[str, State, str]:
        changed = list(self._ended(s, actor.began, actor.serials[0]))
        if self.relay:
            events = tuple((key, actor.began + 1) for key in range(self.c.n_keys))
            changed[_PENDING] = self.outboxes((*self.outboxes.values[s[_PENDING]], *events))
        machines = tuple(machine.committed() for machine in actor.machines)
        after = self.actors(_tidy(actor._replace(step=2, machines=machines, wrote=True)))
        return self._become(tuple(changed), i, s[i], after, f"{who} commits")

    def _become(
        self, s: State, i: int, before: int, after: int, name: str
    ) -> tuple[str, State, str]:
        """Put an actor's new state in place; acknowledge, and judge what a reader was shown."""
        new = self.actors.values[after]
        if i == _RELAY or new.step not in {7, 8}:
            return super()._become(s, i, before, after, name)
        changed = list(s)
        changed[i] = self.gone
        violated = ""
        if new.step == 8 and new.wrote:
            for key, bit in enumerate(new.serials):
                row = self.rows.values[s[_FIRST + key]]
                told = row.acknowledged | bit
                floor = max(row.floor, new.began + 1)
                changed[_FIRST + key] = self.rows(row._replace(acknowledged=told, floor=floor))
            name += ", acknowledged"
        elif new.step == 7 and new.machines[0].source is Source.CACHE:
            shown = int.from_bytes(new.machines[0].payload[:4], "big")
            name += f" shows {shown:b}"
            if new.began & ~shown:
                pending = self.outboxes.values[s[_PENDING]]
                key = self._key_of(i)
                violated = "B" if any(at == key for at, _ in pending) else "BC"
        return name, tuple(changed), violated

    # -- readers: `Actor.began` is what was acknowledged when it began

    def _reader(self, s: State, i: int, actor: Actor) -> Iterator[tuple[str, State, str]]:
        who = f"reader {i - self.at_actors - self.c.writers + 1}"
        key = self._key_of(i)
        row: Listed = self.rows.values[s[_FIRST + key]]
        number = s[i]
        if actor.step == 0:
            floor = row.floor if self.c.floors else 0
            machine: Any = (
                Reader(f"k{key}", floor=floor, patience=_PATIENCE)
                if self.ours or self.c.protocol in {"P5", "P7"}
                else ControlReader(self.c.protocol, f"k{key}")
            )
            actor = Actor(1, s[_EPOCH], (machine,), (0,), row.acknowledged)
            number = self.actors(actor)
        else:
            yield from self._crash(s, i, who)
        if not actor.machines[0].must_load:
            yield from self._operate(s, i, number, 0, self._slot(key, actor.epoch), who)
            return
        read = (self._version(s, row), row.content)
        yield self._load(s, i, actor, read, 0, f"{who} loads {row.content:b}")
        budget = self._spend(s[_BUDGET], "replica")
        if row.before[0] and row.before[1] != row.content and budget is not None:
            spent = _put(s, _BUDGET, budget)
            name = f"{who} loads {row.before[1]:b} from a replica"
            yield self._load(spent, i, actor, row.before, 0, name)


def model_of(configuration: Configuration) -> Model:
    """Return the model of a configuration: of rows, or of lists."""
    return ListModel(configuration) if configuration.lists else Model(configuration)
