"""A simulated server of a physical shard: a log, a role, a timeline, standbys that receive it.

Serves as PostgreSQL does with `synchronous_standby_names = 'ANY k (…)'`: what a primary writes is
in its log at once, and acknowledged when k standbys have it; a restarted primary has all of its
log; a promoted standby begins a timeline. A standby whose log has something that its primary's has
not cannot follow. One that is torn has the beginning of a record which a crash has cut short, and
gets nothing of a later timeline, however often it connects.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from shardkit.ops.failover.machine import CUT, Node
from tests.simulation.answers import Error, Ok
from tests.simulation.scheduler import LOST, Call, Reply, Server, Simulation, Steps

__all__ = ["Entry", "PostgresNode"]

_LOST_AFTER: Final = 0.25
"""Seconds without a word of its primary, after which a standby says that it is out of reach."""

_RENEWED: Final = 0.27
_KEEPALIVE: Final = 0.1
"""Seconds after which a primary says something to its standbys."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A record of the log.

    Attributes:
        timeline: on which it was written.
        value: an element, or None where the timeline was registered.
        n: tells entries of one timeline apart.
        at: virtual seconds at which it was written.
        raises: what it adds to the epoch.
    """

    timeline: int
    value: str | None
    n: int
    at: float
    raises: int = 0


class PostgresNode(Server):
    """One server.

    Attributes:
        peers: every server of the physical shard, by name.
        log: what it has, durably.
        timeline: of its log.
        in_recovery: whether it is a standby.
        follows: whom a standby is told to follow.
        confirm: standbys that have to have a write before it is acknowledged.
        is_closed: a primary that was told to take no writes.
        is_torn: whether it has the beginning of a record only.
        claimed_by: who changes it now, by a lock of a session.
        is_over: whether the run has ended.
    """

    def __init__(self, simulation: Simulation, name: str, confirm: int) -> None:
        super().__init__(simulation, name)
        self.peers: dict[str, PostgresNode] = {}
        self.log: list[Entry] = []
        self.timeline = 1
        self.in_recovery = True
        self.follows: str | None = None
        self.confirm = confirm
        self.is_closed = False
        self.is_stuck = False
        self.is_torn = False
        self.claimed_by = ""
        self.is_over = False
        self._acknowledged: dict[str, int] = {}
        self._unanswered: list[tuple[int, Reply]] = []
        self._heard = 0.0
        self._renewed: float | None = None
        self._began: int | None = None
        self._n = 0
        self._parked: list[tuple[int, Reply]] = []

    @property
    def registered(self) -> int:
        """The newest timeline that was registered, as far as it knows."""
        return max((entry.timeline for entry in self.log if entry.value is None), default=1)

    @property
    def epoch(self) -> int:
        """Of ownership, as its log says."""
        return 1 + sum(entry.raises for entry in self.log)

    def handle(self, request: Any, reply: Reply) -> None:
        getattr(self, f"_on_{request[0]}")(reply, *request[1:])

    # -- clients

    def _on_hello(self, reply: Reply) -> None:
        reply(Ok((self.in_recovery, self.timeline, self.registered, self.is_closed)))

    def _on_write(self, reply: Reply, value: str | None, timeline: int | None, raises: int) -> None:
        """Write, and answer once enough standbys have it."""
        if self.in_recovery or self.is_closed:
            reply(Error("read only"))
            return
        if timeline is not None and timeline != self.timeline:
            reply(Error("another timeline"))
            return
        self._n += 1
        self.log.append(Entry(self.timeline, value, self._n, self.simulation.now, raises))
        self._flow()
        if value is None:  # registered at once: standbys are told to follow only afterwards
            reply(Ok())
            return
        self._unanswered.append((len(self.log), reply))
        self._answer()

    def _answer(self) -> None:
        """Answer those whose writes enough standbys have."""
        have = sorted(self._acknowledged.values(), reverse=True)
        until = len(self.log) if not self.confirm else (
            have[self.confirm - 1] if len(have) >= self.confirm else 0
        )  # fmt: skip
        done = [each for each in self._unanswered if each[0] <= until]
        self._unanswered = [each for each in self._unanswered if each[0] > until]
        for _, reply in done:
            reply(Ok((self.name, self.timeline, self.epoch)))

    # -- replication

    @property
    def _receives(self) -> bool:
        return self.is_up and self.in_recovery

    def receives(self) -> Steps:
        """Receive the log of whom it follows, to the end."""
        while not self.is_over:
            yield 0.001 + 0.002 * self.simulation.random.random()
            if self._is_frozen or not self.is_up or self.follows not in self.peers:
                yield 0.05
                continue
            source, life = self.follows, self.life
            last = self.log[-1] if self.log else None
            request = ("stream", self.name, len(self.log), last)
            answer = yield Call(self.peers[source], request, 1.5 * _KEEPALIVE)
            if (self.life, self.follows) != (life, source) or not self._receives:
                continue  # told otherwise meanwhile
            if answer is LOST:
                continue
            self._heard = self.simulation.now
            if isinstance(answer, Error):
                self.is_stuck = answer.why == "diverged"
                yield 0.05
                continue
            self.is_stuck = False
            entries, timeline = answer.value
            if self.is_torn and timeline != self.timeline:
                yield 0.05
                continue
            self.is_torn = False  # by whoever wrote it, and has recovered
            if not self._is_frozen:
                self.log += entries
                self.timeline = timeline
                if entries:
                    told = ("flushed", self.name, len(self.log), timeline)
                    yield Call(self.peers[source], told, 0.003)

    def _on_stream(self, reply: Reply, who: str, at: int, last: Entry | None) -> None:
        if self.in_recovery:
            reply(Error("no primary"))
        elif at > len(self.log) or (at and self.log[at - 1] != last):
            reply(Error("diverged"))
        elif at < len(self.log):
            reply(Ok((self.log[at : at + 20], self.timeline)))
        else:
            parked = (at, reply)
            self._parked.append(parked)
            self.simulation.at(_KEEPALIVE, self._greet, parked)

    def _greet(self, parked: tuple[int, Reply]) -> None:
        """Say to a standby that there is nothing new."""
        if parked in self._parked and not self._is_frozen:
            self._parked.remove(parked)
            parked[1](Ok(((), self.timeline)))

    def _flow(self) -> None:
        """Send what there is to whoever waits for it."""
        parked, self._parked = self._parked, []
        for at, reply in parked:
            reply(Ok((self.log[at : at + 20], self.timeline)))

    def _on_flushed(self, reply: Reply, who: str, at: int, timeline: int) -> None:
        if not self.in_recovery and timeline == self.timeline:
            self._acknowledged[who] = max(at, self._acknowledged.get(who, 0))
            self._answer()
        reply(Ok())

    # -- what a failover asks and does

    def _on_probe(self, reply: Reply) -> None:
        """Write something of no consequence: it waits for nobody."""
        reply(Ok() if not self.in_recovery and not self.is_closed else Error("read only"))

    def _on_facts(self, reply: Reply, who: str) -> None:
        now = self.simulation.now
        registers = [entry.at for entry in self.log if entry.value is None]
        # Streaming: it has heard from its primary lately, and its log goes on there.
        is_silent = now - self._heard > _LOST_AFTER
        reply(
            Ok(
                Node(
                    self.name, answers=True, in_recovery=self.in_recovery, timeline=self.timeline,
                    position=len(self.log), reached=(self.timeline, len(self.log)),
                    registered=self.registered, began=self._began,
                    follows=self.follows,
                    streams=self.in_recovery and not is_silent and not self.is_stuck
                    and self.follows in self.peers,
                    is_lost=self.in_recovery and is_silent and self.follows in self.peers,
                    is_renewed=self._renewed is not None and now - self._renewed > _RENEWED,
                    is_closed=self.is_closed, is_drained=self.is_closed, is_quiet=self.is_closed,
                    is_claimed=self.claimed_by == who,
                    since=now - registers[-1] if registers else None,
                )
            )
        )  # fmt: skip

    def _on_claim(self, reply: Reply, who: str) -> None:
        if self.claimed_by in {"", who}:
            self.claimed_by = who
            reply(Ok())
        else:
            reply(Error("claimed"))

    def _mine(self, reply: Reply, who: str, do: Callable[[], None]) -> None:
        """Do what only the session may that has the lock."""
        if self.claimed_by != who:
            reply(Error("not claimed"))
            return
        do()
        reply(Ok())

    def _on_renew(self, reply: Reply) -> None:
        if self._renewed is None:
            self._renewed = self.simulation.now
        reply(Ok())

    def _on_cut(self, reply: Reply, who: str) -> None:
        def cut() -> None:
            self.follows = CUT
            self.life += 1  # what was on its way here is not received any more

        self._mine(reply, who, cut)

    def _on_promote(self, reply: Reply, who: str) -> None:
        def promote() -> None:
            self.in_recovery, self.follows, self.is_torn = False, None, False
            self._began = len(self.log)
            self.timeline = max(self.timeline, self.registered) + 1
            self._acknowledged.clear()
            self.simulation.say(self.name, f"is promoted to timeline {self.timeline}")

        if self.in_recovery:
            self._mine(reply, who, promote)
        else:
            reply(Ok())

    def _on_fence(self, reply: Reply) -> None:
        """Take no writes any more; sessions end, and nobody is answered."""
        if not self.in_recovery:
            self.is_closed = True
            self._unanswered.clear()
        reply(Ok())

    def _on_open(self, reply: Reply) -> None:
        self.is_closed = False
        reply(Ok())

    def _on_repoint(self, reply: Reply, who: str, to: str) -> None:
        if self.claimed_by not in {"", who}:
            reply(Error("claimed"))
            return
        if self.in_recovery:
            self.follows, self._renewed = to, None
            self._heard = self.simulation.now
        reply(Ok())

    def _on_rejoin(self, reply: Reply, to: str, anew: bool = False) -> None:
        """Become a standby of another: what its log lacks is given up.

        Where it lacks nothing, all stays as it is: so does pg_rewind.
        """
        theirs = self.peers[to].log
        n = 0
        while n < min(len(theirs), len(self.log)) and theirs[n] == self.log[n]:
            n += 1
        self.is_torn = self.is_torn and n == len(self.log) and not anew
        self.log = self.log[:n]
        self.timeline = self.log[-1].timeline if self.log else 1
        self.in_recovery, self.is_closed, self.is_stuck = True, False, False
        self.follows, self._renewed = to, None
        self._heard = self.simulation.now
        self._unanswered.clear()
        self._acknowledged.clear()
        self._parked.clear()
        reply(Ok())

    # -- faults

    def crash(self) -> None:
        """Lose sessions, and nothing of the log."""
        super().crash()
        self.claimed_by = ""
        self._unanswered.clear()
        self._acknowledged.clear()
        self._parked.clear()
        self._heard = 0.0
        self._renewed = None
