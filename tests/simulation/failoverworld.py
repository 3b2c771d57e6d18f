"""One physical shard that loses its primary: the production machine of failover under faults.

Three simulated servers, clients that add to a set, and two watchers that drive
`shardkit.ops.failover.machine.decide` by what servers answer. Judged by K2 (what was acknowledged
is there once, on every server alike), K7 (one owner of each epoch) and K11; and by the world: all
is well again some time after the last fault.

python -m tests.simulation SEED --world failover
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any, Final

from shardkit.ops.failover import machine
from shardkit.ops.failover.following import Following
from shardkit.ops.failover.machine import (
    CUT,
    Claim,
    Cut,
    Fence,
    Lead,
    Node,
    Open,
    Policy,
    Promote,
    Register,
    Rejoin,
    Renew,
    Repoint,
    View,
    needed_of,
)
from tests.simulation.answers import Ok
from tests.simulation.journal import Journal
from tests.simulation.replicating import PostgresNode
from tests.simulation.scheduler import LOST, Actor, Call, Simulation, Steps

__all__ = ["FAILOVER_BUGS", "FailoverWorld"]

_CHAOS: Final = 4.0
_LAST: Final = 40.0
_NAMES: Final = ("a", "b", "c")
_TIMEOUT: Final = 0.1
_STILL: Final = 0.6

FAILOVER_BUGS: Final = {
    "asynchronous": ("sets", ("lost write",)),
    "one standby is enough": ("sets", ("lost write",)),
    "not the most advanced": ("sets", ("lost write",)),
    "standbys not cut": ("sets", ("lost write",)),
    "epoch not raised": ("owners", ("two owners",)),
}
"""What can be left out, who has to find it, and what it has to say."""


class FailoverWorld:
    """One run.

    Args:
        seed: everything is drawn from it.
        bugs: protections that are left out.
        is_traced: whether to keep the trace.

    Attributes:
        journal: what clients did.
        counts: actions of the machine, by name.
        n_operator: how often a person was needed.
    """

    def __init__(
        self, seed: int, *, bugs: frozenset[str] = frozenset(), is_traced: bool = False
    ) -> None:
        self.simulation = simulation = Simulation(seed, is_traced=is_traced)
        self.journal = Journal(simulation)
        self.bugs = bugs
        self.counts: Counter[str] = Counter()
        confirm = 0 if "asynchronous" in bugs else 1
        self.nodes = {name: PostgresNode(simulation, name, confirm) for name in _NAMES}
        for node in self.nodes.values():
            node.peers = self.nodes
            node.follows = "a"
            simulation.spawn(f"receiver {node.name}", node.receives())
        self.nodes["a"].in_recovery, self.nodes["a"].follows = False, None
        needed = needed_of(3, confirm=1)
        if bugs & {"asynchronous", "one standby is enough"}:
            needed = 1
        self.policy = Policy(failures=2, patience=0.3, every=1.0, needed=needed)
        self._pooled = "a"
        self.n_operator = 0
        simulation.spawn("operator", self._operator())
        self._serial = 0
        self._is_over = self._is_busy = False
        draw = simulation.random
        self._watchers: list[Actor] = []
        for n in range(2):
            name = f"watcher {n}"
            self._watchers.append(simulation.spawn(name, self._watches(name)))
        self._clients = [
            simulation.spawn(f"client-{n}", self._works(f"client-{n}", 25)) for n in range(3)
        ]
        simulation.network.lost = draw.choice((0.0, 0.002, 0.01))
        simulation.network.late = draw.choice((0.0, 0.01))
        if bugs & {"not the most advanced", "one standby is enough"}:
            simulation.network.lost = 0.1  # standbys differ for longer
        for _ in range(2):  # two faults at a time
            simulation.spawn("chaos", self._faults())
        simulation.at(_CHAOS, self._heal)
        simulation.spawn("witness", self._looks(), after=_CHAOS)

    @property
    def n_failovers(self) -> int:
        """Timelines that were registered."""
        return max(node.registered for node in self.nodes.values()) - 1

    def run(self) -> FailoverWorld:
        """Let it happen; return itself."""
        self.simulation.run(until=2 * _LAST)
        return self

    # -- clients

    def _works(self, name: str, n: int) -> Steps:
        draw = self.simulation.random
        newest = 1
        while n > 0:
            yield draw.random() * 0.2
            self._serial += 1
            op = self.journal.invoke(
                name, "set", ["add", "s", f"e{self._serial}"], shard=0, deadline=30.0
            )
            n -= 1
            newest = yield from self._add(op, newest)
            if n == 5:
                yield max(0.0, _CHAOS + 8.0 - self.simulation.now)

    def _add(self, op: Any, newest: int) -> Steps:
        """Add an element at the lawful primary; try again what certainly did not happen."""
        value = op.do[2]
        for _ in range(40):
            for node in self.nodes.values():
                found = yield Call(node, ("hello",), _TIMEOUT)
                if not isinstance(found, Ok):
                    continue
                in_recovery, timeline, registered, _ = found.value
                if in_recovery or timeline != registered or timeline < newest:
                    continue
                newest = timeline
                answer = yield Call(node, ("write", value, timeline, 0), 0.5)
                if isinstance(answer, Ok):
                    self.journal.ok(op, stamp=list(answer.value))
                    return newest
                if answer is LOST:
                    self.journal.unknown(op)
                    return newest
            yield self.simulation.random.random() * 0.2
        self.journal.fail(op)
        return newest

    # -- watchers

    def _watches(self, name: str) -> Steps:
        """Look, decide, act: one step at a time."""
        draw = self.simulation.random
        leader, failures, failing_since = "a", 0, 0.0
        fenced: set[str] = set()
        untouchable: set[str] = set()
        following = Following(_STILL)
        while not self._is_over:
            yield (0.05 if self._is_busy else 0.2) + 0.1 * draw.random()
            probe = yield Call(self.nodes[leader], ("probe",), _TIMEOUT)
            if isinstance(probe, Ok):
                failures = 0
            else:
                failing_since = failing_since if failures else self.simulation.now
                failures += 1
            nodes = []
            for node in self.nodes.values():
                answer = yield Call(node, ("facts", name), _TIMEOUT)
                nodes.append(answer.value if isinstance(answer, Ok) else Node(node.name))
            if "standbys not cut" in self.bugs:
                nodes = [replace(n, follows=CUT, streams=False) if n.is_lost else n for n in nodes]
            lawful = _lawful(nodes)
            following.note(nodes, lawful, self.simulation.now)
            nodes = [following.seen(n) for n in nodes]
            if lawful is not None and lawful.name != leader:
                leader, failures = lawful.name, 0
                fenced.clear()
                untouchable.clear()
            failing = self.simulation.now - failing_since if failures else 0.0
            answering = {n.name for n in nodes if n.answers}
            fenced = {n.name for n in nodes if n.answers and n.is_closed} | (fenced - answering)
            view = View(
                tuple(nodes), leader, failures, failing, fenced=frozenset(fenced),
                accepts_loss="not the most advanced" in self.bugs,
                untouchable=frozenset(untouchable), pooled=self._pooled,
                can_rejoin=frozenset(answering),
            )  # fmt: skip
            action = machine.decide(view, self.policy)
            self.simulation.say(name, action)
            self.counts[type(action).__name__] += 1
            self.counts["copies"] += isinstance(action, Rejoin) and action.anew
            self._is_busy = not isinstance(action, machine.Rest)
            if not isinstance(action, Fence) and failures == 0:
                untouchable.clear()
            yield from self._act(name, action, untouchable)
            if isinstance(action, Rejoin):
                following.rejoined(action.node, anew=action.anew)

    def _act(self, name: str, action: machine.Action, untouchable: set[str]) -> Steps:
        """Carry an action out."""
        match action:
            case Claim(nodes):
                yield from self._claim(name, nodes)
            case Cut(nodes):
                for each in nodes:
                    yield Call(self.nodes[each], ("cut", name), _TIMEOUT)
            case Fence(node):
                answer = yield Call(self.nodes[node], ("fence",), _TIMEOUT)
                if not isinstance(answer, Ok):
                    untouchable.add(node)
            case Promote(node):
                yield from self._promote(name, node)
            case Register(node):
                yield from self._register(name, node)
            case Lead(to):
                self._pooled = to
            case Renew() | Open() | Repoint() | Rejoin():
                yield from self._tend(name, action)
            case _:
                self._release(name)

    def _tend(self, name: str, action: Renew | Open | Repoint | Rejoin) -> Steps:
        node = self.nodes[action.node]
        match action:
            case Renew():
                yield Call(node, ("renew",), _TIMEOUT)
            case Open():
                yield Call(node, ("open",), _TIMEOUT)
            case Repoint(_, to):
                yield Call(node, ("repoint", name, to), _TIMEOUT)
            case Rejoin(_, to, anew) if node.is_up:  # made anew by its supervisor
                yield Call(node, ("rejoin", to, anew), _TIMEOUT)

    def _register(self, name: str, node: str) -> Steps:
        found = yield Call(self.nodes[node], ("hello",), _TIMEOUT)
        if isinstance(found, Ok) and found.value[1] != found.value[2]:
            raises = 0 if "epoch not raised" in self.bugs else 1
            write = ("write", None, found.value[1], raises)
            yield Call(self.nodes[node], write, _TIMEOUT)
            self._release(name)

    def _claim(self, name: str, nodes: tuple[str, ...]) -> Steps:
        """Claim all of them, or none: two watchers must not block each other."""
        for node in nodes:
            answer = yield Call(self.nodes[node], ("claim", name), _TIMEOUT)
            if not isinstance(answer, Ok):
                self._release(name)
                yield 0.1 * self.simulation.random.random()
                return

    def _promote(self, name: str, node: str) -> Steps:
        if "not the most advanced" in self.bugs:
            standbys = [n for n in self.nodes.values() if n.is_up and n.in_recovery]
            node = min(standbys, key=lambda n: (n.timeline, len(n.log))).name
        yield Call(self.nodes[node], ("promote", name), _TIMEOUT)

    def _release(self, name: str) -> None:
        """Let go of servers: a watcher's sessions end."""
        for node in self.nodes.values():
            if node.claimed_by == name:
                node.claimed_by = ""

    # -- faults, the end

    def _faults(self) -> Steps:
        draw = self.simulation.random
        while self.simulation.now < _CHAOS - 1.0:
            yield draw.random() * 0.6
            node = self.nodes[draw.choice(_NAMES)]
            what = draw.choice(
                ("crash", "crash", "freeze", "cut", "kill watcher", "freeze watcher")
            )
            if "watcher" not in what and draw.random() < 0.6:
                node = next((n for n in self.nodes.values() if not n.in_recovery), node)
            longest = 4.0 if what == "crash" and not node.in_recovery else 1.5
            seconds, began = draw.random() * longest, self.simulation.nanoseconds()
            if what == "crash" and node.is_up:
                self._tear(node)
                node.crash()
                yield seconds
                node.restart()
            elif what == "freeze" and node.is_up:
                node.freeze()
                yield seconds
                node.thaw()
            elif what == "cut":
                node.is_cut = True
                yield seconds
                node.is_cut = False
            elif what == "kill watcher":
                yield from self._replaced(draw.randrange(2))
            elif what == "freeze watcher":
                watcher = draw.choice(self._watchers)
                self.simulation.freeze(watcher)
                yield seconds
                self.simulation.thaw(watcher)
            healed = self.simulation.nanoseconds()
            self.journal.fact("fault", name=f"{what} {node.name}", began=began, healed=healed)

    def _tear(self, node: PostgresNode) -> None:
        """Have a primary die in the middle of a record, of which some standbys have a part."""
        if not node.in_recovery:
            for each in self.nodes.values():
                is_behind = each.in_recovery and each.follows == node.name
                if is_behind and each.log == node.log and self.simulation.random.random() < 0.5:
                    each.is_torn = True

    def _replaced(self, n: int) -> Steps:
        """Kill a watcher; servers notice that its sessions are gone, and another one starts."""
        old = self._watchers[n]
        self.simulation.kill(old)
        yield 0.05
        self._release(old.name)
        name = f"{old.name}'"
        self._watchers[n] = self.simulation.spawn(name, self._watches(name))

    def _operator(self) -> Steps:
        """Do what the machine leaves to a person: a server was promoted while the primary lives.

        Its timeline is not registered, so no client has used it: it can be made anew. So can one of
        two on one timeline that nobody follows: it was registered and lost before a standby had
        heard of it, so nothing was acknowledged there.
        """
        while not self._is_over:
            yield 2.0
            nodes = [n for n in self.nodes.values() if not n.in_recovery]
            newest = max(n.registered for n in self.nodes.values())
            lawful = [n for n in nodes if n.timeline == newest == n.registered]
            for node in nodes:
                if lawful and node.timeline > newest and self.simulation.now > _CHAOS + 2.0:
                    self.n_operator += 1
                    yield Call(node, ("rejoin", lawful[0].name), _TIMEOUT)
            followed = {n.follows for n in self.nodes.values() if n.in_recovery}
            right = [n for n in lawful if n.name in followed]
            if len(lawful) > 1 and len(right) == 1 and self.simulation.now > _CHAOS + 2.0:
                self.n_operator += 1
                for node in lawful:
                    if node is not right[0]:
                        yield Call(node, ("rejoin", right[0].name), _TIMEOUT)

    def _heal(self) -> None:
        self.simulation.network.lost = self.simulation.network.late = 0.0
        now = self.simulation.nanoseconds()
        self.journal.fact("fault", name="messages", began=0, healed=now)

    def _is_well(self) -> bool:
        """Tell whether there is one primary, and everybody follows it and has what it has."""
        primaries = [n for n in self.nodes.values() if not n.in_recovery and not n.is_closed]
        if len(primaries) != 1 or primaries[0].registered != primaries[0].timeline:
            return False
        log = primaries[0].log
        return all(n.is_up and n.log == log for n in self.nodes.values())

    def _looks(self) -> Steps:
        """Read every server for good once all is well."""
        while any(actor.is_alive for actor in self._clients) or not self._is_well():
            yield 0.25
            assert self.simulation.now < _LAST, f"not well: {self._told()}"
        self._is_over = True
        for node in self.nodes.values():
            node.is_over = True
            op = self.journal.invoke(
                "witness", "set", ["read", "s"], final=True, endpoint=node.name
            )
            self.journal.ok(op, [entry.value for entry in node.log if entry.value is not None])

    def _told(self) -> str:
        return ", ".join(
            f"{n.name}: {'standby' if n.in_recovery else 'primary'} of timeline {n.timeline}, "
            f"{len(n.log)} entries, follows {n.follows}{', closed' if n.is_closed else ''}"
            f"{', stuck' if n.is_stuck else ''}{', torn' if n.is_torn else ''}"
            for n in self.nodes.values()
        )


def _lawful(nodes: list[Node]) -> Node | None:
    newest = max((n.registered or 0 for n in nodes if n.answers), default=0)
    found = [n for n in nodes if n.takes_writes and n.timeline == newest == n.registered]
    return found[0] if len(found) == 1 else None
