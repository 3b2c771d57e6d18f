"""A world in which everything that happens is drawn from one seed: time, messages, faults.

Actors are generators. What they yield they wait for:

    yield 0.25                              # seconds of virtual time
    answer = yield Call(server, request)    # a message, and its answer or LOST

Servers carry out one message at a time. Messages take time, come late, get lost on the way there
or on the way back; servers and actors crash and freeze. No clock is read and no thread runs, so a
seed gives the same trace every time, and `python -m tests.simulation` replays it.

Source: FoundationDB's simulation (Zhou et al., SIGMOD 2021, section 4).
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, Final

__all__ = ["LOST", "Actor", "Call", "Network", "Reply", "Server", "Simulation", "Steps"]


class _Lost:
    """No answer in time."""

    def __repr__(self) -> str:
        return "LOST"


LOST: Final = _Lost()
"""The answer of a call that was not answered in time: it happened, will yet happen, or not."""

Steps = Generator[Any, Any, Any]
Reply = Callable[[Any], None]


@dataclass(slots=True)
class Network:
    """How messages travel; may be changed at any time.

    Attributes:
        delay: longest usual time of a message, in seconds.
        late: share of messages that take a hundred times that.
        lost: share of messages that never arrive.
    """

    delay: float = 0.001
    late: float = 0.0
    lost: float = 0.0


class Server:
    """Something that answers messages, one at a time.

    Attributes:
        name: for the trace.
        is_up: whether it takes messages; those to a server that is down are lost.
        is_cut: whether messages to and from it are lost.
        life: how often it has crashed; answers of an earlier life are lost.
    """

    def __init__(self, simulation: Simulation, name: str) -> None:
        self.simulation = simulation
        self.name = name
        self.is_up = True
        self.is_cut = False
        self.life = 0
        self._is_frozen = False
        self._waiting: list[tuple[Any, Reply]] = []

    def __repr__(self) -> str:
        return self.name

    def handle(self, request: Any, reply: Reply) -> None:
        """Carry out a request, and answer now or later, once."""
        raise NotImplementedError

    def crash(self) -> None:
        """Stop; what is under way is lost. Subclasses drop what is not durable."""
        self.is_up, self._is_frozen = False, False
        self.life += 1
        self._waiting.clear()
        self.simulation.say(self.name, "crashes")

    def restart(self) -> None:
        """Start again."""
        self.is_up = True
        self.simulation.say(self.name, "starts")

    def freeze(self) -> None:
        """Take messages and do nothing."""
        self._is_frozen = True
        self.simulation.say(self.name, "freezes")

    def thaw(self) -> None:
        """Do all that has arrived meanwhile."""
        self._is_frozen = False
        self.simulation.say(self.name, "thaws")
        waiting, self._waiting = self._waiting, []
        for request, reply in waiting:
            self.handle(request, reply)

    def arrive(self, request: Any, reply: Reply) -> None:
        """Take a message from the network."""
        if not self.is_up or self.is_cut:
            return
        if self._is_frozen:
            self._waiting.append((request, reply))
        else:
            self.handle(request, reply)


@dataclass(slots=True)
class Call:
    """A message to a server.

    Attributes:
        server: to whom.
        request: what it is given.
        timeout: seconds to wait for an answer.
    """

    server: Server
    request: Any
    timeout: float = 1.0


@dataclass(slots=True)
class Actor:
    """A generator and where it stands."""

    name: str
    steps: Steps
    is_alive: bool = True
    is_frozen: bool = False
    turn: int = 0
    missed: list[Any] = field(default_factory=list)


class Simulation:
    """The scheduler: a virtual clock and what is to happen.

    Args:
        seed: everything is drawn from it.
        is_traced: whether to keep the trace as text.

    Attributes:
        now: virtual time, in seconds.
        random: the only source of chance.
        network: how messages travel.
        trace: lines, if it is traced.
        n_steps: how many steps were made.
    """

    def __init__(self, seed: int, *, is_traced: bool = False) -> None:
        self.seed = seed
        self.now = 0.0
        self.random = random.Random(seed)
        self.network = Network()
        self.trace: list[str] = []
        self.is_traced = is_traced
        self.n_steps = 0
        self._sequence = self._nanoseconds = 0
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []

    # Clock of shardkit, for parts of it that take one.

    def monotonic(self) -> float:
        """Return virtual seconds."""
        return self.now

    def unix_ms(self) -> int:
        """Return virtual milliseconds."""
        return 1_800_000_000_000 + int(self.now * 1000)

    def sleep(self, seconds: float) -> None:
        """Refuse: an actor yields the seconds."""
        raise AssertionError("code under simulation may not wait in a thread")

    def nanoseconds(self) -> int:
        """Return virtual time as histories have it; no two calls return the same."""
        self._nanoseconds = max(self._nanoseconds + 1, int(self.now * 1e9))
        return self._nanoseconds

    def say(self, who: str, what: object) -> None:
        """Add a line to the trace."""
        if self.is_traced:
            self.trace.append(f"{self.now:12.6f}  {who:12} {what}")

    def at(self, seconds: float, do: Callable[..., None], *arguments: Any) -> None:
        """Have something done after so many seconds."""
        self._sequence += 1
        heapq.heappush(self._events, (self.now + seconds, self._sequence, do, arguments))

    def spawn(self, name: str, steps: Steps, *, after: float = 0.0) -> Actor:
        """Start an actor."""
        actor = Actor(name, steps)
        self.at(after, self._resume, actor, actor.turn, None)
        return actor

    def kill(self, actor: Actor) -> None:
        """End an actor wherever it is; what it has sent arrives."""
        if actor.is_alive:
            actor.is_alive = False
            actor.turn += 1
            actor.steps.close()
            self.say(actor.name, "is killed")

    def freeze(self, actor: Actor) -> None:
        """Stop an actor until it is thawed: it learns late of what happens."""
        actor.is_frozen = True
        self.say(actor.name, "freezes")

    def thaw(self, actor: Actor) -> None:
        """Let it go on."""
        actor.is_frozen = False
        self.say(actor.name, "thaws")
        missed, actor.missed = actor.missed, []
        for value in missed:
            self.at(0.0, self._resume, actor, actor.turn, value)

    def run(self, *, until: float = 1e9, steps: int = 1_000_000) -> None:
        """Let everything happen, in order, until a time or until nothing is left.

        Raises:
            AssertionError: there is no end to it.
        """
        events = self._events
        while events and events[0][0] <= until:
            self.now, _, do, arguments = heapq.heappop(events)
            do(*arguments)
            self.n_steps += 1
            assert self.n_steps < steps, f"seed {self.seed}: no end after {steps} steps"
        if until < 1e9:
            self.now = max(self.now, until)

    def _resume(self, actor: Actor, turn: int, value: Any) -> None:
        if turn != actor.turn or not actor.is_alive:
            return  # it has had an answer, or is dead
        if actor.is_frozen:
            actor.missed[:] = actor.missed or [value]
            return
        actor.turn += 1
        try:
            wanted = actor.steps.send(value)
        except StopIteration:
            actor.is_alive = False
            return
        if isinstance(wanted, Call):
            self._call(actor, wanted)
        else:
            self.at(wanted, self._resume, actor, actor.turn, None)

    def _call(self, actor: Actor, call: Call) -> None:
        turn, server, life = actor.turn, call.server, call.server.life
        self.at(call.timeout, self._resume, actor, turn, LOST)
        going = self._travel()
        if going is None:
            self.say(actor.name, f"to {server.name}: {call.request} (lost)")
            return

        def reply(answer: Any) -> None:
            back = self._travel()
            if back is None or server.life != life or server.is_cut:
                self.say(server.name, f"to {actor.name}: {answer} (lost)")
            else:
                self.at(back, self._resume, actor, turn, answer)

        self.say(actor.name, f"to {server.name}: {call.request}")
        self.at(going, server.arrive, call.request, reply)

    def _travel(self) -> float | None:
        """Draw how long a message takes; None if it is lost."""
        network, draw = self.network, self.random.random
        if network.lost and draw() < network.lost:
            return None
        seconds = network.delay * draw()
        if network.late and draw() < network.late:
            seconds *= 100
        return seconds
