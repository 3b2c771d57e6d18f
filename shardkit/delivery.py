"""Hands claimed events to handlers: in threads, in order within a key, each within a deadline.

A thread cannot be ended from outside, so one whose handler does not end is left to itself and
replaced, its event counted as failed; when too many are left, the process has to be. Effects that
happen once share transactions, of which the sessions are the handlers'. Called by
`shardkit.relay`, which claims and finishes. Talks to no database. Source: docs/outbox.md.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from shardkit.batches import Batch, Taken
from shardkit.clock import Clock
from shardkit.emitter import EmittingSession
from shardkit.errors import HandlerStuckError, HandlerTimeoutError
from shardkit.outbox import Event, Once

__all__ = ["Failure", "Handler", "Hands", "Job"]

_LOG: Final = logging.getLogger("shardkit.relay")

_LONGEST_TOGETHER: Final = 0.05
"""Seconds after which effects that share a transaction are committed: they hold locks."""

MAX_ABANDONED = 8
"""Threads left to handlers that never ended, before the relay gives up."""


@dataclass(frozen=True, slots=True)
class Handler:
    """What handles the events of a topic.

    Attributes:
        call: given an event; or a list of events, when `batch` is above 0.
        batch: the most events of one call; 0 for one event, not in a list.
        returns_left: whether its call returns the events that are to be tried again. They are
            given to it together again then, with others, of any logical shard; they have no keys.
    """

    call: Callable[[Any], Any]
    batch: int = 0
    returns_left: bool = False

    @property
    def most(self) -> int:
        """The most events that are handled as one group."""
        return max(self.batch, self.shared.together if self.shared else 1, 1)

    @property
    def shared(self) -> Once[[]] | None:
        """What handles several events in one transaction, where it is such a handler."""
        return self.call if isinstance(self.call, Once) and not self.batch else None

    @property
    def is_async(self) -> bool:
        """Whether its call has to be awaited."""
        return inspect.iscoroutinefunction(self.call)


@dataclass(frozen=True, slots=True)
class Failure:
    """An event whose handler failed.

    Attributes:
        taken: the event.
        reason: type and text of the exception.
        is_final: whether there is no use in trying again.
    """

    taken: Taken
    reason: str
    is_final: bool = False


@dataclass(slots=True)
class Job:
    """The part of a batch that one thread handles.

    *Invariant:* nothing is added to `done` or `failed` once it is abandoned.
    """

    batch: Batch
    events: Sequence[Taken]
    done: list[Taken] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)
    current: tuple[Sequence[Taken], float] | None = None
    session: EmittingSession | None = None
    running: Future[Any] | None = None
    is_abandoned: bool = False
    is_stopped: bool = False
    ended: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def results(self) -> tuple[list[Taken], list[Failure]]:
        """Return what has come of it since the last call."""
        with self.lock:
            done, self.done = self.done, []
            failed, self.failed = self.failed, []
        return done, failed


class Hands:
    """Threads that run handlers.

    Args:
        handlers: by topic.
        n_threads: how many run at once.
        deadline: seconds one call may take.
        clock: source of monotonic time.
        step: told of each point that a test may want to stop at.
        loop: where handlers that are awaited run; None makes one when it is needed.
    """

    def __init__(
        self,
        handlers: Mapping[str, Handler],
        *,
        n_threads: int,
        deadline: float,
        clock: Clock,
        step: Callable[[str], None],
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._handlers = handlers
        self._n_threads = n_threads
        self._deadline = deadline
        self._clock = clock
        self._step = step
        self._loop = loop
        self._own_loop: asyncio.AbstractEventLoop | None = None
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._abandoned = 0
        for _ in range(n_threads):
            self._hire()

    def _hire(self) -> None:
        threading.Thread(target=self._work, name="shardkit relay", daemon=True).start()

    def close(self) -> None:
        """Let the threads end after what they have begun."""
        for _ in range(self._n_threads):
            self._jobs.put(None)
        if self._own_loop is not None:
            self._own_loop.call_soon_threadsafe(self._own_loop.stop)

    def start(self, batch: Batch) -> list[Job]:
        """Start handling a batch; events of one key stay together, in order.

        First come those whose handlers leave what takes long: the others' may take long.
        """
        batch.events.sort(key=self._takes_long)
        if self._n_threads == 1:
            jobs = [Job(batch, batch.events)]
        else:
            hands: list[list[Taken]] = [[] for _ in range(self._n_threads)]
            for taken in batch.events:
                event = taken.event
                place = event.id if event.key is None else hash((event.logical_shard, event.key))
                hands[place % self._n_threads].append(taken)
            jobs = [Job(batch, events) for events in hands if events]
        for job in jobs:
            self._jobs.put(job)
        return jobs

    def _takes_long(self, taken: Taken) -> bool:
        handler = self._handlers.get(taken.event.topic)
        return handler is None or not handler.returns_left

    def end_late(self, job: Job) -> None:
        """Abandon a job whose handler is past its deadline.

        Raises:
            HandlerStuckError: too many never ended.
        """
        with job.lock:
            if job.current is None or job.current[1] > self._clock.monotonic():
                return
            late, _ = job.current
            job.is_abandoned = True
            reason = f"{HandlerTimeoutError.__name__}: not done in {self._deadline:g} s"
            job.failed += [Failure(taken, reason) for taken in late]
            if job.running is not None:
                job.running.cancel()
            if job.session is not None:  # others' effects wait in its transaction
                job.session.sever()
            job.ended.set()
        _LOG.error("the handler of %s does not end", late[0].event.topic)
        with self._lock:
            self._abandoned += 1
            if self._abandoned > MAX_ABANDONED:
                raise HandlerStuckError(f"{self._abandoned} handlers never ended")
        self._hire()

    # -- in the threads

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                self._handle(job)
            except BaseException as error:  # noqa: BLE001 - it is reported as the event's failure
                _LOG.exception("a relay's thread fails")
                with job.lock:
                    job.failed += [Failure(t, _reason(error)) for t in (job.current or ((), 0))[0]]
            finally:
                job.ended.set()
            if job.is_abandoned:
                with self._lock:
                    self._abandoned -= 1
                return  # it was replaced

    def _handle(self, job: Job) -> None:
        blocked: set[tuple[int, str]] = set()
        at = 0
        while at < len(job.events):
            group = self._group(job.events, at, blocked, job.batch.lost)
            at += max(len(group), 1)
            if not group:
                continue
            if group[0].event.logical_shard in job.batch.lost:
                continue
            if self._is_over(job, group[0]):
                return
            self._run(job, group, blocked)
            if job.is_abandoned:
                return

    def _group(
        self,
        events: Sequence[Taken],
        at: int,
        blocked: set[tuple[int, str]],
        lost: set[int],
    ) -> Sequence[Taken]:
        """Return the events from a place on that one call may be given; none where it is blocked.

        What has failed before is tried alone: it would take its neighbours with it again.
        """
        first = events[at]
        if _stream(first) in blocked:
            return ()
        handler = self._handlers.get(first.event.topic)
        takes_left = handler is not None and handler.returns_left
        is_alone = handler is None or (first.event.attempts and not takes_left)
        longest = 1 if handler is None or is_alone else handler.most
        end = at + 1
        while (
            end < len(events)
            and end - at < longest
            and events[end].event.topic == first.event.topic
            and (
                events[end].event.logical_shard == first.event.logical_shard
                or (handler is not None and handler.shared is not None)
                or takes_left
            )
            and events[end].event.logical_shard not in lost
            and (takes_left or not events[end].event.attempts)
            and _stream(events[end]) not in blocked
        ):
            end += 1
        return events[at:end]

    def _run(self, job: Job, group: Sequence[Taken], blocked: set[tuple[int, str]]) -> None:
        handler = self._handlers.get(group[0].event.topic)
        if handler is None:
            self._fail(job, group[0], "no handler for this topic", blocked, is_final=True)
            return
        try:
            if handler.shared is not None and len(group) > 1:
                self._share(job, handler.shared, group)
                return
            left = self._call(job, handler, group)
        except Exception as error:  # noqa: BLE001 - whatever a handler raises is its event's failure
            if job.is_abandoned:
                return
            if len(group) == 1:
                _LOG.warning("the handler of %s failed", group[0].event.topic, exc_info=True)
                self._fail(job, group[0], _reason(error), blocked)
                return
            _LOG.info("events of %s are tried one by one: %s", group[0].event.topic, _reason(error))
            for taken in group:
                if _stream(taken) not in blocked and not self._is_over(job, taken):
                    self._run(job, (taken,), blocked)
            return
        with job.lock:
            job.current = None
            if not job.is_abandoned:
                job.done += [taken for taken in group if taken.event.id not in left]
                job.failed += [
                    Failure(taken, "not done yet") for taken in group if taken.event.id in left
                ]

    def _call(self, job: Job, handler: Handler, group: Sequence[Taken]) -> frozenset[int]:
        """Call a handler; return the ids of the events that it has left."""
        with job.lock:
            if job.is_abandoned:
                return frozenset()
            job.current = (group, self._clock.monotonic() + self._deadline)
        given: Any = [taken.event for taken in group] if handler.batch else group[0].event
        self._step("before handler")
        if not handler.is_async:
            returned = handler.call(given)
        else:
            job.running = asyncio.run_coroutine_threadsafe(handler.call(given), self._loop_to_use())
            try:
                returned = job.running.result()
            finally:
                job.running = None
        self._step("after handler")
        return frozenset(each.id for each in returned) if handler.returns_left else frozenset()

    def _share(self, job: Job, shared: Once[[]], group: Sequence[Taken]) -> None:
        """Handle events in as few transactions as their places and the time allow.

        Raises:
            Exception: whatever a handler raises; of the last transaction nothing holds then.
        """
        rest = {taken.event.id: taken for taken in group}
        while rest:
            now = self._clock.monotonic()
            first = next(iter(rest.values()))
            if first.event.logical_shard in job.batch.lost:
                del rest[first.event.id]
                continue
            if self._is_over(job, first):
                return
            with job.lock:
                job.current = ((first,), now + self._deadline)
            handled = shared.run_together(
                [taken.event for taken in rest.values()],
                begin=partial(self._begin_shared, job, rest),
                is_late=partial(self._is_late, job, now + _LONGEST_TOGETHER),
            )
            with job.lock:
                job.current = job.session = None
                if not job.is_abandoned:
                    job.done += [rest.pop(event.id) for event in handled]
            self._step("after handler")

    def _begin_shared(
        self, job: Job, rest: Mapping[int, Taken], session: EmittingSession, event: Event
    ) -> None:
        with job.lock:
            if job.is_abandoned:
                raise HandlerTimeoutError("its thread was given up")
            job.session = session
            job.current = ((rest[event.id],), self._clock.monotonic() + self._deadline)
        self._step("before handler")

    def _is_late(self, job: Job, until: float) -> bool:
        now = self._clock.monotonic()
        return bool(now > min(until, job.batch.until) or job.is_stopped or job.batch.lost)

    def _is_over(self, job: Job, taken: Taken) -> bool:
        """Tell whether an event may not be delivered under this claim any more."""
        return (
            job.is_abandoned
            or job.is_stopped
            or self._clock.monotonic() > job.batch.until
            or taken.event.logical_shard in job.batch.lost
        )

    def _fail(
        self,
        job: Job,
        taken: Taken,
        reason: str,
        blocked: set[tuple[int, str]],
        *,
        is_final: bool = False,
    ) -> None:
        stream = _stream(taken)
        if stream is not None and not is_final:
            blocked.add(stream)
        with job.lock:
            job.current = None
            if not job.is_abandoned:
                job.failed.append(Failure(taken, reason, is_final))

    def _loop_to_use(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = self._own_loop = asyncio.new_event_loop()
                threading.Thread(
                    target=self._loop.run_forever, name="shardkit relay loop", daemon=True
                ).start()
            return self._loop


def _stream(taken: Taken) -> tuple[int, str] | None:
    event = taken.event
    return None if event.key is None else (event.logical_shard, event.key)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
