"""What a relay does on one physical shard: looks, claims, has events handled, finishes, sleeps.

One thread runs it until it is told to stop; a server that is away is asked again. Made by
`shardkit.relay`. Source: docs/outbox.md.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, Protocol

import psycopg
from psycopg import sql

from shardkit.batches import Batch, Claims, Taken
from shardkit.cacheable import CHANGED
from shardkit.cacherepairs import repair_pause
from shardkit.clock import Clock
from shardkit.cluster import AsyncCluster, Cluster
from shardkit.delivery import Failure, Handler, Hands, Job
from shardkit.errors import EndpointUnavailableError
from shardkit.events import Relayed
from shardkit.outbox import Backoff
from shardkit.topology import MAX_LOGICAL_SHARDS, PhysicalShard, schema_name

__all__ = ["RelayServer"]

_LOG: Final = logging.getLogger("shardkit.relay")

_MOVING: Final = (psycopg.errors.InsufficientPrivilege, psycopg.errors.UndefinedTable)
"""What a statement meets whose logical shard is leaving the server."""

_SHARDS_PER_CLAIM = 16
_SHARDS_PER_LOOK = 512
"""Outboxes looked into by one statement; each holds one lock of `max_locks_per_transaction`."""

_CLEANING_PAUSE = 0.15
"""Seconds between two logical shards that are cleaned, while there is nothing else to do: as long
as it takes, nobody hears what is notified."""

_BUSY_PAUSE = 0.5
"""Seconds after which one is cleaned nevertheless."""

_SHORTEST_POLL = 0.02
_LOOKING = 0.1
"""Share of the time that may be spent looking, when writers are about to commit all the time."""

_ROWS_PER_CLEANING = 2000

# Row locks on old notes. By the clock of the database.
_CLEAN = """
DELETE FROM {effects} WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM {effects} WHERE applied < now() - make_interval(secs => {retention})
    LIMIT {n}))
