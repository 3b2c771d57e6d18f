"""The cache protocol in a world: the production machines, one database, one cache server, a relay.

`make model-check` tries every order of a few steps; this runs long ones, in which lives end, clocks
go on and many faults meet. Sessions record what they are shown, and K3 and K4 judge it. With
`protocol` one of the well-known protocols takes the place of ours: judges have to notice.

    python -m tests.simulation SEED --world cache
"""

from __future__ import annotations

from typing import Any, Final

from shardkit.cache import Reader, Repair, Source, Writer
from shardkit.caching.operations import UNKNOWN, Entry, Request
from tests.property.cachecontrols import ControlReader, ControlWriter, carry_out
from tests.simulation.answers import Ok
from tests.simulation.database import Database, placed
from tests.simulation.journal import Journal
from tests.simulation.scheduler import LOST, Actor, Call, Reply, Server, Simulation, Steps

__all__ = ["CacheServer", "CacheWorld"]

_CHAOS: Final = 1.5
_SETTLED: Final = 4.0
_TIMEOUT: Final = 0.05


class CacheServer(Server):
    """A cache server: entries with lives, numbers that are never used again, evictions."""

    def __init__(self, simulation: Simulation, name: str) -> None:
        super().__init__(simulation, name)
        self.entries: dict[str, tuple[Entry, float]] = {}
        self._fresh = 0

    def handle(self, request: Request, reply: Reply) -> None:
        now = self.simulation.now
        held = self.entries.get(request.key)
        entry = held[0] if held is not None and held[1] > now else None
        self._fresh += 1
        after, answer = carry_out(entry, request, (self.life, self._fresh))
        if after is None:
            self.entries.pop(request.key, None)
        elif after is not entry:
            self.entries[request.key] = (after, now + (request.ttl or 300.0))
        reply(answer)

    def crash(self) -> None:
        """Lose everything."""
        super().crash()
        self.entries.clear()

    def evict(self) -> None:
        """Drop any one entry."""
        if self.entries:
            key = self.simulation.random.choice(list(self.entries))
            del self.entries[key]
            self.simulation.say(self.name, f"evicts {key}")


