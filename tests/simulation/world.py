"""Two databases, clients, a relay and a mover under faults; its history is what judges judge.

python -m tests.simulation SEED --world database
"""

from __future__ import annotations

from typing import Any, Final

from shardkit.ops.moves.machine import Goal
from shardkit.ownership import State
from tests.simulation.answers import Ok
from tests.simulation.clients import ACCOUNTS, Client, FailedError, UnknownError
from tests.simulation.database import Database, placed
from tests.simulation.journal import Journal
from tests.simulation.moving import Job, mover
from tests.simulation.scheduler import Actor, Call, Simulation, Steps

__all__ = ["World"]

_CHAOS: Final = 3.0
"""Seconds after which all is healed."""
_DELIVERED: Final = 2.0
"""Seconds in which relays deliver what is left."""
_LAST: Final = 60.0
"""Seconds after which everything has come to its end, or never will."""
_KINDS: Final = ("lists", "register", "element", "bank", "name_", "row", "event")


class World:
    """One run.

    Args:
        seed: everything is drawn from it.
        bugs: protections that are left out.
        n_clients: how many there are.
        n_operations: of each.
        kinds: what they do.
        is_calm: whether there are no faults and no moves.
        lag: seconds that replicas are behind at most.
        is_traced: whether to keep the trace.

    Attributes:
        journal: what clients did.
        n_moves: logical shards that changed their home.
        n_given_up: moves that were given up.
        n_killed_movers: movers that died at work.
        n_failovers: primaries that were replaced.
    """

    def __init__(
        self,
        seed: int,
        *,
        bugs: frozenset[str] = frozenset(),
        n_clients: int = 5,
        n_operations: int = 12,
        kinds: tuple[str, ...] = _KINDS,
        is_calm: bool = False,
        lag: float = 0.01,
        is_traced: bool = False,
    ) -> None:
        self.simulation = simulation = Simulation(seed, is_traced=is_traced)
        self.bugs = bugs
        self.journal = Journal(simulation)
        self.n_shards = 2
        self.n_moves = self.n_given_up = self.n_killed_movers = self.n_failovers = 0
        self._is_moving = self._is_over = False
        self._working: list[Actor] = []
        self._last = _LAST
        self.databases = {name: Database(simulation, name, bugs) for name in ("alpha", "beta")}
        for database in self.databases.values():
            database.lag = lag
        self.effects = Database(simulation, "effects", frozenset())
        self.effects.shards[0] = placed()
        self._serial = 0
        self._relaying = ""
        for shard in range(self.n_shards):
            self.databases[self.home(shard)].shards[shard] = placed()
            self.journal.fact("bank", bank=f"b{shard}", accounts=ACCOUNTS)
        self._witness = Client(self, "witness")
        draw = simulation.random
        for n in range(n_clients):
            client = Client(self, f"client-{n}")
            works = self._works(client, n_operations, kinds)
            self._working.append(simulation.spawn(client.name, works))
        if "event" in kinds:
            self._relay = simulation.spawn("relay", self._relays())
        if not is_calm:
            simulation.network.lost = draw.choice((0.0, 0.002, 0.01))
            simulation.network.late = draw.choice((0.0, 0.01))
            self._is_moving = True
            simulation.spawn("moves", self._moves())
            simulation.spawn("chaos", self._faults())
        simulation.at(_CHAOS, self._heal)
        simulation.spawn("witness", self._looks(), after=_CHAOS)

    def run(self) -> World:
        """Let it happen; return itself."""
        self.simulation.run(until=2 * _LAST)
        return self

    def home(self, shard: int) -> str:
        """Return where a logical shard is at first."""
        return "alpha" if shard % 2 == 0 else "beta"

    def other(self, name: str) -> str:
        """Return the other server."""
        return "beta" if name == "alpha" else "alpha"

    def serial(self) -> int:
        """Return a number that is used once."""
        self._serial += 1
        return self._serial

    def owner_of(self, shard: int) -> str:
        """Return who owns a logical shard, as the rows of both servers say."""
        having = [
            (row.epoch, row.state is not State.RETIRED, name)
            for name, database in self.databases.items()
            if (row := database.shards.get(shard)) and row.state is not State.IMPORTING
        ]
        return max(having)[2]

    # -- actors

    def _works(self, client: Client, n: int, kinds: tuple[str, ...]) -> Steps:
        draw = self.simulation.random
        while n > 0:
            yield draw.random() * 0.05
            yield from getattr(client, draw.choice(kinds))()
            n -= 1
            if n == 4:  # something after the last fault
                yield max(0.0, _CHAOS - self.simulation.now)
                while self._is_moving:
                    yield 0.25
                yield 0.5

    def _faults(self) -> Steps:
        draw = self.simulation.random
        for _ in range(draw.randint(0, 3)):
            yield draw.random() * 0.4
            database = self.databases[draw.choice(("alpha", "beta"))]
            began = self.simulation.nanoseconds()
            what = draw.choice(("crash", "failover", "freeze", "cut", "kill relay"))
            if "lost by failover" in self.bugs:
                what = "failover"
            seconds = draw.random() * 0.3
            if what == "crash":
                database.crash()
                yield seconds
                database.restart()
            elif what == "failover":
                database.crash()
                yield seconds
                database.promote()
                self.n_failovers += 1
            elif what == "freeze":
                database.freeze()
                yield seconds
                database.thaw()
            elif what == "cut":
                database.is_cut = True
                yield seconds
                database.is_cut = False
            elif hasattr(self, "_relay"):
                self.simulation.kill(self._relay)
                self.journal.fact("killed", process=self._relaying)
                yield seconds
                self._relay = self.simulation.spawn("relay", self._relays())
            healed = self.simulation.nanoseconds()
            name = f"{what} {database.name}"
            self.journal.fact("fault", name=name, began=began, healed=healed)

    def _heal(self) -> None:
        self.simulation.network.lost = self.simulation.network.late = 0.0
        now = self.simulation.nanoseconds()
        self.journal.fact("fault", name="messages", began=0, healed=now)

    def _moves(self) -> Steps:
        """Move logical shards from server to server; kill movers now and then."""
        draw = self.simulation.random
        for n in range(1 if "activation before decision" in self.bugs else draw.randint(1, 3)):
            yield draw.random() * 0.3
            if self.simulation.now < _CHAOS and "lost by failover" not in self.bugs:
                yield from self._move(f"move {n}", draw.randrange(self.n_shards))
        self._is_moving = False

    def _move(self, name: str, shard: int) -> Steps:
        draw, began = self.simulation.random, self.simulation.nanoseconds()
        source = self.databases[self.owner_of(shard)]
        job = Job(name, shard, source, self.databases[self.other(source.name)])
        while not job.is_done:
            actor = self.simulation.spawn(name, mover(self, job))
            dies = self.simulation.now < _CHAOS and draw.random() < 0.5
            until = self.simulation.now + draw.random() * 0.3 if dies else self._last
            while actor.is_alive and self.simulation.now < until:
                yield 0.02
            if actor.is_alive:
                assert self.simulation.now < self._last, f"{name} has not ended"
                self.simulation.kill(actor)
                self.n_killed_movers += 1
                yield draw.random() * (0.3 if draw.random() < 0.9 else 6.0)
                if draw.random() < 0.2 and job.goal is Goal.MOVE:
                    job.goal = Goal.ABORT  # whoever comes next gives up
        healed = self.simulation.nanoseconds()
        self.journal.fact("fault", name=name, began=began, healed=healed)

    def _relays(self) -> Steps:
        """Deliver events at least once, in order of position, and take effect once."""
        cursors: dict[int, str] = {}
        while not self._is_over:
            yield 0.1 if self.simulation.now < _CHAOS else 0.3
            for shard in range(self.n_shards):
                yield from self._deliver(shard, cursors)

    def _deliver(self, shard: int, cursors: dict[int, str]) -> Steps:
        client = Client(self, f"relay{self.serial()}")
        self._relaying = client.name
        client.take_owner(shard, self.owner_of(shard))
        try:
            waiting = yield from client.ask(shard, "peek", shard, "outbox")
            by_id = "outbox by id" in self.bugs or "outbox by cursor" in self.bugs
            events = sorted(waiting, key=lambda event: event if by_id else waiting[event][1])
            for event in events:
                key, position = waiting[event]
                if "outbox by cursor" in self.bugs:
                    if event <= cursors.get(shard, ""):
                        continue
                    cursors[shard] = event
                if position >= 0:
                    yield from self._hand_on(client, shard, event, key, position)
        except (FailedError, UnknownError):
            return

    def _hand_on(self, client: Client, shard: int, event: str, key: str, position: int) -> Steps:
        op = self.journal.invoke(client.name, "deliver", ["deliver", key, event, position])
        place, name = (0, "effects", event), f"{client.name}.{event}"
        once = "effect not deduplicated" not in self.bugs
        seen = yield Call(self.effects, ("read", name, True, place), 0.2)
        if not isinstance(seen, Ok):
            yield from self._give_up(op, name)
        if seen.value is None or not once:
            yield from self._effect(op, name, place)
        self.journal.ok(op)
        # Gone from the outbox: position -1 stands for a row that is deleted.
        where = (shard, "outbox", event)
        try:
            yield from client.ask(shard, "update", name, False, where, "set", (key, -1))
            yield from client.commit(shard, name)
        except (FailedError, UnknownError):
            yield Call(client.owner(shard), ("rollback", name), 0.05)
            raise

    def _effect(self, op: Any, name: str, place: Any) -> Steps:
        done = yield Call(self.effects, ("update", name, True, place, "add", 1), 0.2)
        if isinstance(done, Ok):
            done = yield Call(self.effects, ("commit", name), 0.2)
        if not isinstance(done, Ok):
            yield from self._give_up(op, name)

    def _give_up(self, op: Any, name: str) -> Steps:
        """Leave a delivery to the next look, and no lock behind."""
        self.journal.unknown(op)
        yield Call(self.effects, ("rollback", name), 0.05)
        raise FailedError

    def _looks(self) -> Steps:
        """Read everything once all is healed and everybody is done."""
        while self._is_moving or any(actor.is_alive for actor in self._working):
            yield 0.25
        yield _DELIVERED
        self._is_over = True
        for shard in range(self.n_shards):
            self._witness.take_owner(shard, self.owner_of(shard))
            yield from self._witness.look(shard)
        op = self.journal.invoke("witness", "effects", ["effects"], final=True)
        found = self.effects.scan(0, "effects", self.effects.sequence)
        self.journal.ok(op, [event for event, n in found for _ in range(n)])