"""


class Terms(Protocol):
    """What a relay is told to do, and how; see `shardkit.relay.Relay`."""

    cluster: Cluster | AsyncCluster
    handlers: dict[str, Handler]
    batch: int
    threads: int
    lease: float
    deadline: float
    backoff: Backoff
    poll: float
    retention: float
    clock: Clock
    step: Callable[[str], None]


class RelayServer:
    """The loop of one physical shard.

    Args:
        relay: whose events, and on which terms.
        shard: the physical shard.
        stop: set when it has to end.
        loop: where coroutines are awaited; None for a loop of its own.

    Attributes:
        error: what ended it, for whoever has started it.
        delivered: how many events were.
    """

    def __init__(
        self,
        relay: Terms,
        shard: PhysicalShard,
        stop: threading.Event,
        loop: asyncio.AbstractEventLoop | None,
    ) -> None:
        self.relay = relay
        self.shard = shard
        self.stop = stop
        self.error: BaseException | None = None
        self.delivered = 0
        self._logical_shards: tuple[int, ...] = ()
        self._waiting: deque[int] = deque()
        self._cleaned = 0
        self._next_cleaning = 0.0
        self._look_time = 0.0
        self._retry_at: float | None = None
        self._claims: Claims | None = None
        self._hands = Hands(
            relay.handlers,
            n_threads=relay.threads,
            deadline=relay.deadline,
            clock=relay.clock,
            step=relay.step,
            loop=loop,
        )
        # Where this one begins to look, so that relays do not all want the same.
        self._from = random.randrange(MAX_LOGICAL_SHARDS)  # noqa: S311  no secret

    def close(self) -> None:
        """End its handlers and its connection."""
        self._hands.close()
        if self._claims is not None:
            self._claims.close()

    def serve(self) -> None:
        """Deliver until told to stop."""
        while not self.stop.is_set():
            try:
                claims = self._connected()
                if self.relay.clock.monotonic() > self._next_cleaning + _BUSY_PAUSE:
                    self._clean(claims)
                if not self._waiting:
                    self._look(claims)
                claimed = 0
                while self._waiting and not claimed and not self.stop.is_set():
                    claimed = self._turn(claims)
                if not claimed:
                    self._clean(claims)
                    self._sleep(claims)
            except (psycopg.Error, EndpointUnavailableError) as error:
                if not self._is_lost(error):
                    raise
                _LOG.warning("relay of %s: %s", self.shard.name, str(error).strip())
                self.stop.wait(self.relay.poll * (5 + 5 * random.random()))  # noqa: S311

    def drain(self) -> None:
        """Deliver until nothing is due."""
        claims = self._connected()
        claimed = 1
        while claimed and self._look(claims):
            claimed = 0
            while self._waiting and not self.stop.is_set():
                claimed += self._turn(claims)

    def _connected(self) -> Claims:
        if self._claims is None:
            self._claims = Claims(self.shard, lease=self.relay.lease)
        return self._claims

    def _is_lost(self, error: Exception) -> bool:
        """Tell whether a server went away, or a logical shard: both may come back."""
        if self._claims is not None and not self._claims.connection.closed:
            if isinstance(error, _MOVING):
                with suppress(psycopg.Error):  # then it is asked again with a new connection
                    self._logical_shards = self._claims.owned()  # one of them moves
                    return True
            # Read only: it is no primary any more, or is about to be none.
            elif not isinstance(
                error, psycopg.OperationalError | psycopg.errors.ReadOnlySqlTransaction
            ):
                return False
        if self._claims is not None:
            self._claims.close()
            self._claims = None
        self._waiting.clear()
        return True

    # -- one turn

    def _look(self, claims: Claims) -> bool:
        """Look which logical shards have something; True when some have."""
        began = self.relay.clock.monotonic()
        shards = self._logical_shards = claims.owned()
        self._from = (self._from + 1) % max(len(shards), 1)
        first = shards[self._from] if shards else 0
        self._waiting.clear()
        for start in range(0, len(shards), _SHARDS_PER_LOOK):
            some = shards[start : start + _SHARDS_PER_LOOK]  # the same each time, see `waiting`
            self._waiting.extend(claims.waiting(some))
        self._waiting = deque(sorted(self._waiting, key=lambda shard: (shard < first, shard)))
        self._look_time = self.relay.clock.monotonic() - began
        return bool(self._waiting)

    def _turn(self, claims: Claims) -> int:
        """Claim a batch, deliver it, finish it; return how many events were claimed."""
        relay = self.relay
        asked = [self._waiting.popleft() for _ in range(min(len(self._waiting), _SHARDS_PER_CLAIM))]
        batch = claims.take(
            asked, now=relay.clock.monotonic(), n_shards=len(asked), n_events=relay.batch
        )
        relay.step("claimed")
        if not batch.events:
            return 0
        n_claimed = len(batch.events)
        self._deliver(claims, batch)
        if n_claimed >= relay.batch:  # there may be more, and some were not reached
            self._waiting.extend(asked)
        return n_claimed

    def _deliver(self, claims: Claims, batch: Batch) -> None:
        relay = self.relay
        given_up = [
            t
            for t in batch.events
            if t.event.attempts >= relay.backoff.attempts and t.event.topic != CHANGED
        ]
        for taken in given_up:  # each attempt ended with the process, so nobody could say so
            batch.events.remove(taken)
            claims.fail(batch, taken, pause=None, reason="every relay ended that handled it")
        started = renewed = relay.clock.monotonic()
        jobs = self._hands.start(batch)
        done: list[Taken] = []
        failed: list[Failure] = []
        try:
            while not all(job.ended.is_set() for job in jobs):
                self._wait(jobs, renewed + relay.lease / 3)
                if relay.clock.monotonic() >= renewed + relay.lease / 3:
                    renewed = relay.clock.monotonic()
                    done += self._note(claims, batch, jobs, failed, release=False)
        except BaseException:
            for job in jobs:  # its handlers must not go on under a claim that nobody extends
                job.is_stopped = True
            while not all(job.ended.is_set() for job in jobs):
                self._wait(jobs, relay.clock.monotonic() + relay.deadline)
            raise
        done += self._note(claims, batch, jobs, failed, release=True)
        relay.step("finished")
        self.delivered += len(done)
        listeners = relay.cluster.connections.listeners
        if listeners:
            seconds = relay.clock.monotonic() - started
            listeners.emit(Relayed(self.shard.name, len(done), len(failed), seconds))

    def _wait(self, jobs: list[Job], until: float) -> None:
        """Wait for the jobs, or until a time, or until a handler is late."""
        clock = self.relay.clock
        for job in jobs:
            while not job.ended.is_set():
                current = job.current
                limit = until if current is None else min(until, current[1])
                if job.ended.wait(max(min(limit - clock.monotonic(), 0.5), 0.001)):
                    break
                for each in jobs:
                    self._hands.end_late(each)
                if clock.monotonic() >= until:
                    return

    def _note(
        self,
        claims: Claims,
        batch: Batch,
        jobs: list[Job],
        failed: list[Failure],
        *,
        release: bool,
    ) -> list[Taken]:
        """Write down what has come of a batch since the last time; return what was delivered."""
        relay, done = self.relay, list[Taken]()
        for job in jobs:
            finished, failures = job.results()
            done += finished
            failed += failures
            repairs = [failure for failure in failures if failure.taken.event.topic == CHANGED]
            self._repair_later(claims, batch, [failure.taken for failure in repairs])
            for failure in failures:
                if failure.taken.event.topic != CHANGED:
                    tries = failure.taken.event.attempts + 1
                    pause = relay.backoff.pause(tries, random.random())  # noqa: S311
                    claims.fail(
                        batch,
                        failure.taken,
                        pause=None if failure.is_final else pause,
                        reason=failure.reason,
                    )
                relay.step("failed")
        relay.step("before finish" if release else "before renewal")
        lost = claims.finish(batch, done, now=relay.clock.monotonic(), release=release)
        for shard in lost:
            _LOG.warning("the claim of logical shard %d was taken over", shard)
        return [taken for taken in done if taken.event.logical_shard not in lost]

    def _repair_later(self, claims: Claims, batch: Batch, left: Sequence[Taken]) -> None:
        """Postpone repairs of the cache; never given up: until then old rows may be shown."""
        pauses = [repair_pause(taken.event.attempts, random.random()) for taken in left]  # noqa: S311
        if pauses:
            reason = "a cache server has not answered yet"
            claims.postpone(batch, list(zip(left, pauses, strict=True)), reason=reason)
            self._retry_at = self.relay.clock.monotonic() + min(pauses)

    # -- between turns

    def _sleep(self, claims: Claims) -> None:
        """Wait until a writer notifies or it is time to look again."""
        relay = self.relay
        now = relay.clock.monotonic()
        # What was paused for less than a poll is not to wait for one.
        poll = relay.poll
        if self._retry_at is not None:
            poll = min(max(self._retry_at - now, 0.001), poll)
            self._retry_at = None
        if not claims.is_direct:
            self.stop.wait(poll)
            return
        if not claims.fall_asleep():
            # Another relay sleeps, and whoever commits notifies both; or a writer that was told
            # that nobody sleeps is about to commit, and says nothing: so look soon.
            soon = max(_SHORTEST_POLL, self._look_time / _LOOKING)
            self._wake(claims.notified(min(soon, poll)))
            return
        try:
            if self._look(claims):  # committed before anybody knew that this one sleeps
                # What is there may be paused or another's: not to look all the time.
                self._wake(claims.notified(poll))
                return
            until = now + 10 * relay.poll
            while not self.stop.is_set() and relay.clock.monotonic() < until:
                if found := claims.notified(min(relay.poll, 0.25)):
                    self._wake(found)
                    self._turn(claims)  # before it is awake: that is a round trip
                    return
        finally:
            claims.wake_up()

    def _wake(self, shards: list[int]) -> None:
        self._waiting.extend(shard for shard in shards if shard not in self._waiting)

    def _clean(self, claims: Claims) -> None:
        """Delete notes of effects that are older than the retention, of one logical shard."""
        now = self.relay.clock.monotonic()
        if now < self._next_cleaning or not self._logical_shards:
            return
        self._next_cleaning = now + _CLEANING_PAUSE
        shard = self._logical_shards[self._cleaned % len(self._logical_shards)]
        self._cleaned += 1
        statement = sql.SQL(_CLEAN).format(
            effects=sql.Identifier(schema_name(shard), "shardkit_effects"),
            retention=self.relay.retention,
            n=_ROWS_PER_CLEANING,
        )
        if claims.connection.execute(statement).rowcount >= _ROWS_PER_CLEANING:
            self._cleaned -= 1  # there may be more
