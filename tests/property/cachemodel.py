"""All that may happen to writers, readers, the relay and one cache: the steps of the model.

    make model-check                          # everything: docs/cache.md's table, 5 million states
    python -m tests.property.modelcheck P9 --faults evict,crash --writers 3 --readers 1

The actors run the production machines (`shardkit.cache`) and a cache server that is in order is
`shardkit.caching.operations.apply`; the model adds the database (row locks, COMMIT, the outbox in
the same transaction), the relay, and an environment that may do each fault so many times.

Properties:

    A   nobody can move any more, the outbox is drained, and the cache holds something old
    B   a read that began after a write was acknowledged was shown something older by the cache
    C   as B, and the relay has nothing left to do about it

A state is a flat tuple of small numbers: fields of the world, and indices into tables of the
values met so far. What an actor's step does to an entry is computed once by the production code
and remembered, which is what makes five million states a matter of minutes in Python.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from shardkit.caching.entries import uncarried
from shardkit.caching.lives import Patience
from shardkit.caching.operations import UNKNOWN, Entry, Kind, Request
from shardkit.caching.reader import Reader, Source
from shardkit.caching.repair import Repair
from shardkit.caching.writer import Writer
from tests.property.cachecontrols import ControlReader, ControlWriter, carry_out

FAULTS: Final = (
    "evict",  # any entry goes
    "expire",  # a marker or a lease goes early
    "crash",  # a writer or reader stops for ever; its row locks go
    "lost",  # an operation is not answered, carried out or not
    "late",  # an operation is not answered, and carried out at any later time
    "rollback",  # a transaction does not commit
    "replica",  # a reader loads from a replica that is one commit behind
    "restart",  # the server restarts empty, and counts its CAS numbers from the start
    "failover",  # the epoch grows; the last commit may be lost, and its version used again
)
_PATIENCE: Final = Patience(markers=1, leases=1)


@dataclass(frozen=True)
class Configuration:
    """What is searched.

    Attributes:
        protocol: `P1` to `P7`, `P8` (ours without the relay) or `P9` (ours).
        faults: how many of each.
        writers: how many; each changes every key of its transaction once.
        readers: how many; each reads one key once.
        n_keys: rows changed together in one transaction.
        deletes: whether the last writer deletes.
        previous: whether markers carry the value they replace.
        epochs: whether the epoch is part of the key.
        lives: whether the backend tells one life of the server from another.
        floors: whether readers are of the session that wrote what was acknowledged last.
        early: whether markers are sent before the rows are locked, as soon as they are read.
        lists: whether lists are written, whose writers do not lock each other.
        next: whether a list is taken for as new as the newest transaction that had begun.
    """

    protocol: str = "P9"
    faults: tuple[tuple[str, int], ...] = ()
    writers: int = 2
    readers: int = 2
    n_keys: int = 1
    deletes: bool = False
    previous: bool = False
    epochs: bool = True
    lives: bool = True
    floors: bool = False
    early: bool = False
    lists: bool = False
    next: bool = False

    def __str__(self) -> str:
        faults = "+".join(f"{n if n > 1 else ''}{name}" for name, n in self.faults) or "none"
        more = "".join(
            f", {word}"
            for word, holds in (
                (f"{self.n_keys} keys", self.n_keys > 1),
                ("deletes", self.deletes),
                ("serve previous", self.previous),
                ("epoch not in the key", not self.epochs),
                ("lives not told apart", not self.lives),
                ("own writes", self.floors),
                ("early markers", self.early),
                ("lists", self.lists),
                ("as new as the newest", self.next),
            )
            if holds
        )
        return f"{self.protocol} {self.writers}W {self.readers}R {faults}{more}"


class Row(NamedTuple):
    """One row of the database."""

    version: int = 1
    serial: int = 1  # never used again, unlike versions after a failover
    is_there: bool = True
    before: tuple[int, int] = (1, 1)  # version and serial of the commit before
    acknowledged: int = 1  # highest serial whose writer was told
    holder: int = -1  # actor that has the lock


class Actor(NamedTuple):
    """A writer, a reader, or the relay; `step` 9 is finished or dead."""

    step: int = 0
    epoch: int = 0
    machines: tuple[Any, ...] = ()
    serials: tuple[int, ...] = ()
    began: int = 0  # reader: what was acknowledged when it began
    wrote: bool = False
    version: int = 0  # writer: that its rows will have; 0 before they are locked


_GONE: Final = Actor(step=9)
_IDLE: Final = Actor()
# Positions in a state.
_FRESH, _LIFE, _EPOCH, _SEQ, _SERIAL, _FLYING, _PENDING, _BUDGET, _RELAY = range(9)
_FIRST: Final = 9
State = tuple[int, ...]


class Table:
    """Numbers for values."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._numbers: dict[Any, int] = {}

    def __call__(self, value: Any) -> int:
        number = self._numbers.get(value)
        if number is None:
            number = self._numbers[value] = len(self.values)
            self.values.append(value)
        return number