class CacheWorld:
    """One run.

    Args:
        seed: everything is drawn from it.
        protocol: `P9` is ours; others are of `tests.property.cachecontrols`, without a relay.
        n_clients: how many sessions there are at a time.
        is_traced: whether to keep the trace.

    Attributes:
        journal: what sessions wrote and were shown.
    """

    def __init__(
        self,
        seed: int,
        *,
        protocol: str = "P9",
        n_clients: int = 4,
        n_operations: int = 8,
        is_traced: bool = False,
    ) -> None:
        self.simulation = simulation = Simulation(seed, is_traced=is_traced)
        self.protocol = protocol
        self.journal = Journal(simulation)
        self.database = Database(simulation, "alpha", frozenset())
        self.database.shards[0] = placed()
        self.cache = CacheServer(simulation, "cache")
        self._n_operations = n_operations
        self._count = 0
        draw = simulation.random
        simulation.network.lost = draw.choice((0.0, 0.01, 0.05))
        simulation.network.late = draw.choice((0.0, 0.02))
        self._sessions: list[tuple[str, Actor]] = []
        for _ in range(n_clients):
            self._begin()
        if protocol == "P9":
            simulation.spawn("relay", self._relays())
        simulation.spawn("chaos", self._faults())
        simulation.at(_CHAOS, self._heal)
        simulation.spawn("witness", self._looks(), after=_SETTLED)

    def run(self) -> CacheWorld:
        """Let it happen; return itself."""
        self.simulation.run(until=60.0)
        return self

    def _begin(self) -> None:
        self._count += 1
        name = f"session-{self._count}"
        self._sessions.append((name, self.simulation.spawn(name, self._works(name))))

    # -- sessions

    def _works(self, name: str) -> Steps:
        draw = self.simulation.random
        floors: dict[str, int] = {}
        for _ in range(self._n_operations):
            yield draw.random() * 0.2
            key = f"row {draw.randrange(2)}"
            if draw.random() < 0.35:
                yield from self._write(name, key, floors)
            else:
                yield from self._read(name, key, floors)

    def _drive(self, machine: Any) -> Steps:
        """Ask the cache what a machine wants to know, until it waits for something else."""
        while machine.request is not None:
            pause = getattr(machine, "pause", 0.0)
            if pause:
                yield pause * self.simulation.random.random()
            answer = yield Call(self.cache, machine.request, _TIMEOUT)
            machine = machine.advance(UNKNOWN if answer is LOST else answer)
        return machine

    def _write(self, session: str, key: str, floors: dict[str, int]) -> Steps:
        op = self.journal.invoke(session, "row", ["write", key], session=session)
        self._count += 1
        name = f"{session}.{self._count}"
        update = ("update", name, False, (0, "rows", key), "add", 1)
        locked = noted = yield Call(self.database, update, 0.5)
        if isinstance(locked, Ok):
            event = (0, "outbox", f"{self._count}")
            said = ("update", name, False, event, "set", (key, locked.value))
            noted = yield Call(self.database, said, 0.5)
        if not isinstance(locked, Ok) or not isinstance(noted, Ok):
            yield Call(self.database, ("rollback", name), 0.05)
            self.journal.fail(op)
            return
        version: int = locked.value
        payload = version.to_bytes(4, "big")
        writer: Any = (
            Writer.begin(key, version, payload)
            if self.protocol == "P9"
            else ControlWriter(self.protocol, key, version, payload)
        )
        if not writer.is_ready:
            writer = yield from self._drive(writer)
        ended = yield Call(self.database, ("commit", name), 0.5)
        if isinstance(ended, Ok):
            yield from self._drive(writer.committed())
            floors[key] = max(version, floors.get(key, 0))
            self.journal.ok(op, version)
        elif ended is LOST:
            self.journal.unknown(op)
        else:
            yield from self._drive(writer.rolled_back())
            self.journal.fail(op)

    def _read(self, session: str, key: str, floors: dict[str, int]) -> Steps:
        op = self.journal.invoke(session, "row", ["read", key], session=session)
        reader: Any = (
            Reader(key, floor=floors.get(key, 0))
            if self.protocol in {"P9", "P5", "P7"}
            else ControlReader(self.protocol, key)
        )
        reader = yield from self._drive(reader)
        if reader.must_load:
            self._count += 1
            read = ("read", f"{session}.{self._count}", False, (0, "rows", key))
            found = yield Call(self.database, read, 0.5)
            if not isinstance(found, Ok):
                if self.protocol == "P9":
                    yield from self._drive(reader.not_loaded())
                self.journal.fail(op)
                return
            version = found.value or 0
            payload = version.to_bytes(4, "big") if version else None
            reader = yield from self._drive(reader.loaded(version, payload))
        is_cached = reader.source is Source.CACHE
        shown = int.from_bytes(reader.payload[:4], "big") if reader.payload else 0
        floors[key] = max(shown, floors.get(key, 0)) if not is_cached else floors.get(key, 0)
        self.journal.ok(op, shown, source="cache" if is_cached else "database")

    # -- the relay, faults, the end

    def _relays(self) -> Steps:
        while self.simulation.now < _SETTLED - 0.2:
            yield 0.05 if self.simulation.now < _CHAOS + 0.5 else 0.2
            self._count += 1
            name = f"relay.{self._count}"
            found = yield Call(self.database, ("peek", 0, "outbox"), 0.2)
            if isinstance(found, Ok):
                for event, (key, version) in found.value.items():
                    if version >= 0:
                        yield from self._repair(f"{name}.{event}", event, key, version)

    def _repair(self, name: str, event: str, key: str, version: int) -> Steps:
        repair = yield from self._drive(Repair(key, version))
        if repair.is_clean:
            gone = ("update", name, False, (0, "outbox", event), "set", (key, -1))
            done = yield Call(self.database, gone, 0.2)
            last = "commit" if isinstance(done, Ok) else "rollback"
            yield Call(self.database, (last, name), 0.2)

    def _faults(self) -> Steps:
        draw = self.simulation.random
        for _ in range(draw.randint(0, 6)):
            yield draw.random() * 0.4
            what = draw.choice(("evict", "evict", "restart", "freeze", "kill", "freeze a session"))
            seconds = draw.random() * 0.3
            name, actor = draw.choice(self._sessions)
            if what == "evict":
                self.cache.evict()
            elif what == "restart":
                self.cache.crash()
                self.cache.restart()
            elif what == "freeze":
                self.cache.freeze()
                yield seconds
                self.cache.thaw()
            elif what == "freeze a session" and actor.is_alive:
                self.simulation.freeze(actor)
                yield seconds
                self.simulation.thaw(actor)
            elif actor.is_alive:
                self.simulation.kill(actor)
                self.journal.fact("killed", process=name)
                self._begin()

    def _heal(self) -> None:
        self.simulation.network.lost = self.simulation.network.late = 0.0

    def _looks(self) -> Steps:
        """Read all rows when nothing has happened for long."""
        for key in ("row 0", "row 1"):
            for _ in range(2):
                yield from self._read("witness", key, {})
