"""Asks every primary who owns what, now and then and whenever somebody must know.

Runs beside the sessions, like `shardkit.probes`: one small connection for each physical shard,
from the first use of the cluster on. Only what a primary says of itself is taken, if it is the
physical shard that the configuration says. It also lifts fences whose mover has gone silent.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
import threading
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from typing import Any, Final, Protocol

import psycopg
from psycopg import AsyncConnection
from sqlalchemy.util import await_only
from sqlalchemy.util.concurrency import in_greenlet

from shardkit import deadlines
from shardkit.clock import SYSTEM, Clock
from shardkit.heldmap import HeldMap
from shardkit.ownership import LIFT_AFTER, Answer, Claimed, claims_of
from shardkit.probes import answered
from shardkit.runners import AsyncBackground, Background
from shardkit.successors import successor
from shardkit.topology import Endpoint, Topology, libpq_options

__all__ = ["PATIENCE", "AsyncMapWatch", "MapWatch"]

_LOG: Final = logging.getLogger(__name__)

PATIENCE: Final = 3.0
"""Seconds that a primary has to say what it owns."""

_WAIT: Final = 1.5
"""Seconds that whoever must know waits for that: what a server that is silent owns does not change,
and a pooler whose connections are all in use keeps nobody waiting twice."""

_AGAIN: Final = 0.5
"""Seconds after which a primary that did not answer is asked again by itself."""

# AccessShareLock on small tables. Columns that an older version lacks are read as JSON.
_ASK: Final = f"""
SELECT i.cluster, i.physical, s.system_identifier, to_jsonb(i) ->> 'timeline',
    CASE WHEN NOT pg_catalog.pg_is_in_recovery() THEN ('x' || pg_catalog.substr(
        pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_insert_lsn()), 1, 8))::bit(32)::bigint
    END,
    (SELECT pg_catalog.string_agg(pg_catalog.concat_ws(
        ' ', o.logical_shard, o.epoch, o.state, o.moved_to), ',' ORDER BY o.logical_shard)
        FROM shardkit.ownership AS o),
    ARRAY(SELECT o.logical_shard FROM shardkit.ownership AS o WHERE o.state = 'fenced'
        AND (to_jsonb(o) ->> 'fenced_at')::timestamptz
            < pg_catalog.clock_timestamp() - interval '{LIFT_AFTER} s'),
    pg_catalog.to_regprocedure('shardkit.on_timeline(bigint)') IS NOT NULL,
    EXISTS (SELECT FROM pg_catalog.pg_stat_replication)
