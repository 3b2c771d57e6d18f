"""Two databases, clients, a relay and a mover under faults; its history is what judges judge.

python -m tests.simulation SEED --world database
"""

from __future__ import annotations

from typing import Any, Final

from tests.simulation.clients import ACCOUNTS, Client, FailedError, UnknownError
from tests.simulation.database import Database, Ok, Shard
from tests.simulation.journal import Journal
from tests.simulation.scheduler import LOST, Call, Simulation, Steps

__all__ = ["World"]

_CHAOS: Final = 3.0
"""Seconds after which all is healed."""
_SETTLED: Final = 6.0
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
        self.n_moves = self.n_failovers = 0
        self.databases = {name: Database(simulation, name, bugs) for name in ("alpha", "beta")}
        for database in self.databases.values():
            database.lag = lag
        self.effects = Database(simulation, "effects", frozenset())
        self.effects.shards[0] = Shard("active", 1)
        self._serial = 0
        self._relaying = ""
        for shard in range(self.n_shards):
            self.databases[self.home(shard)].shards[shard] = Shard("active", 1)
            self.journal.fact("bank", bank=f"b{shard}", accounts=ACCOUNTS)
        self._witness = Client(self, "witness")
        draw = simulation.random
        for n in range(n_clients):
            client = Client(self, f"client-{n}")
            simulation.spawn(client.name, self._works(client, n_operations, kinds))
        if "event" in kinds:
            self._relay = simulation.spawn("relay", self._relays())
        if not is_calm:
            simulation.network.lost = draw.choice((0.0, 0.002, 0.01))
            simulation.network.late = draw.choice((0.0, 0.01))
            simulation.spawn("mover", self._moves())
            simulation.spawn("chaos", self._faults())
        simulation.at(_CHAOS, self._heal)
        simulation.spawn("witness", self._looks(), after=_SETTLED)

    def run(self) -> World:
        """Let it happen; return itself."""
        self.simulation.run(until=60.0)
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
            (database.shards[shard].epoch, database.shards[shard].state != "retired", name)
            for name, database in self.databases.items()
            if shard in database.shards and database.shards[shard].state != "importing"
        ]
        return max(having)[2]

    # -- actors

    def _works(self, client: Client, n: int, kinds: tuple[str, ...]) -> Steps:
        draw = self.simulation.random
        while self.simulation.now < _SETTLED - 1.0 and n > 0:
            yield draw.random() * 0.05
            yield from getattr(client, draw.choice(kinds))()
            n -= 1
            if n == 4 and self.simulation.now < _CHAOS:
                yield _CHAOS + 0.5 - self.simulation.now  # something after the last fault

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

    def _insist(self, database: Database, *request: Any) -> Steps:
        """Ask until there is an answer."""
        while True:
            answer = yield Call(database, request, 0.2)
            if answer is not LOST:
                return answer
            yield 0.02

    def _moves(self) -> Steps:
        """Move logical shards from server to server, as shardkit's mover does."""
        draw = self.simulation.random
        if "lost by failover" in self.bugs:
            return
        for _ in range(draw.randint(1, 3)):
            yield draw.random() * 0.3
            yield from self._move(draw.randrange(self.n_shards))

    def _move(self, shard: int) -> Steps:
        source = self.databases[self.owner_of(shard)]
        target = self.databases[self.other(source.name)]
        at = 0
        for _ in range(2):  # the copy, and what came meanwhile
            changes, at = (yield from self._insist(source, "changes", shard, at)).value
            yield from self._insist(target, "import", shard, changes)
            yield self.simulation.random.random() * 0.05
        answer = yield Call(source, ("fence", shard), 1.0)
        if not isinstance(answer, Ok):
            yield from self._insist(source, "lift", shard)
            return
        timeline = source.timeline
        changes, at = (yield from self._insist(source, "changes", shard, at)).value
        yield from self._insist(target, "import", shard, changes)
        if source.timeline != timeline:  # a failover has lifted the fence
            return
        yield from self._decide(shard, source, target, answer.value)

    def _decide(self, shard: int, source: Database, target: Database, sequence: int) -> Steps:
        decided = yield from self._insist(source, "retire", shard, target.name)
        if not isinstance(decided, Ok):
            return  # the fence was lifted before the decision
        yield from self._insist(target, "activate", shard, decided.value, sequence)
        self.n_moves += 1

    def _relays(self) -> Steps:
        """Deliver events at least once, in order of position, and take effect once."""
        cursors: dict[int, str] = {}
        while True:
            yield 0.1
            for shard in range(self.n_shards):
                yield from self._deliver(shard, cursors)
            if self.simulation.now > _SETTLED - 0.2:
                return

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
        """Read everything once all is healed."""
        for shard in range(self.n_shards):
            self._witness.take_owner(shard, self.owner_of(shard))
            yield from self._witness.look(shard)
        op = self.journal.invoke("witness", "effects", ["effects"], final=True)
        found = self.effects.scan(0, "effects", self.effects.sequence)
        self.journal.ok(op, [event for event, n in found for _ in range(n)])
