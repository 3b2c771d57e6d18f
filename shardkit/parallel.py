"""Runs statements on several connections at once, from one thread.

A psycopg call is a generator that says which socket it waits for. The connections of
`shardkit.waits` hand that wait to `run` when `run` is driving them: each task goes on in a
greenlet of its own until its query is sent, and whichever server answers first is read first. No
threads, so no handing over of the interpreter lock, which on a query of a fifth of a millisecond
costs more than the query. Used by clusters for threads; under asyncio the event loop does the same.
"""

from __future__ import annotations

import math
import select
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, Final, TypeVar, cast

from greenlet import getcurrent, greenlet
from psycopg import errors
from psycopg.abc import PQGen, PQGenConn

from shardkit.clock import SYSTEM

__all__ = ["AbandonedError", "Task", "hedged", "is_together", "outcome", "run", "task", "together"]

T = TypeVar("T")

CHECK_EVERY: Final = 0.1
"""Seconds between looks for an interrupt or a closed socket; psycopg's own interval."""

_READ, _WRITE = 1, 2  # psycopg.waiting.Wait and Ready, as bits


class AbandonedError(BaseException):
    """Nobody waits for this task any more; its connection is left as it is."""


class Task(greenlet):
    """One task of `run`. It waits by telling `run` for what, and until when."""

    def wait(self, gen: PQGen[T], socket: int, seconds: float) -> T:
        """Drive a generator of psycopg that waits for one socket.

        Raises:
            psycopg.errors._WaitTimeout: it did not end in time.
        """
        until = SYSTEM.monotonic() + seconds
        try:
            state = next(gen)
            while True:
                state = gen.send(self._ready(socket, int(state), until))
        except StopIteration as end:
            return cast("T", end.value)

    def wait_conn(self, gen: PQGenConn[T], seconds: float) -> T:
        """Drive a generator of psycopg that says which socket it waits for; see `wait`."""
        until = SYSTEM.monotonic() + seconds
        try:
            socket, state = next(gen)
            while True:
                socket, state = gen.send(self._ready(socket, int(state), until))
        except StopIteration as end:
            return cast("T", end.value)

    def _ready(self, socket: int, state: int, until: float) -> Any:
        assert self.parent is not None, "a task is started by run()"
        ready = self.parent.switch((socket, state, until))
        if not ready and SYSTEM.monotonic() >= until:
            raise errors._WaitTimeout("wait timeout expired")  # noqa: SLF001  as psycopg's waits do
        return ready


def task() -> Task | None:
    """Return the task that runs, or None outside `run`."""
    found = getcurrent()
    return found if isinstance(found, Task) else None


_TOGETHER: ContextVar[bool] = ContextVar("shardkit_together", default=False)


def is_together() -> bool:
    """Tell whether what runs is one of several tasks that somebody waits for together."""
    return _TOGETHER.get() or task() is not None


@contextmanager
def together() -> Iterator[None]:
    """Have the tasks of an event loop that are made inside know that they run together."""
    before = _TOGETHER.set(True)
    try:
        yield
    finally:
        _TOGETHER.reset(before)


def outcome(work: Callable[[], T]) -> T | Exception:
    """Return the result of a task, or the exception it raised."""
    try:
        return work()
    except Exception as error:  # noqa: BLE001 - the caller decides what each failure means
        return error


class _Waiting:
    """The tasks of one call, each of which waits for a socket or is finished."""

    def __init__(self) -> None:
        self.finished: dict[Task, Any] = {}
        self._waiting: dict[int, tuple[Task, float]] = {}
        self._poll = select.poll()

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def begin(self, each: Task, work: Callable[[], object]) -> None:
        """Start a task."""
        # Deadlines are context variables, of which a greenlet has none of its own.
        each.gr_context = getcurrent().gr_context
        self._step(each, work)

    def wait(self, pause: float = CHECK_EVERY) -> None:
        """Wait until a server says something, a task has waited long enough, or the pause is over.

        Then whoever waits may look at the time, as psycopg has it.
        """
        first = min(until for _, until in self._waiting.values())
        if first < math.inf:
            pause = max(0.0, min(pause, first - SYSTEM.monotonic()))
        events = self._poll.poll(math.ceil(pause * 1000))
        for socket, event in events:
            # An error or hang-up is for the driver to read.
            self._resume(
                socket,
                (_WRITE if event & select.POLLOUT else 0)
                | (_READ if event & ~select.POLLOUT else 0),
            )
        if not events:
            for socket in list(self._waiting):
                self._resume(socket, 0)
        elif first < math.inf and first <= SYSTEM.monotonic():
            for socket, (_, until) in list(self._waiting.items()):
                if until <= SYSTEM.monotonic():
                    self._resume(socket, 0)

    def _resume(self, socket: int, ready: int) -> None:
        self._poll.unregister(socket)
        self._step(self._waiting.pop(socket)[0], ready)

    def _step(self, each: Task, *sent: Any) -> None:
        answer = each.switch(*sent)
        if each.dead:
            self.finished[each] = answer
        else:
            socket, flags, until = answer
            self._waiting[socket] = (each, until)
            self._poll.register(
                socket,
                (select.POLLIN if flags & _READ else 0) | (select.POLLOUT if flags & _WRITE else 0),
            )


def run(tasks: Sequence[Callable[[], T]]) -> list[T | Exception]:
    """Run tasks at the same time and return the outcome of each, in order.

    Args:
        tasks: each uses one connection of its own, a `Connection` of `shardkit.waits`.
    """
    if len(tasks) == 1:
        return [outcome(tasks[0])]
    greenlets = [Task(outcome) for _ in tasks]
    waiting = _Waiting()
    try:
        for each, work in zip(greenlets, tasks, strict=True):
            waiting.begin(each, work)
        while waiting:
            waiting.wait()
    except BaseException:
        for each in greenlets:
            if not each.dead:
                with suppress(BaseException):
                    each.throw(KeyboardInterrupt)
        raise
    return [waiting.finished[each] for each in greenlets]


def hedged(
    first: Callable[[], T],
    second: Callable[[], T],
    delay: float,
    may_begin: Callable[[], bool],
) -> tuple[int, T | Exception]:
    """Run a task, and another one beside it when it takes too long; return the first success.

    Args:
        first: uses one connection of its own.
        second: uses another one; its failure says nothing while the first may succeed.
        delay: seconds after which the second begins.
        may_begin: asked once, then; False leaves the first alone.

    Returns:
        Which one it was, 0 or 1, and its result; the first one's exception when none succeeded.
    """
    tasks = [Task(outcome)]
    waiting = _Waiting()
    finished = waiting.finished
    begins: float | None = SYSTEM.monotonic() + delay
    try:
        waiting.begin(tasks[0], first)
        while waiting:
            succeeded = [i for i, each in enumerate(tasks) if _is_success(finished, each)]
            if succeeded:
                return succeeded[0], finished[tasks[succeeded[0]]]
            now = SYSTEM.monotonic()
            if begins is not None and now >= begins:
                begins = None
                if may_begin():
                    tasks.append(Task(outcome))
                    waiting.begin(tasks[1], second)
                    continue
            waiting.wait(CHECK_EVERY if begins is None else min(CHECK_EVERY, begins - now))
        won = next((i for i, each in enumerate(tasks) if _is_success(finished, each)), 0)
        return won, finished[tasks[won]]
    finally:
        for each in tasks:
            if not each.dead:
                with suppress(AbandonedError):
                    each.throw(AbandonedError)


def _is_success(finished: dict[Task, Any], each: Task) -> bool:
    return each in finished and not isinstance(finished[each], Exception)
