"""A breaker in a world: a server that fails, hangs and comes back, callers that die with the probe.

python -m tests.simulation SEED --world breaker
"""

from __future__ import annotations

from typing import Final

from shardkit.breaker import Breaker, Probe
from shardkit.errors import BreakerOpenError
from shardkit.windows import BreakerRules
from tests.simulation.journal import Journal
from tests.simulation.scheduler import Simulation, Steps

__all__ = ["BreakerWorld"]

_RULES: Final = BreakerRules()
_CHAOS: Final = 40.0
_END: Final = 280.0


class BreakerWorld:
    """One run.

    Args:
        seed: everything is drawn from it.
        is_traced: whether to keep the trace.

    Attributes:
        journal: the calls, as operations that have to end and, at last, to succeed.
        refused: calls that were not let through.
        times_opened: how often the breaker opened.
    """

    def __init__(self, seed: int, *, is_traced: bool = False) -> None:
        self.simulation = simulation = Simulation(seed, is_traced=is_traced)
        self.journal = Journal(simulation)
        self.breaker = Breaker(
            "alpha", rules=_RULES, clock=simulation, uniform=simulation.random.uniform
        )
        self.refused = self.times_opened = 0
        self._health = "up"
        self._probes: list[Probe] = []
        for n in range(4):
            simulation.spawn(f"caller-{n}", self._calls(f"caller-{n}"))
        simulation.spawn("chaos", self._faults())

    def run(self) -> BreakerWorld:
        """Let it happen; return itself."""
        self.simulation.run(until=_END + 60.0)
        return self

    def _calls(self, name: str) -> Steps:
        simulation, breaker, draw = self.simulation, self.breaker, self.simulation.random
        while simulation.now < _END:
            # Seldom enough for a run to be short, often enough for a window to fill.
            yield draw.random() * (1.0 if simulation.now < _CHAOS else 8.0)
            was_closed = breaker.is_closed
            op = self.journal.invoke(name, "call", ["call"], deadline=10.0)
            try:
                probe = breaker.admit()
            except BreakerOpenError as error:
                self._refused(error, was_closed=was_closed)
                self.journal.fail(op, why="open")
                continue
            assert was_closed or probe is not None
            if probe is not None:
                self._only(probe)
            seconds = self._duration()
            yield seconds
            # One that dies says nothing, with the probe in its hands.
            dies = simulation.now < _CHAOS and draw.random() < 0.05
            if dies:
                self.journal.unknown(op, why="died")
            elif self._health == "down":
                was_closed = breaker.is_closed
                breaker.failed(ConnectionResetError(), seconds, probe)
                self.times_opened += was_closed and not breaker.is_closed
                self.journal.fail(op, why="reset")
            elif draw.random() < 0.02:
                breaker.abandoned(probe)
                self.journal.ok(op)
            else:
                breaker.succeeded(seconds, probe)
                self.journal.ok(op)
            simulation.say(name, f"breaker {breaker.current_state}")

    def _refused(self, error: BreakerOpenError, *, was_closed: bool) -> None:
        longest = _RULES.longest_open * (1 + _RULES.jitter)
        assert not was_closed, "refused by a breaker that is closed"
        assert 0.0 <= (error.retry_after or 0.0) <= longest, "a time to wait that cannot be"
        self.refused += 1

    def _only(self, probe: Probe) -> None:
        now = self.simulation.now
        self._probes = [each for each in self._probes if each.expires > now]
        current = [each for each in self._probes if each is self.breaker._probe]
        assert all(each is probe for each in current), "two probes at a time"
        self._probes.append(probe)

    def _duration(self) -> float:
        longest = {"up": 0.05, "down": 0.2, "slow": 6.0}[self._health]
        return self.simulation.random.random() * longest

    def _faults(self) -> Steps:
        draw = self.simulation.random
        while self.simulation.now < _CHAOS:
            yield draw.random() * 10.0
            began = self.simulation.nanoseconds()
            self._health = draw.choice(("down", "slow"))
            self.simulation.say("alpha", self._health)
            yield draw.random() * 15.0
            self._health = "up"
            self.simulation.say("alpha", "up")
            healed = self.simulation.nanoseconds()
            self.journal.fact("fault", name="alpha", began=began, healed=healed)