class Model:
    """All the steps of one configuration."""

    def __init__(self, configuration: Configuration) -> None:
        c = self.c = configuration
        self.ours = c.protocol in {"P8", "P9"}
        self.relay = c.protocol == "P9"
        budgets = dict(c.faults)
        assert set(budgets) <= set(FAULTS), budgets
        self.names = tuple(name for name in FAULTS if name in budgets)
        self.entries, self.rows, self.actors = Table(), Table(), Table()
        self.flights, self.outboxes, self.budgets = Table(), Table(), Table()
        self.full = tuple(budgets[name] for name in self.names)
        self.gone, self.idle = self.actors(_GONE), self.actors(_IDLE)
        assert self.entries(None) == 0
        self.two = c.epochs and "failover" in budgets
        self.n_slots = c.n_keys * (2 if self.two else 1)
        self.at_slots = _FIRST + c.n_keys
        self.at_actors = self.at_slots + self.n_slots
        self.n_actors = c.writers + c.readers
        self.effects: dict[tuple[int, int, int, int, int], tuple[int, int, bool, int]] = {}
        self.spent: dict[tuple[int, str], int | None] = {}

    # -- the beginning and the end

    def starts(self) -> Iterator[State]:
        """Every key cached as of its first version, and none."""
        c = self.c
        for number in (0, self.entries(Entry((0, 0), Kind.VALUE, 1, _ghost(1)))):
            slots = [number] * c.n_keys + [0] * (self.n_slots - c.n_keys)
            fixed = [1, 0, 0, 1, 1, self.flights(()), self.outboxes(())]
            fixed += [self.budgets(self.full), self.idle]
            rows = [self.rows(Row())] * c.n_keys
            yield (*fixed, *rows, *slots, *[self.idle] * self.n_actors)

    def is_quiet(self, s: State) -> bool:
        """Whether nobody can move."""
        gone = self.gone
        return (
            all(s[i] == gone for i in range(self.at_actors, self.at_actors + self.n_actors))
            and not self.flights.values[s[_FLYING]]
            and not (self.relay and (self.outboxes.values[s[_PENDING]] or s[_RELAY] != self.idle))
        )

    def is_stale(self, s: State) -> bool:
        """Whether the cache holds something that is not what the database has."""
        base = self.at_slots + (self.c.n_keys * s[_EPOCH] if self.two else 0)
        for key in range(self.c.n_keys):
            shown = _shown(self.entries.values[s[base + key]])
            if shown is not None and shown != self.rows.values[s[_FIRST + key]].serial:
                return True
        return False

    # -- steps

    def steps(self, s: State) -> Iterator[tuple[str, State, str]]:
        """Yield what may happen next: its name, the state after it, properties it violates."""
        for i in range(self.at_actors, self.at_actors + self.n_actors):
            if s[i] == self.gone:
                continue
            actor = self.actors.values[s[i]]
            if i - self.at_actors < self.c.writers:
                yield from self._writer(s, i, actor)
            else:
                yield from self._reader(s, i, actor)
        if self.relay:
            yield from self._relay(s)
        if self.full:
            yield from self._environment(s)

    def _slot(self, key: int, epoch: int) -> int:
        return self.at_slots + key + (self.c.n_keys * epoch if self.two else 0)

    def _spend(self, budget: int, fault: str) -> int | None:
        """Return the budget after one more fault, or None when it is used up."""
        at = (budget, fault)
        if at not in self.spent:
            left, after = self.budgets.values[budget], None
            if fault in self.names and left[self.names.index(fault)]:
                n = self.names.index(fault)
                after = self.budgets((*left[:n], left[n] - 1, *left[n + 1 :]))
            self.spent[at] = after
        return self.spent[at]

    def _effect(
        self, actor: int, n: int, entry: int, cas: tuple[int, int]
    ) -> tuple[int, int, bool, int]:
        """Carry out the n-th machine's request.

        Returns:
            The actor and the entry after it, whether it wrote, and the actor after no answer.
        """
        at = (actor, n, entry, *cas)
        known = self.effects.get(at)
        if known is None:
            who: Actor = self.actors.values[actor]
            machine = who.machines[n]
            request = _with_ghost(machine.request, who)
            before = self.entries.values[entry]
            fresh: Any = cas if self.c.lives else (0, cas[1])
            after, answer = carry_out(before, request, fresh)
            heard = self.actors(_tidy(_with(who, n, machine.advance(answer))))
            unheard = self.actors(_tidy(_with(who, n, machine.advance(UNKNOWN))))
            wrote = after is not before and after is not None
            known = self.effects[at] = (heard, self.entries(after), wrote, unheard)
        return known

    def _operate(
        self, s: State, i: int, number: int, n: int, slot: int, who: str
    ) -> Iterator[tuple[str, State, str]]:
        """Yield the ways in which one operation may end; `number` is the actor's at its start."""
        heard, entry, wrote, unheard = self._effect(number, n, s[slot], (s[_LIFE], s[_FRESH]))
        request = self.actors.values[number].machines[n].request
        name = f"{who} {request.op.name} {request.key}"
        done = list(s)
        done[slot] = entry
        if wrote:
            done[_FRESH] += 1
        applied = tuple(done)
        yield self._become(applied, i, number, heard, name)
        if (budget := self._spend(s[_BUDGET], "lost")) is not None:
            spent = _put(s, _BUDGET, budget)
            yield self._become(spent, i, number, unheard, f"{name} (lost)")
            if entry != s[slot]:
                spent = _put(applied, _BUDGET, budget)
                yield self._become(spent, i, number, unheard, f"{name} (answer lost)")
        if (budget := self._spend(s[_BUDGET], "late")) is not None:
            sent = _with_ghost(request, self.actors.values[number])
            flying = (*self.flights.values[s[_FLYING]], (slot, sent))
            late = list(s)
            late[_BUDGET], late[_FLYING] = budget, self.flights(flying)
            yield self._become(tuple(late), i, number, unheard, f"{name} (under way)")

    def _become(
        self, s: State, i: int, before: int, after: int, name: str
    ) -> tuple[str, State, str]:
        """Put an actor's new state in place; acknowledge, and judge what a reader was shown."""
        old, new = self.actors.values[before], self.actors.values[after]
        violated = ""
        changed = list(s)
        if i != _RELAY and new.step == 8:  # a writer is done: acknowledge
            if new.wrote:
                for key, serial in enumerate(new.serials):
                    row = self.rows.values[s[_FIRST + key]]
                    if serial > row.acknowledged:
                        changed[_FIRST + key] = self.rows(row._replace(acknowledged=serial))
                name += ", acknowledged"
            after = self.gone
        elif i != _RELAY and new.step == 7:  # a reader is done: judge
            machine = new.machines[0]
            if machine.source is Source.CACHE:
                shown = int.from_bytes(machine.payload[:4], "big")
                name += f" shows {shown}"
                if shown < new.began:
                    violated = "B"
                    key = self._key_of(i)
                    pending = self.outboxes.values[s[_PENDING]]
                    if not any(at == key for at, _ in pending):
                        violated = "BC"
            after = self.gone
        elif i == _RELAY and new.machines and new.machines[0].is_done:
            if new.machines[0].is_clean:
                key, version = new.serials
                rest = list(self.outboxes.values[s[_PENDING]])
                if (key, version) in rest:
                    rest.remove((key, version))
                changed[_PENDING] = self.outboxes(tuple(rest))
            after = self.idle
        del old
        changed[i] = after
        return name, tuple(changed), violated

    def _key_of(self, i: int) -> int:
        return (i - self.at_actors - self.c.writers) % self.c.n_keys

    def _crash(self, s: State, i: int, who: str) -> Iterator[tuple[str, State, str]]:
        if (budget := self._spend(s[_BUDGET], "crash")) is not None:
            dead = list(self._unlock(s, i))
            dead[_BUDGET], dead[i] = budget, self.gone
            yield f"{who} crashes", tuple(dead), ""

    def _unlock(self, s: State, i: int) -> State:
        changed = list(s)
        for key in range(self.c.n_keys):
            row = self.rows.values[s[_FIRST + key]]
            if row.holder == i:
                changed[_FIRST + key] = self.rows(row._replace(holder=-1))
        return tuple(changed)

    def _writer(self, s: State, i: int, actor: Actor) -> Iterator[tuple[str, State, str]]:
        who = f"writer {i - self.at_actors + 1}"
        if actor.step == 0:
            if self.c.early:
                yield f"{who} reads", self._begin(s, i), ""
            elif (begun := self._lock(s, i)) is not None:
                yield f"{who} locks", begun, ""
            return
        yield from self._crash(s, i, who)
        is_locked = actor.step != 1 or actor.version or not self.c.early
        if not is_locked and (begun := self._lock(s, i)) is not None:
            yield f"{who} locks", begun, ""
        busy = False
        for n, machine in enumerate(actor.machines):
            if machine.request is not None:
                busy = True
                yield from self._operate(s, i, s[i], n, self._slot(n, actor.epoch), who)
        if busy or actor.step != 1:
            return
        is_fenced = actor.epoch != s[_EPOCH]
        if not (is_locked or is_fenced):
            return
        budget = s[_BUDGET] if is_fenced else self._spend(s[_BUDGET], "rollback")
        if budget is not None:
            machines = tuple(machine.rolled_back() for machine in actor.machines)
            after = self.actors(_tidy(actor._replace(step=2, machines=machines)))
            yield self._become(
                _put(self._unlock(s, i), _BUDGET, budget), i, s[i], after, f"{who} rolls back"
            )
        if not is_fenced:
            yield self._commit(s, i, actor, who)

    def _begin(self, s: State, i: int) -> State:
        """Have a writer read its rows, without locks, and know what its markers will say."""
        machines = []
        for key in range(self.c.n_keys):
            row = self.rows.values[s[_FIRST + key]]
            replaces = row.version if self.c.previous else None
            machines.append(Writer.begin(f"k{key}", row.version + 1, None, replaces=replaces))
        return _put(s, i, self.actors(Actor(1, s[_EPOCH], tuple(machines))))

    def _lock(self, s: State, i: int) -> State | None:
        c = self.c
        rows = [self.rows.values[s[_FIRST + key]] for key in range(c.n_keys)]
        if any(row.holder >= 0 for row in rows):
            return None
        changed = list(s)
        actor = self.actors.values[s[i]]
        if not all(row.is_there for row in rows):  # the UPDATE finds no row
            if not c.early:
                changed[i] = self.gone
                return tuple(changed)
            if any(machine.request is not None for machine in actor.machines):
                return None  # it waits for its markers first, and removes them
            undone = tuple(machine.rolled_back() for machine in actor.machines)
            after = self.actors(_tidy(actor._replace(step=2, machines=undone)))
            return self._become(s, i, s[i], after, "")[1]
        if c.early and actor.epoch != s[_EPOCH]:
            return None
        version, serial = s[_SEQ] + 1, s[_SERIAL] + 1
        changed[_SEQ], changed[_SERIAL] = version, serial
        machines: list[Any] = []
        for key, row in enumerate(rows):
            changed[_FIRST + key] = self.rows(row._replace(holder=i))
            payload = None if self._deletes(i) else _ghost(serial)
            if c.early:
                machines.append(actor.machines[key])
            elif self.ours:
                replaces = row.version if c.previous else None
                machines.append(Writer.begin(f"k{key}", version, payload, replaces=replaces))
            else:
                machines.append(ControlWriter(c.protocol, f"k{key}", version, payload))
        serials = (serial,) * c.n_keys
        epoch = actor.epoch if c.early else s[_EPOCH]
        changed[i] = self.actors(Actor(1, epoch, tuple(machines), serials, version=version))
        return tuple(changed)

    def _deletes(self, i: int) -> bool:
        return self.c.deletes and i == self.at_actors + self.c.writers - 1

    def _commit(self, s: State, i: int, actor: Actor, who: str) -> tuple[str, State, str]:
        changed = list(s)
        pending = self.outboxes.values[s[_PENDING]]
        if self.c.early:
            payload = None if self._deletes(i) else _ghost(actor.serials[0])
            known = tuple(machine.known(actor.version, payload) for machine in actor.machines)
            actor = actor._replace(machines=known)
        for key, machine in enumerate(actor.machines):
            row = self.rows.values[s[_FIRST + key]]
            is_there = machine.payload is not None
            changed[_FIRST + key] = self.rows(
                row._replace(
                    version=machine.version,
                    serial=actor.serials[key],
                    is_there=is_there,
                    before=(row.version, row.serial)
                    if "failover" in self.names or "replica" in self.names
                    else (0, 0),
                    holder=-1,
                )
            )
            if self.relay:
                pending = (*pending, (key, machine.version))
        changed[_PENDING] = self.outboxes(pending)
        machines = tuple(machine.committed() for machine in actor.machines)
        after = self.actors(_tidy(actor._replace(step=2, machines=machines, wrote=True)))
        return self._become(tuple(changed), i, s[i], after, f"{who} commits")

    def _reader(self, s: State, i: int, actor: Actor) -> Iterator[tuple[str, State, str]]:
        who = f"reader {i - self.at_actors - self.c.writers + 1}"
        key = self._key_of(i)
        row = self.rows.values[s[_FIRST + key]]
        number = s[i]
        c = self.c
        if actor.step == 0:
            machine: Any = (
                # Versions count as serials do, but after a failover.
                Reader(f"k{key}", floor=row.acknowledged if c.floors else 0, patience=_PATIENCE)
                if self.ours or self.c.protocol in {"P5", "P7"}
                else ControlReader(self.c.protocol, f"k{key}")
            )
            actor = Actor(1, s[_EPOCH], (machine,), (0,), row.acknowledged)
            number = self.actors(actor)
        else:
            yield from self._crash(s, i, who)
        machine = actor.machines[0]
        if not machine.must_load:
            yield from self._operate(s, i, number, 0, self._slot(key, actor.epoch), who)
            return
        yield self._load(
            s,
            i,
            actor,
            (row.version, row.serial if row.is_there else 0),
            row.serial,
            f"{who} loads {row.serial}",
        )
        if row.before != (row.version, row.serial) and row.before[0]:
            budget = self._spend(s[_BUDGET], "replica")
            if budget is not None:
                spent = _put(s, _BUDGET, budget)
                yield self._load(
                    spent,
                    i,
                    actor,
                    row.before,
                    row.before[1],
                    f"{who} loads {row.before[1]} from a replica",
                )

    def _load(
        self, s: State, i: int, actor: Actor, read: tuple[int, int], serial: int, name: str
    ) -> tuple[str, State, str]:
        version, content = read
        loaded = actor.machines[0].loaded(version, _ghost(content) if content else None)
        after = self.actors(_tidy(actor._replace(machines=(loaded,), serials=(serial,))))
        return self._become(s, i, s[i], after, name)

    def _relay(self, s: State) -> Iterator[tuple[str, State, str]]:
        pending = self.outboxes.values[s[_PENDING]]
        number = s[_RELAY]
        actor = self.actors.values[number]
        if number == self.idle:
            if not pending:
                return
            key, version = pending[0]
            actor = Actor(1, s[_EPOCH], (Repair(f"k{key}", version),), (key, version))
            number = self.actors(actor)
        yield from self._operate(
            s, _RELAY, number, 0, self._slot(actor.serials[0], actor.epoch), "relay"
        )

    def _environment(self, s: State) -> Iterator[tuple[str, State, str]]:
        flying = self.flights.values[s[_FLYING]]
        for n, (slot, request) in enumerate(flying):
            fresh: Any = (s[_LIFE] if self.c.lives else 0, s[_FRESH])
            before = self.entries.values[s[slot]]
            after, _ = carry_out(before, request, fresh)
            changed = list(s)
            changed[_FLYING] = self.flights((*flying[:n], *flying[n + 1 :]))
            changed[slot] = self.entries(after)
            if after is not before and after is not None:
                changed[_FRESH] += 1
            yield f"late {request.op.name} arrives", tuple(changed), ""
        for slot in range(self.at_slots, self.at_slots + self.n_slots):
            if s[slot] == 0:
                continue
            if (budget := self._spend(s[_BUDGET], "evict")) is not None:
                yield "an entry is evicted", _put(_put(s, slot, 0), _BUDGET, budget), ""
            is_short = self.entries.values[s[slot]].kind in {Kind.MARKER, Kind.LEASE}
            if is_short and (budget := self._spend(s[_BUDGET], "expire")) is not None:
                yield "a marker or lease expires", _put(_put(s, slot, 0), _BUDGET, budget), ""
        if (budget := self._spend(s[_BUDGET], "restart")) is not None:
            yield "the server restarts", self._restarted(s, budget), ""
        if s[_EPOCH] == 0 and (budget := self._spend(s[_BUDGET], "failover")) is not None:
            yield from self._failover(s, budget)

    def _restarted(self, s: State, budget: int) -> State:
        changed = list(s)
        changed[_BUDGET] = budget
        changed[_LIFE] += 1
        changed[_FRESH] = 1
        changed[_FLYING] = self.flights(())  # what was under way to it is gone with its connections
        for slot in range(self.at_slots, self.at_slots + self.n_slots):
            changed[slot] = 0
        return tuple(changed)

    def _failover(self, s: State, budget: int) -> Iterator[tuple[str, State, str]]:
        kept = list(s)
        kept[_BUDGET], kept[_EPOCH] = budget, 1
        for key in range(self.c.n_keys):  # who held a lock is cut off
            row = self.rows.values[s[_FIRST + key]]
            kept[_FIRST + key] = self.rows(row._replace(holder=-1))
        yield "failover", tuple(kept), ""
        lost = list(kept)
        pending = self.outboxes.values[s[_PENDING]]
        if any(self.rows.values[s[_FIRST + key]].serial == 1 for key in range(self.c.n_keys)):
            return  # nothing to lose
        lost[_SERIAL] += 1
        for key in range(self.c.n_keys):
            row = self.rows.values[s[_FIRST + key]]
            pending = tuple(each for each in pending if each != (key, row.version))
            lost[_SEQ] = row.before[0]
            lost[_FIRST + key] = self.rows(
                Row(
                    row.before[0],
                    lost[_SERIAL],
                    True,
                    (row.before[0], lost[_SERIAL]),
                    lost[_SERIAL],
                )
            )
        lost[_PENDING] = self.outboxes(pending)
        yield "failover, the last commit lost", tuple(lost), ""


