"""Looks at the servers of a physical shard, asks `machine.decide`, and does what it says.

All that a failover needs to know is on the servers, so a driver may be killed at any step and
another one goes on. What is remembered here are observations only: how long the primary has not
answered, what could not be fenced. Called by `shardkit.ops.failover.run`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Final

import psycopg

from shardkit.clock import SYSTEM, Clock
from shardkit.config import DurabilityConfig, FailoverConfig
from shardkit.errors import ShardkitError
from shardkit.ops.failover import machine
from shardkit.ops.failover.confirming import Confirming
from shardkit.ops.failover.following import Following
from shardkit.ops.failover.hosts import Host, NoHost
from shardkit.ops.failover.machine import Action, Node, Policy, View, needed_of
from shardkit.ops.failover.nodes import Heard, Server
from shardkit.ops.poolers import server_url
from shardkit.secret import without_frames
from shardkit.topology import Topology, like

__all__ = ["Driver", "Wish", "servers_of"]

_LOG: Final = logging.getLogger(__name__)

_UNTOUCHABLE: Final = 10.0
"""Seconds after which it is tried again to fence, or to rejoin, a server that could not be."""

_GIVEN_UP: Final = 0.25
"""Seconds that a server has for an answer that was stopped, or could not be fenced."""

_GRACE: Final = 3.0
"""Seconds that transactions under way have before a switchover ends them."""

Hook = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Wish:
    """What a person has asked for.

    Attributes:
        to: name of the server that is to become the primary; None for none.
        is_planned: a switchover from a primary that lives.
        is_ordered: a failover, now.
        accepts_loss: though fewer standbys answer than are needed.
        adopts: a promoted server that is to be registered.
    """

    to: str | None = None
    is_planned: bool = False
    is_ordered: bool = False
    accepts_loss: bool = False
    adopts: str | None = None


@dataclass(slots=True)
class _Memory:
    """What one driver has observed."""

    leader: str
    failures: int = 0
    failing_since: float | None = None
    fenced: set[str] = field(default_factory=set)
    untouchable: dict[str, float] = field(default_factory=dict)
    unjoinable: dict[str, float] = field(default_factory=dict)
    drained: int | None = None
    led: str = ""


def servers_of(
    topology: Topology, physical: str, *, timeout: float, clock: Clock = SYSTEM
) -> dict[str, Server]:
    """Return the servers of a physical shard by name, the configured primary first.

    Raises:
        ConfigurationError: behind a pooler, the address of a server is not known.
    """
    shard = topology.physical[physical]
    control, owner = shard.control_url or shard.admin_url, shard.admin_url
    found = {}
    for endpoint in shard.endpoints:
        url = server_url(shard, endpoint)
        name = f"{url.host}:{url.port or 5432}"
        found[name] = Server(
            name,
            (topology.name, physical),
            like(control, url),
            like(owner, url),
            timeout=timeout,
            clock=clock,
        )
    return found


class Driver:
    """Drives the failover of one physical shard. Not thread-safe.

    Args:
        topology: as the configuration says.
        physical: name of the physical shard.
        failover: when to act.
        durability: how many standbys confirm commits.
        host: what can be done from outside.
        hook: told the name of each step before it is done, and `… done` after it; for tests that
            kill there.
        clock: source of monotonic time.
    """

    def __init__(
        self,
        topology: Topology,
        physical: str,
        *,
        failover: FailoverConfig,
        durability: DurabilityConfig,
        host: Host | None = None,
        hook: Hook = lambda _step: None,
        clock: Clock = SYSTEM,
    ) -> None:
        self.physical = physical
        self.servers = servers_of(topology, physical, timeout=failover.timeout, clock=clock)
        self.policy = Policy(
            failures=failover.failures,
            patience=failover.patience,
            every=failover.every,
            needed=needed_of(len(self.servers), confirm=durability.confirming),
            follows=failover.adopt,
            acts=failover.mode == "act",
        )
        self._host = host or NoHost()
        self._hook = hook
        self._clock = clock
        self._names = {(*_split(name),): name for name in self.servers}
        self._memory = _Memory(next(iter(self.servers)))
        self._following = Following()
        self._confirming = Confirming(self.servers, durability, clock)
        self._pool = ThreadPoolExecutor(len(self.servers), thread_name_prefix="shardkit-failover")

    @property
    def leader(self) -> str:
        """The last primary that was seen to be lawful."""
        return self._memory.leader

    def close(self) -> None:
        """Let all claims go."""
        for server in self.servers.values():
            server.forget()
        self._pool.shutdown()

    def release(self) -> None:
        """Let all claims go, and look again with new sessions."""
        for server in self.servers.values():
            if server.is_claimed:
                server.release()

    def step(self, wish: Wish = Wish(), *, tends: bool = False) -> tuple[View, Action]:
        """Look, decide and do one step; return what was seen and done.

        Args:
            wish: what a person has asked for.
            tends: whether to look after the standbys that confirm commits, too.
        """
        view = self.look(wish)
        action = machine.decide(view, self.policy)
        if isinstance(action, machine.Rest | machine.Wait | machine.Refuse):
            is_calm = not isinstance(action, machine.Refuse) and self.policy.acts
            return view, (self._tended(view) if tends and is_calm else None) or action
        if isinstance(action, machine.Promote) and view.drained is None:
            action = replace(action, may_lose=self._may_lose(view.node(action.node)))
        name = type(action).__name__
        self._hook(name)
        try:
            found = self._do(action)
        except (psycopg.Error, OSError, ShardkitError) as error:
            # Also of a host that cannot start a server now: who looks on goes on looking.
            said = str(without_frames(error)).strip().splitlines() or [type(error).__name__]
            _LOG.warning("%s of %s failed: %s", name, self.physical, "; ".join(said))
            return view, machine.Wait(f"{name} failed: {said[0]}")
        if found is not None:
            return view, machine.Wait(found)
        self._hook(f"{name} done")
        return view, action

    def _tended(self, view: View) -> Action | None:
        try:
            return self._confirming.tend(view, self._hook)
        except (psycopg.Error, OSError, ShardkitError) as error:
            said = str(without_frames(error)).strip().splitlines() or [type(error).__name__]
            _LOG.warning("standbys of %s: %s", self.physical, "; ".join(said))
            return machine.Wait(f"the standbys that confirm could not be tended: {said[0]}")

    def _may_lose(self, node: Node) -> str | None:
        found = self._confirming.loss(node.name, node.position)
        if found is not None:
            _LOG.warning("%s: %s", self.physical, found)
        return None if found is None else str(found)

    # -- looking

    def look(self, wish: Wish = Wish()) -> View:
        """Ask every server, and return what is known."""
        memory, now = self._memory, self._clock.monotonic()
        memory.untouchable = {n: until for n, until in memory.untouchable.items() if now < until}
        memory.unjoinable = {n: until for n, until in memory.unjoinable.items() if now < until}
        asked = {
            name: self._pool.submit(
                server.look,
                self._names,
                fresh=name == memory.leader,
                within=_GIVEN_UP if name in memory.fenced or name in memory.untouchable else None,
            )
            for name, server in self.servers.items()
        }
        heard = {name: future.result() for name, future in asked.items()}
        self._note(heard, self._clock.monotonic(), now)
        nodes = tuple(self._following.seen(each.node) for each in heard.values())
        intents = [each.intent for each in heard.values() if each.intent is not None]
        wanted = wish.to if wish.is_planned or wish.to else next(iter(intents), None)
        since = memory.failing_since
        return View(
            nodes,
            memory.leader,
            failures=memory.failures,
            failing_for=0.0 if since is None else self._clock.monotonic() - since,
            wanted=wanted,
            drained=memory.drained,
            is_ordered=wish.is_ordered,
            accepts_loss=wish.accepts_loss,
            adopts=wish.adopts,
            fenced=frozenset(memory.fenced),
            untouchable=frozenset(memory.untouchable),
            pooled=memory.led if self._host.leads else None,
            can_rejoin=frozenset(self.servers) - frozenset(memory.unjoinable)
            if self._host.can_rejoin
            else frozenset(),
        )

    def _note(self, heard: dict[str, Heard], now: float, began: float) -> None:
        memory = self._memory
        leader = heard[memory.leader]
        if leader.node.takes_writes or leader.is_full:
            memory.failures, memory.failing_since = 0, None
        else:
            memory.failures += 1
            memory.failing_since = began if memory.failing_since is None else memory.failing_since
        for name, each in heard.items():
            if each.node.takes_writes:
                memory.fenced.discard(name)
        newest = max((h.node.registered or 0 for h in heard.values()), default=0)
        nodes = [each.node for each in heard.values()]
        lawful = [n for n in nodes if n.takes_writes and n.registered == n.timeline == newest > 0]
        self._following.note(nodes, lawful[0] if len(lawful) == 1 else None, now)
        if len(lawful) == 1 and lawful[0].name != memory.leader:
            memory.leader, memory.failures, memory.failing_since = lawful[0].name, 0, None
            memory.drained = None
            memory.untouchable.clear()

    # -- doing

    def _do(self, action: Action) -> str | None:
        """Do one step; return why it could not be done, or None."""
        match action:
            case machine.Claim(nodes):
                return self._claim(nodes)
            case machine.Renew(node):
                return self._claimed(node, self.servers[node].renew)
            case machine.Cut(nodes):
                for node in nodes:
                    self.servers[node].cut()
            case machine.Fence(node):
                self._fence(node)
            case machine.Drain(node, to):
                return self._drain(node, to)
            case machine.Open(node):
                self.servers[node].open()
                self.servers[node].note("abandoned", server=node)
            case machine.Promote(node):
                self._confirming.tighten(node)
                self.servers[node].promote()
            case machine.Register(node):
                detail: dict[str, Any] = {"instead_of": self._memory.leader}
                if (lost := self._confirming.lost) is not None:
                    detail["may_lose"] = lost.plain()
                self.servers[node].register(detail)
                self._memory.untouchable.clear()
            case machine.Repoint(node, to):
                host, port = _split(to)
                return self._claimed(node, lambda: self.servers[node].repoint(host, port))
            case machine.Lead(to):
                self._host.lead(self.physical, to)
                self._memory.led = to
            case machine.Rejoin(node, to, anew):
                return self._rejoin(node, to, anew=anew)
        return None

    def _rejoin(self, node: str, to: str, *, anew: bool) -> str | None:
        server = self.servers[node]
        with self.servers[to].rejoining(node) as is_alone:
            if not is_alone:
                return f"another one is at work on {node}"
            now = server.look(self._names, fresh=False).node
            if now.streams and now.follows == to and not anew:
                return None  # another one has done it between our look and our turn
            server.forget()
            # One whose disk fails must not keep the others from their turn.
            self._memory.unjoinable[node] = self._clock.monotonic() + _UNTOUCHABLE
            self._host.rejoin(self.physical, node, to, anew=anew)
            del self._memory.unjoinable[node]
            self._memory.fenced.discard(node)
            self._following.rejoined(node, anew=anew)
        return None

    def _claim(self, nodes: tuple[str, ...]) -> str | None:
        for node in nodes:  # in one order, and without waiting: two drivers cannot block each other
            if not self.servers[node].claim():
                for other in nodes:
                    self.servers[other].release()
                return f"another one is at work on {node}"
        return None

    def _claimed(self, node: str, work: Callable[[], None]) -> str | None:
        server = self.servers[node]
        had = server.is_claimed
        if not server.claim():
            return f"another one is at work on {node}"
        work()
        if not had:
            server.release()
        return None

    def _fence(self, node: str) -> None:
        """Stop a server; else tell it, where it answers."""
        server = self.servers[node]
        server.forget()
        if self._host.fence(self.physical, node):
            self._memory.fenced.add(node)
            return
        self._memory.untouchable[node] = self._clock.monotonic() + _UNTOUCHABLE
        try:
            # Said, so that it is opened again if it comes back before another was promoted.
            server.note("fenced", server=node)
            server.close()
            server.end_sessions()
        except (psycopg.Error, OSError):
            _LOG.warning("%s cannot be fenced: it does not answer", node)

    def _drain(self, node: str, to: str) -> str | None:
        server, target = self.servers[node], self.servers[to]
        if not target.is_claimed:
            return f"{to} is not claimed any more"
        server.note("switchover", server=to)
        self._hook("Drain noted")
        server.close()
        self._hook("Drain closed")
        until = self._clock.monotonic() + _GRACE
        while not server.is_quiet():
            if self._clock.monotonic() > until:
                server.end_sessions()
                break
            self._clock.sleep(0.02)
        self._memory.drained = server.written()
        return None


def _split(name: str) -> tuple[str, str]:
    host, _, port = name.rpartition(":")
    return host, port
