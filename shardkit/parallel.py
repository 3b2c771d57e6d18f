"""Runs statements on several connections at once, from one thread.

A psycopg call is a generator that says which socket it waits for. The connections of
`shardkit.driver` hand that wait to `run` when `run` is driving them: each task goes on in a
greenlet of its own until its query is sent, and whichever server answers first is read first. No
threads, so no handing over of the interpreter lock, which on a query of a fifth of a millisecond
costs more than the query. Used by clusters for threads; under asyncio the event loop does the same.
"""

from __future__ import annotations

import math
import select
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final, TypeVar, cast

from greenlet import getcurrent, greenlet
from psycopg import errors
from psycopg.abc import PQGen, PQGenConn

from shardkit.clock import SYSTEM

__all__ = ["AbandonedError", "Task", "hedged", "outcome", "run", "task"]

T = TypeVar("T")

_CHECK_EVERY: Final = 0.1
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
        if not ready:
            raise errors._WaitTimeout("wait timeout expired")  # noqa: SLF001  as psycopg's waits do
        return ready


def task() -> Task | None:
    """Return the task that runs, or None outside `run`."""
    found = getcurrent()
    return found if isinstance(found, Task) else None


def outcome(work: Callable[[], T]) -> T | Exception:
    """Return the result of a task, or the exception it raised."""
    try:
        return work()
    except Exception as error:  # noqa: BLE001 - the caller decides what each failure means
        return error


def run(tasks: Sequence[Callable[[], T]]) -> list[T | Exception]:
    """Run tasks at the same time and return the outcome of each, in order.

    Args:
        tasks: each uses one connection of its own, a `Connection` of `shardkit.driver`.
    """
    if len(tasks) == 1:
        return [outcome(tasks[0])]
    finished: dict[Task, T | Exception] = {}
    waiting: dict[int, tuple[Task, float]] = {}
    poll = select.poll()
    greenlets = [Task(outcome) for _ in tasks]

    def step(each: Task, *sent: Any) -> None:
        answer = each.switch(*sent)
        if each.dead:
            finished[each] = answer
        else:
            socket, flags, until = answer
            waiting[socket] = (each, until)
            poll.register(
                socket,
                (select.POLLIN if flags & _READ else 0) | (select.POLLOUT if flags & _WRITE else 0),
            )

    try:
        for each, work in zip(greenlets, tasks, strict=True):
            # Deadlines are context variables, of which a greenlet has none of its own.
            each.gr_context = getcurrent().gr_context
            step(each, work)
        while waiting:
            first = min(until for _, until in waiting.values())
            pause = _CHECK_EVERY
            if first < math.inf:
                pause = max(0.0, min(pause, first - SYSTEM.monotonic()))
            for socket, event in poll.poll(math.ceil(pause * 1000)):
                poll.unregister(socket)
                # An error or hang-up is for the driver to read.
                ready = (_WRITE if event & select.POLLOUT else 0) | (
                    _READ if event & ~select.POLLOUT else 0
                )
                step(waiting.pop(socket)[0], ready)
            if first < math.inf and first <= SYSTEM.monotonic():
                for socket, (late, until) in list(waiting.items()):
                    if until <= SYSTEM.monotonic() and waiting.get(socket) == (late, until):
                        poll.unregister(socket)
                        del waiting[socket]
                        step(late, 0)
    except BaseException:
        for each in greenlets:
            if not each.dead:
                with suppress(BaseException):
                    each.throw(KeyboardInterrupt)
        raise
    return [finished[each] for each in greenlets]


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
    finished: dict[Task, T | Exception] = {}
    waiting: dict[int, tuple[Task, float]] = {}
    poll = select.poll()
    begins: float | None = SYSTEM.monotonic() + delay

    def step(each: Task, *sent: Any) -> None:
        answer = each.switch(*sent)
        if each.dead:
            finished[each] = answer
        else:
            socket, flags, until = answer
            waiting[socket] = (each, until)
            poll.register(
                socket,
                (select.POLLIN if flags & _READ else 0) | (select.POLLOUT if flags & _WRITE else 0),
            )

    def begin(each: Task, work: Callable[[], T]) -> None:
        each.gr_context = getcurrent().gr_context
        step(each, work)

    try:
        begin(tasks[0], first)
        while waiting:
            succeeded = [i for i, each in enumerate(tasks) if _is_success(finished, each)]
            if succeeded:
                return succeeded[0], finished[tasks[succeeded[0]]]
            now = SYSTEM.monotonic()
            if begins is not None and (now >= begins or finished):
                begins = None
                if not finished and may_begin():
                    tasks.append(Task(outcome))
                    begin(tasks[1], second)
                    continue
            until = min((end for _, end in waiting.values()), default=math.inf)
            pause = min(_CHECK_EVERY, until - now, math.inf if begins is None else begins - now)
            for socket, event in poll.poll(max(0.0, pause * 1000)):
                poll.unregister(socket)
                ready = (_WRITE if event & select.POLLOUT else 0) | (
                    _READ if event & ~select.POLLOUT else 0
                )
                step(waiting.pop(socket)[0], ready)
            for socket, (late, end) in list(waiting.items()):
                if end <= SYSTEM.monotonic() and waiting.get(socket) == (late, end):
                    poll.unregister(socket)
                    del waiting[socket]
                    step(late, 0)
        won = next((i for i, each in enumerate(tasks) if _is_success(finished, each)), 0)
        return won, finished[tasks[won]]
    finally:
        for each in tasks:
            if not each.dead:
                with suppress(AbandonedError):
                    each.throw(AbandonedError)


def _is_success(finished: dict[Task, Any], each: Task) -> bool:
    return each in finished and not isinstance(finished[each], Exception)
