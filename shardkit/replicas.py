"""Which server a reader asks: the replicas of one physical shard and what is known of them.

Pure: told of failures, latencies, log positions and of the time, never opens a connection. What
is known here may be old: it decides where a read is worth trying, and whether the answer may be
used is decided by the server that gives it (`shardkit.gates`). A replica that failed is left
alone for a while, then tried by one reader; with none left the primary answers.

Source: the power of two choices (Mitzenmacher, 2001) over a peak-sensitive moving average of the
latency times the statements under way, as in Finagle's `PeakEwma`.
"""

from __future__ import annotations

import math
import random
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Final

from shardkit.clock import SYSTEM, Clock
from shardkit.tokens import ONLY_PRIMARY, Need
from shardkit.topology import Endpoint, PhysicalShard

__all__ = ["Member", "ReplicaSet", "Sample"]

_DECAY: Final = 2.0
"""Seconds in which an old latency loses two thirds of its weight; short enough to notice that a
slow replica has recovered. Source: `python -m benchmarks replicas`."""

_RAMP: Final = 5.0
"""Seconds in which a returning replica goes from no share to its full share: its memory is cold."""

_LONGEST_PAUSE: Final = 30.0
"""Seconds that a replica is left alone at most, however often it failed."""

_PENALTY: Final = 1.0
"""Seconds that a failed statement counts as in the latency."""

_KEPT: Final = 256
"""Positions of the primary that are remembered: 25 seconds of ten a second."""

_FRESH: Final = 1.0
"""Seconds after which a sample of a replica is not used to pass it over."""

_UNANSWERED: Final = 5
"""Probes that the primary has answered since a silent replica's last answer. Counted, because after
a pause of the whole machine everybody's last answer is old, and somebody answers first."""

_MARGIN: Final = 4.0
"""How many times faster than lately a replica may become before it is passed over wrongly."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What a server said of its log.

    Attributes:
        at: monotonic time at which it was asked, before it answered.
        system: system identifier.
        timeline: of its log; None where a replica follows nobody.
        lsn: log position: replayed by a replica, flushed by a primary.
        received: log position that a replica has received; the same as `lsn` for a primary.
        in_recovery: whether it is a replica.
    """

    at: float
    system: int
    timeline: int | None
    lsn: int
    received: int
    in_recovery: bool

    @property
    def is_behind(self) -> bool:
        """Whether it has received log that it has not replayed."""
        return self.received > self.lsn


class Member:
    """One replica as it is known. Thread-safe.

    Attributes:
        endpoint: the server.
        sample: what it said last, or None.
        under_way: statements that it is working on for this process.
    """

    def __init__(self, endpoint: Endpoint, clock: Clock, patience: float) -> None:
        self.endpoint = endpoint
        self.sample: Sample | None = None
        self.under_way = 0
        self.n_failures = 0
        self.down_until = -math.inf
        self.returned_at = -math.inf
        self._before: Sample | None = None
        self._lately: Sample | None = None
        self._patience = patience
        self._latency: float | None = None
        self._measured_at = 0.0
        self._clock = clock
        self._lock = threading.Lock()

    def began(self) -> float:
        """Note that a statement was sent; return the time, for `ended`."""
        with self._lock:
            self.under_way += 1
        return self._clock.monotonic()

    def ended(self, began: float, *, failed: bool = False) -> None:
        """Note that a statement was answered, or failed for a reason that is the server's."""
        now = self._clock.monotonic()
        seconds = _PENALTY if failed else now - began
        with self._lock:
            self.under_way -= 1
            decayed = self._decayed(now)
            weight = math.exp(-(now - self._measured_at) / _DECAY)
            self._latency = (
                seconds
                if decayed is None or seconds > decayed  # the peak counts at once
                else decayed * weight + seconds * (1 - weight)
            )
            self._measured_at = now

    def overdue(self, seconds: float) -> None:
        """Note that a statement has not been answered for so long, before it ends: others see it.

        Otherwise they would be sent to a server that has just stopped to answer.
        """
        now = self._clock.monotonic()
        with self._lock:
            decayed = self._decayed(now)
            if decayed is None or seconds > decayed:
                self._latency, self._measured_at = seconds, now

    def latency(self) -> float | None:
        """Return the moving average in seconds, or None when nothing has been measured."""
        return self._decayed(self._clock.monotonic())

    def _decayed(self, now: float) -> float | None:
        """Return the latency, lower the longer it was not measured: somebody has to try again."""
        if self._latency is None:
            return None
        return self._latency * math.exp(-max(0.0, now - self._measured_at) / _DECAY)

    def observed(self, sample: Sample) -> None:
        """Note what the server said of its log."""
        with self._lock:
            self.sample = sample
            if not sample.is_behind:
                self._before = self._lately = None
            elif self._lately is None or sample.at - self._lately.at >= self._patience:
                self._before, self._lately = self._lately, sample

    def has(self, need: Need) -> bool:
        """Tell whether it is known to have replayed what is needed."""
        sample = self.sample
        return (
            sample is not None
            and (sample.system, sample.timeline) == (need.system, need.timeline)
            and sample.lsn >= need.lsn
        )

    def is_hopeless(self, need: Need) -> bool:
        """Tell whether it will not have replayed what is needed when it is asked now.

        That is said of one that was behind in every sample for as long as it may be waited for: a
        shorter halt proves nothing, since it would be waited out.
        """
        sample, before = self.sample, self._before
        now = self._clock.monotonic()
        if sample is None or now - sample.at > _FRESH:
            return False
        if not sample.in_recovery:
            return True
        if (sample.system, sample.timeline) != (need.system, need.timeline):
            return True
        if before is None:
            return False
        seconds = max(sample.at - before.at, 1e-3)
        speed = (sample.lsn - before.lsn) / seconds
        ahead = now - sample.at + seconds + self._patience
        return need.lsn > sample.lsn + _MARGIN * speed * ahead

    def share(self, ramp: float) -> float:
        """Return which part of its share it gets, above 0 and up to 1."""
        age = self._clock.monotonic() - self.returned_at
        return 1.0 if age >= ramp else max(0.05, age / ramp)