FROM shardkit.identity AS i, pg_catalog.pg_control_system() AS s
"""

_LOOK: Final = 3.0
_SELDOM: Final = 60.0
"""Seconds between the first two looks for another primary while nobody follows the one that
answers, and at most: each pause is twice the one before. Where storage is shared nobody follows."""

_FIRST_POLL: Final = 0.002
_LAST_POLL: Final = 0.02
_GROWTH: Final = 1.5
"""Seconds between two questions about a logical shard that somebody waits for; one asks for all
that wait in this process. A wait that grows with what has passed is late by a share of that, with
few questions; where it was handed over to is asked at once and begins anew."""

Follow = Callable[[str, Endpoint], Topology]
"""Told of another primary of a physical shard; returns the topology with it."""

Receive = Callable[[str, str, int], Awaitable[None]]
"""Told that logical shards are on their way: where from, where to, and how many; makes ready."""


class Hear(Protocol):
    """Told that the primary of a physical shard answers again."""

    def __call__(self, physical: str, *, is_another: bool) -> None:
        """Take note, and wait for nothing.

        Args:
            physical: name of the physical shard.
            is_another: whether it is another server than before; a pooler leads to it by the same
                address.
        """


_LIFT: Final = "SELECT shardkit.lift_expired_fence(%s)"


class _NotBelievedError(Exception):
    """A server answered that is not the primary that was asked for."""


class _Watcher:
    """Asks the primaries of a cluster until it is cancelled."""

    def __init__(
        self,
        topology: Topology,
        held: HeldMap,
        clock: Clock,
        *,
        follow: Follow | None,
        hear: Hear | None,
        receive: Receive | None,
    ) -> None:
        self._topology = topology
        self._hear = hear
        self._follows = follow or (lambda _physical, _primary: self._topology)
        self._receive = receive
        self._received: dict[tuple[str, str], frozenset[int]] = {}
        self._polls: dict[str, float] = {}
        self._held = held
        self._clock = clock
        self._interval = held.max_age / 2
        self._calls: dict[str, asyncio.Event] = {}
        self._texts: dict[str, tuple[str, dict[int, Claimed]]] = {}
        self._replaced: set[str] = set()

    async def run(self) -> None:
        """Ask until cancelled."""
        self._calls = {name: asyncio.Event() for name in self._topology.physical}
        self._polls, self._received = {}, {}
        self._replaced.clear()
        async with asyncio.TaskGroup() as group:
            self._group = group
            for name in self._topology.physical:
                group.create_task(self._watch(name))

    def hurry(self, physical: Collection[str]) -> None:
        """Ask some of them now; in the loop that runs this."""
        for name in physical:
            if name in self._calls:
                self._calls[name].set()

    def look(self) -> None:
        """Ask those now that somebody has begun to wait for; in the loop that runs this."""
        self.hurry(self._held.awaited() - self._polls.keys())

    def _pace(self, name: str) -> float:
        """Return after how many seconds to ask again, as far as nobody calls."""
        if name not in self._held.awaited():
            self._polls.pop(name, None)
            return self._interval
        seconds = self._polls.get(name, _FIRST_POLL)
        self._polls[name] = min(seconds * _GROWTH, _LAST_POLL)
        return seconds

    def _arrive(self) -> None:
        """Have made ready for what is on its way, once."""
        arriving = self._held.arriving
        if self._receive is None or arriving == self._received:
            return
        for (source, target), shards in arriving.items():
            if not shards <= self._received.get((source, target), frozenset()):
                # Whoever has started this had a deadline of its own, perhaps.
                work = self._made_ready(source, target, len(shards))
                self._group.create_task(work, context=contextvars.Context())
        self._received = dict(arriving)

    async def _made_ready(self, source: str, target: str, n_shards: int) -> None:
        assert self._receive is not None, "asked by _arrive"
        try:
            await self._receive(source, target, n_shards)
        except Exception as error:  # noqa: BLE001  it was to save time, and whoever comes tries again
            _LOG.debug("nothing is ready at %s: %s", target, error)

    async def _watch(self, name: str) -> None:
        while True:
            try:
                await self._follow(name)
                continue
            except (psycopg.Error, OSError, TimeoutError, ValueError, _NotBelievedError) as error:
                _LOG.debug("%s does not say what it owns: %s", name, error)
            if await self._changes(name):
                continue
            self._held.silent(name, self._held.asking(name))
            await self._called(name, _AGAIN)

    async def _look_around(self, name: str) -> None:
        """Look for another primary while one answers."""
        if await self._changes(name):
            self._replaced.add(name)
            self._calls[name].set()

    async def _changes(self, name: str) -> bool:
        """Look for another primary; tell whether there is one now."""
        shard = self._topology.physical[name]
        if shard.pooler is not None or not shard.replicas:
            return False  # a pooler leads to it
        found = await successor(self._topology, name, self._held.believed(name))
        if found is None or found == shard.primary:
            return False
        _LOG.warning("%s is the primary of %s now", found.address, name)
        self._topology = self._follows(name, found)
        return True

    async def _follow(self, name: str) -> None:
        """Ask a primary until another one has taken its place.

        Raises:
            _NotBelievedError: it is no primary, or not the one that counts.
            psycopg.Error: it does not answer.
            OSError: the same.
            TimeoutError: the same.
        """
        url = self._topology.physical[name].primary.url
        connection: AsyncConnection[Any] | None = None
        try:
            async with answered(PATIENCE, self._clock):
                connection = await AsyncConnection.connect(
                    autocommit=True,
                    prepare_threshold=None,
                    **{"application_name": "shardkit map", **libpq_options(url)},
                )
            is_first, look_at, pause = True, -math.inf, _LOOK
            while True:
                question, at = self._held.asking(name), self._clock.monotonic()
                async with answered(PATIENCE, self._clock):
                    row: Any = await (await connection.execute(_ASK)).fetchone()
                answer, expired, is_followed = self._answer(name, row)
                if is_followed:
                    look_at, pause = -math.inf, _LOOK
                elif at >= look_at:
                    # An old one that somebody has started again looks like any other, but for this.
                    look_at, pause = at + pause, min(2 * pause, _SELDOM)
                    look = self._look_around(name)
                    if is_first:
                        await look
                    else:
                        self._group.create_task(look, context=contextvars.Context())
                if name in self._replaced:
                    self._replaced.remove(name)
                    return
                before = self._held.believed(name)
                if not self._held.told(name, question, at, answer):
                    raise _NotBelievedError("its timeline is not registered, or not the newest")
                is_another = before is not None and before.timeline != answer.timeline
                if self._hear is not None and (is_first or is_another):
                    self._hear(name, is_another=is_another)
                is_first = False
                for number in expired:
                    async with answered(PATIENCE, self._clock):
                        lifted: Any = await (await connection.execute(_LIFT, (number,))).fetchone()
                    if lifted[0]:
                        _LOG.warning("lifted the fence of logical shard %d on %s", number, name)
                        self._calls[name].set()
                self._arrive()
                self.look()
                await self._called(name, self._pace(name))
        finally:
            if connection is not None:
                connection.pgconn.finish()  # at once: nothing is under way that matters

    def _answer(self, name: str, row: Any) -> tuple[Answer, list[int], bool]:
        """Return what a row says, the fences that have expired, and whether anybody follows."""
        if row is None or tuple(row[:2]) != (self._topology.name, name) or row[4] is None:
            raise _NotBelievedError("it is another server, or no primary")
        _, _, system, registered, timeline, text, expired, tells, is_followed = row
        if name not in self._texts or self._texts[name][0] != text:
            self._texts[name] = (text, claims_of(text or ""))
        rows = self._texts[name][1]
        number = None if registered is None else int(registered)
        return Answer(system, timeline, rows, number, tells), expired, is_followed

    async def _called(self, name: str, seconds: float) -> None:
        """Wait until somebody must know, or for a while."""
        call = self._calls[name]
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await call.wait()
        call.clear()


def _patience() -> float:
    """Return how long to wait for an answer: at most half of what is left for all of it."""
    return min(_WAIT, deadlines.left(math.inf) / 2)


class MapWatch(Background):
    """What asks for a `Cluster`: one daemon thread. Thread-safe; a fork starts anew."""

    def __init__(
        self,
        topology: Topology,
        held: HeldMap,
        *,
        follow: Follow | None = None,
        hear: Hear | None = None,
        receive: Receive | None = None,
        clock: Clock = SYSTEM,
    ) -> None:
        self._watcher = _Watcher(topology, held, clock, follow=follow, hear=hear, receive=receive)
        self._held = held
        super().__init__(self._watcher.run, "shardkit map")

    def refresh(self, physical: Collection[str]) -> None:
        """Have physical shards asked, and wait until they have answered or do not."""
        if self.is_closed:  # sessions that are still open go on with what is known
            for name in physical:
                self._held.silent(name, self._held.asking(name))
            return
        wanted = self._held.wanted(physical)
        done = threading.Event()
        tell = done.set
        self._held.when_answered(wanted, tell)
        self.start()
        self.call(lambda: self._watcher.hurry(physical))
        if not done.wait(_patience()):
            self._held.forget(tell)
            for name, question in wanted.items():
                self._held.silent(name, question)

    def wait(self, logical_shards: Collection[int], seconds: float, *, writes: bool) -> bool:
        """Wait until logical shards can be used, or that long; return whether anybody looks."""
        if self.is_closed:
            return False
        done = threading.Event()
        tell = done.set
        self._held.when_open(logical_shards, tell, writes=writes)
        self.start()
        self.call(self._watcher.look)
        if not done.wait(seconds):
            self._held.forget(tell)
        return True

    def hurry(self, physical: Collection[str]) -> None:
        """Have physical shards asked soon, if this one asks at all."""
        self.call(lambda: self._watcher.hurry(physical))


class AsyncMapWatch(AsyncBackground):
    """What asks for an `AsyncCluster`: one task of its event loop."""

    def __init__(
        self,
        topology: Topology,
        held: HeldMap,
        *,
        follow: Follow | None = None,
        hear: Hear | None = None,
        receive: Receive | None = None,
        clock: Clock = SYSTEM,
    ) -> None:
        self._watcher = _Watcher(topology, held, clock, follow=follow, hear=hear, receive=receive)
        self._held = held
        super().__init__(self._watcher.run)

    def refresh(self, physical: Collection[str]) -> None:
        """Have physical shards asked, and wait for that; in SQLAlchemy's greenlet."""
        if not in_greenlet():  # `session.route` is not awaited, and runs nothing
            return
        await_only(self._refresh(physical))

    async def _refresh(self, physical: Collection[str]) -> None:
        wanted = self._held.wanted(physical)
        done = asyncio.Event()
        tell = done.set
        self._held.when_answered(wanted, tell)
        self.start()
        self.hurry(physical)
        try:
            async with asyncio.timeout(_patience()):
                await done.wait()
        except TimeoutError:
            self._held.forget(tell)
            for name, question in wanted.items():
                self._held.silent(name, question)

    def wait(self, logical_shards: Collection[int], seconds: float, *, writes: bool) -> bool:
        """Wait until logical shards can be used, or that long; in SQLAlchemy's greenlet."""
        await_only(self._wait(logical_shards, seconds, writes=writes))
        return True

    async def _wait(self, logical_shards: Collection[int], seconds: float, *, writes: bool) -> None:
        done = asyncio.Event()
        tell = done.set
        self._held.when_open(logical_shards, tell, writes=writes)
        self.start()
        self._watcher.look()
        try:
            async with asyncio.timeout(seconds):
                await done.wait()
        except TimeoutError:
            pass
        finally:
            self._held.forget(tell)

    def hurry(self, physical: Collection[str]) -> None:
        """Have physical shards asked soon, if this one asks at all."""
        self._watcher.hurry(physical)
