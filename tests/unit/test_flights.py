"""One goes, the others have what it brings; and never something of before they came."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy.util import await_only, greenlet_spawn

from shardkit.flights import AsyncFlights, Flights
from shardkit.testing import wait_until

LONG = 60.0


class Gate:
    """A fetch that waits to be let through, and counts."""

    def __init__(self) -> None:
        self.n = 0
        self.begun = threading.Semaphore(0)
        self.open = threading.Semaphore(0)

    def __call__(self) -> int:
        self.n += 1
        n = self.n
        self.begun.release()
        assert self.open.acquire(timeout=LONG)
        return n


def waiting(flights: Flights[int]) -> Callable[[], bool]:
    def tell() -> bool:
        flight = flights._flying["key"]
        return flight.following is not None and flight.following.signal is not None

    return tell


def test_whoever_comes_during_a_flight_shares_the_next() -> None:
    flights, gate = Flights[int](), Gate()
    with ThreadPoolExecutor(12) as threads:
        first = threads.submit(flights.fetch, "key", gate, LONG)
        assert gate.begun.acquire(timeout=LONG)
        others = [threads.submit(flights.fetch, "key", gate, LONG) for _ in range(10)]
        wait_until(waiting(flights), 30.0, "somebody waits for the next flight")
        assert gate.n == 1, "nobody goes meanwhile"
        gate.open.release()
        assert first.result(LONG) == (1, False)
        assert gate.begun.acquire(timeout=LONG)
        gate.open.release(10)  # should one come only now, it goes by itself
        found = [other.result(LONG) for other in others]
    assert all(answer >= 2 for answer, _ in found), "nothing of before they came"
    assert sum(not is_shared for _, is_shared in found) == gate.n - 1
    assert not flights._flying


def test_a_failure_is_of_one_and_the_others_go_by_themselves() -> None:
    flights, gate = Flights[int](), Gate()

    def fail() -> int:
        gate()
        raise LookupError

    with ThreadPoolExecutor(8) as threads:
        first = threads.submit(flights.fetch, "key", fail, LONG)
        assert gate.begun.acquire(timeout=LONG)
        second = threads.submit(flights.fetch, "key", fail, LONG)
        wait_until(lambda: flights._flying["key"].following is not None, 30.0, "one follows")
        others = [threads.submit(flights.fetch, "key", lambda: 5, LONG) for _ in range(4)]
        wait_until(waiting(flights), 30.0, "others wait for it")
        gate.open.release(2)
        for failed in (first, second):
            with pytest.raises(LookupError):
                failed.result(LONG)
        assert {other.result(LONG)[0] for other in others} == {5}
    assert not flights._flying


def test_patience_ends_and_nobody_is_left_behind() -> None:
    flights, gate = Flights[int](), Gate()
    with ThreadPoolExecutor(8) as threads:
        first = threads.submit(flights.fetch, "key", gate, LONG)
        assert gate.begun.acquire(timeout=LONG)
        assert flights.fetch("key", lambda: 7, 0.001) == (7, False)
        assert flights._flying["key"].following is None, "who gave up leads nobody"
        second = threads.submit(flights.fetch, "key", lambda: 8, LONG)
        wait_until(lambda: flights._flying["key"].following is not None, 30.0, "one follows")
        assert flights.fetch("key", lambda: 9, 0.001) == (9, False)
        gate.open.release()
        assert first.result(LONG) == (1, False)
        assert second.result(LONG) == (8, False)
    assert not flights._flying


def test_keys_have_nothing_to_do_with_each_other() -> None:
    flights, gate = Flights[int](), Gate()
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(flights.fetch, "one", gate, LONG)
        assert gate.begun.acquire(timeout=LONG)
        assert flights.fetch("two", lambda: 2, LONG) == (2, False)
        gate.open.release()
        assert first.result(LONG) == (1, False)


def test_a_forked_child_waits_for_nobody_of_its_parent() -> None:
    flights, gate = Flights[int](), Gate()
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(flights.fetch, "key", gate, LONG)
        assert gate.begun.acquire(timeout=LONG)
        child = os.fork()
        if child == 0:
            found = flights.fetch("key", lambda: 3, LONG)
            os._exit(0 if found == (3, False) else 1)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        gate.open.release()
        assert first.result(LONG) == (1, False)


@pytest.mark.anyio
async def test_tasks_share_as_threads_do() -> None:
    flights = AsyncFlights[int]()
    opened = asyncio.Event()
    n = 0

    def fly() -> int:
        nonlocal n
        n += 1
        mine = n

        async def wait() -> None:
            await opened.wait()

        await_only(wait())
        return mine

    tasks = [asyncio.create_task(greenlet_spawn(flights.fetch, "key", fly, LONG)) for _ in range(9)]
    await asyncio.sleep(0)  # each goes as far as it can
    assert n == 1
    gone = asyncio.create_task(greenlet_spawn(flights.fetch, "key", fly, LONG))
    await asyncio.sleep(0)
    gone.cancel()
    opened.set()
    found = await asyncio.gather(*tasks)
    assert sorted(found) == [(1, False), (2, False), *[(2, True)] * 7]
    with pytest.raises(asyncio.CancelledError):
        await gone
    assert not flights._flying