class ReplicaSet:
    """The replicas of one physical shard. Thread-safe.

    Args:
        shard: the physical shard.
        region: where this process runs; replicas of the same region are asked first. Empty for
            no preference.
        pause: seconds a replica is left alone after a failure; doubled with each further one.
        patience: seconds that a replica may wait for what it has not replayed yet.
        clock: source of monotonic time.
        chance: source of numbers from 0 to 1.

    Attributes:
        members: the replicas by endpoint.
        system: system identifier of its servers, or None until one was met.
    """

    def __init__(
        self,
        shard: PhysicalShard,
        *,
        region: str = "",
        pause: float = 1.0,
        patience: float = 0.0,
        clock: Clock = SYSTEM,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.primary = shard.primary
        self.replicas = shard.replicas
        self.members = {e: Member(e, clock, patience) for e in shard.replicas}
        self.system: int | None = None
        self._region = region
        self._patience = patience
        self._pause = pause
        self._clock = clock
        self._chance = chance
        self._lock = threading.Lock()
        self._primary_samples: deque[Sample] = deque(maxlen=_KEPT)

    def follow(self, shard: PhysicalShard) -> None:
        """Take other roles: another server has become the primary."""
        with self._lock:
            known = {member.endpoint.address: member for member in self.members.values()}
            self.members = {
                e: known.get(e.address) or Member(e, self._clock, self._patience)
                for e in shard.replicas
            }
            self._primary_samples.clear()
            self.primary, self.replicas = shard.primary, shard.replicas

    def now(self, endpoint: Endpoint) -> Endpoint:
        """Return a server in the role that it has now."""
        for each in (self.primary, *self.replicas):
            if each.address == endpoint.address:
                return each
        return endpoint

    def meets(self, system: int) -> None:
        """Note the system identifier of a server of the physical shard."""
        self.system = system

    # -- choice

    def choose(self, need: Need | None = None, *, excluding: Collection[Endpoint] = ()) -> Endpoint:
        """Return the replica to ask, or the primary when there is none worth asking.

        Near replicas go first, then those known to have replayed what is needed.

        Args:
            need: what it must have replayed, or None.
            excluding: endpoints that this caller already tried in vain.
        """
        if need is ONLY_PRIMARY or (need is not None and need.timeline == 0):
            return self.primary
        found = [m for m in self.members.values() if m.endpoint not in excluding]
        found = [m for m in found if not self.is_down(m.endpoint)]
        if self._is_probed():  # then no reader has to try what may be dead
            found = [m for m in found if not (m.n_failures or self.is_silent(m.endpoint))]
        if need is not None:
            found = [m for m in found if not m.is_hopeless(need)]
        found = _preferred(
            found, lambda m: bool(self._region) and m.endpoint.region == self._region
        )
        if need is not None:
            found = _preferred(found, lambda m: m.has(need))
            found = _preferred(found, lambda m: m.has(need) or m.endpoint.synchronous)
        if not found:
            return self.primary
        chosen = self._better_of_two(found) if len(found) > 1 else found[0]
        self._claim(chosen)
        return chosen.endpoint

    def _better_of_two(self, members: list[Member]) -> Member:
        first = int(self._chance() * len(members))
        second = int(self._chance() * (len(members) - 1))
        one, other = members[first], members[second + (second >= first)]
        if self._cost(other) < self._cost(one):
            one, other = other, one
        share = one.share(_RAMP)
        return one if share == 1.0 or self._chance() < share else other

    @staticmethod
    def _cost(member: Member) -> float:
        """Return what one more statement costs; one nobody knows is tried, by one at a time."""
        latency = member.latency()
        if latency is None:
            return math.inf if member.under_way else 0.0
        return latency * (member.under_way + 1)

    def _claim(self, member: Member) -> None:
        """Let only this reader try a replica whose pause is over, until it has answered."""
        if member.n_failures:
            with self._lock:
                member.down_until = self._clock.monotonic() + self._pause

    # -- failures

    def is_down(self, endpoint: Endpoint) -> bool:
        """Tell whether an endpoint is left alone because it failed."""
        member = self.members.get(endpoint)
        return member is not None and member.down_until > self._clock.monotonic()

    def is_silent(self, endpoint: Endpoint) -> bool:
        """Tell whether a replica does not answer probes, while its primary does."""
        member = self.members.get(endpoint)
        if member is None or member.sample is None or not self._is_probed():
            return False
        asked = member.sample.at
        if self._clock.monotonic() - asked <= _FRESH:
            return False
        samples = self._primary_samples
        return len(samples) >= _UNANSWERED and samples[-_UNANSWERED].at > asked

    def _is_probed(self) -> bool:
        samples = self._primary_samples
        return bool(samples) and self._clock.monotonic() - samples[-1].at <= _FRESH

    def failed(self, endpoint: Endpoint) -> None:
        """Note that an endpoint did not answer.

        At most half of the replicas, rounded up, are left alone for longer and longer; others
        are tried again after the first pause, so that a fault of ours never ejects them all.
        """
        member = self.members.get(endpoint)
        if member is None:
            return
        with self._lock:
            member.n_failures += 1
            now = self._clock.monotonic()
            resting = sum(
                m.down_until > now + self._pause for m in self.members.values() if m is not member
            )
            n_times = member.n_failures if resting < (len(self.members) + 1) // 2 else 1
            pause = min(self._pause * 2 ** min(n_times - 1, 10), _LONGEST_PAUSE)
            member.down_until = now + pause

    def answered(self, endpoint: Endpoint) -> None:
        """Note that an endpoint accepted a connection."""
        member = self.members.get(endpoint)
        if member is not None and member.n_failures:
            with self._lock:
                member.n_failures = 0
                member.down_until = -math.inf
                member.returned_at = self._clock.monotonic()

    # -- log positions

    def observed(self, endpoint: Endpoint, sample: Sample) -> None:
        """Note what a server said of its log."""
        if endpoint in self.members:
            self.members[endpoint].observed(sample)
        elif not sample.in_recovery:
            self.system = sample.system
            self._primary_samples.append(sample)

    def need_of_lag(self, max_lag: float) -> Need:
        """Return what a replica has replayed that is no staler than some seconds.

        Args:
            max_lag: seconds of delay that are acceptable.

        Returns:
            `ONLY_PRIMARY` while the primary's position of that time is not known.
        """
        oldest = self._clock.monotonic() - max_lag
        for sample in tuple(self._primary_samples):
            if sample.at >= oldest:
                return Need(sample.system, sample.timeline or 0, sample.lsn)
        return ONLY_PRIMARY

    def lag(self, endpoint: Endpoint) -> tuple[int, float] | None:
        """Return how far a replica is behind, in bytes and in seconds; None when not known.

        The seconds are an upper bound, on the clock of this process alone: how long ago the
        primary was at a position that the replica has replayed.
        """
        member = self.members.get(endpoint)
        samples = tuple(self._primary_samples)
        if member is None or member.sample is None or not samples:
            return None
        replayed, now = member.sample.lsn, self._clock.monotonic()
        if member.sample.timeline != samples[-1].timeline:
            return None
        passed = [sample.at for sample in samples if sample.lsn <= replayed]
        if not passed:
            return samples[-1].lsn - replayed, now - samples[0].at
        return max(0, samples[-1].lsn - replayed), now - passed[-1]


def _preferred(members: list[Member], is_better: Callable[[Member], bool]) -> list[Member]:
    """Return the members that are better, or all when none is."""
    better: Iterable[Member] = [member for member in members if is_better(member)]
    return list(better) or members
