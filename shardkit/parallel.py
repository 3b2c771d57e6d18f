"""Runs statements on several connections at once, from one thread.

A psycopg call is a generator that says which socket it waits for. `Connection` hands that wait
to `run` when `run` is driving it: each task goes on in a greenlet of its own until its query is
sent, and whichever server answers first is read first. No threads, so no handing over of the
interpreter lock, which on a query of a fifth of a millisecond costs more than the query.
Used by clusters for threads; under asyncio the event loop does the same.
"""

from __future__ import annotations

import select
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar, cast

import psycopg
from greenlet import getcurrent, greenlet
from psycopg.abc import PQGen

__all__ = ["Connection", "outcome", "run"]

T = TypeVar("T")

CHECK_EVERY = 0.1
"""Seconds between looks for an interrupt or a closed socket; psycopg's own interval."""

_READ, _WRITE = 1, 2  # psycopg.waiting.Wait and Ready, as bits


class Connection(psycopg.Connection[Any]):
    """A psycopg connection whose waits `run` can take over."""

    def wait(self, gen: PQGen[T], interval: float = CHECK_EVERY, timeout: float | None = None) -> T:
        """Drive a generator of psycopg to its end; see psycopg's `Connection.wait`."""
        task = getcurrent()
        if isinstance(task, _Task):
            return task.wait(gen, self)
        return super().wait(gen, interval=interval, timeout=timeout)


class _Task(greenlet):
    """One task of `run`."""

    def wait(self, gen: PQGen[T], connection: psycopg.Connection[Any]) -> T:
        assert self.parent is not None, "a task is started by run()"
        try:
            state = next(gen)
            while True:
                state = gen.send(self.parent.switch((connection.fileno(), int(state))))
        except StopIteration as end:
            return cast("T", end.value)
        except psycopg.Error:
            raise
        except BaseException:
            connection.close()  # half a conversation is left on it
            raise


def outcome(task: Callable[[], T]) -> T | Exception:
    """Return the result of a task, or the exception it raised."""
    try:
        return task()
    except Exception as error:  # noqa: BLE001 - the caller decides what each failure means
        return error


def run(tasks: Sequence[Callable[[], T]]) -> list[T | Exception]:
    """Run tasks at the same time and return the outcome of each, in order.

    Args:
        tasks: each uses one connection of its own, a `Connection` of this module.
    """
    if len(tasks) == 1:
        return [outcome(tasks[0])]
    finished: dict[_Task, T | Exception] = {}
    waiting: dict[int, _Task] = {}
    poll = select.poll()
    greenlets = [_Task(outcome) for _ in tasks]

    def step(task: _Task, *sent: Any) -> None:
        answer = task.switch(*sent)
        if task.dead:
            finished[task] = answer
        else:
            socket, flags = answer
            waiting[socket] = task
            poll.register(
                socket,
                (select.POLLIN if flags & _READ else 0) | (select.POLLOUT if flags & _WRITE else 0),
            )

    try:
        for task, work in zip(greenlets, tasks, strict=True):
            step(task, work)
        while waiting:
            events = poll.poll(CHECK_EVERY * 1000)
            if not events:  # whoever waits may look at the time, as psycopg has it
                for socket in list(waiting):
                    poll.unregister(socket)
                    step(waiting.pop(socket), 0)
            for socket, event in events:
                poll.unregister(socket)
                # An error or hang-up is for the driver to read.
                ready = (_WRITE if event & select.POLLOUT else 0) | (
                    _READ if event & ~select.POLLOUT else 0
                )
                step(waiting.pop(socket), ready)
    except BaseException:
        for task in greenlets:
            if not task.dead:
                with suppress(BaseException):
                    task.throw(KeyboardInterrupt)
        raise
    return [finished[task] for task in greenlets]