def _put(s: State, at: int, value: int) -> State:
    return (*s[:at], value, *s[at + 1 :])


def _with(actor: Actor, n: int, machine: Any) -> Actor:
    return actor._replace(machines=(*actor.machines[:n], machine, *actor.machines[n + 1 :]))


def _tidy(actor: Actor) -> Actor:
    """Say of an actor that it is done: 8 a writer, 7 a reader. The relay is judged elsewhere."""
    machines = actor.machines
    if isinstance(machines[0], Repair) or not all(machine.is_done for machine in machines):
        return actor
    if isinstance(machines[0], (Writer, ControlWriter)):
        return actor._replace(step=8, machines=()) if actor.step == 2 else actor
    return actor._replace(step=7)


def _ghost(serial: int) -> bytes:
    """Return contents of a row that only the model can read."""
    return serial.to_bytes(4, "big")


def _with_ghost(request: Request, actor: Actor) -> Request:
    """Let "no such row" say as of when, too."""
    if request.kind is Kind.ABSENCE:
        return request._replace(payload=_ghost(actor.serials[0]))
    return request


def _shown(entry: Entry | None) -> int | None:
    """Return the serial of what readers are shown of an entry, or None."""
    if entry is None or entry.kind in {Kind.LEASE, Kind.GARBAGE}:
        return None
    payload = entry.payload
    if entry.kind is Kind.MARKER:
        if not payload:
            return None
        payload = uncarried(payload)[1]
    return int.from_bytes(payload[:4], "big")
