"""Many who want the same at the same time: one goes, the others have what it brings.

Whoever comes while one is on its way does not share that one's answer, which may be of before it
came: it shares the next one's, that goes when this one is back. So an answer is never older than
the question, and however many ask, one is on its way and one is about to go.

Source: the `singleflight` package of Go, with the joining of the next flight added.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from sqlalchemy.util import await_only

from shardkit.forks import ForkSafeLock

__all__ = ["AsyncFlights", "Flights"]

T = TypeVar("T")


class _Flight(Generic[T]):
    """One fetch.

    Attributes:
        answer: what it brought, in a tuple; None while it is away, and when it failed.
        following: the one that goes when it is back.
        is_back: whether it has ended.
        signal: for those who wait for that; made when somebody does.
    """

    __slots__ = ("answer", "following", "is_back", "signal")

    def __init__(self) -> None:
        self.answer: tuple[T] | None = None
        self.following: _Flight[T] | None = None
        self.is_back = False
        self.signal: Any = None


class Flights(Generic[T]):
    """What threads of one process are fetching, by key. Thread-safe and fork-safe."""

    def __init__(self) -> None:
        self._guard = ForkSafeLock(self._forget)
        self._flying: dict[str, _Flight[T]] = {}

    def _forget(self) -> None:
        """Run in a forked child: those who fly are in the parent."""
        self._flying = {}

    def fetch(self, key: str, fly: Callable[[], T], patience: float) -> tuple[T, bool]:
        """Return what `fly` returns, or what another one's returned that began after this call.

        Args:
            key: names what is fetched.
            fly: fetches it.
            patience: seconds to wait for others; then it is fetched beside them.

        Returns:
            The answer, and whether it is another one's.
        """
        mine: _Flight[T] = _Flight()
        leads = True
        with self._guard.lock:
            before = self._flying.get(key)
            if before is None:
                self._flying[key] = mine
            elif before.following is None:
                before.following = mine
            else:
                mine, leads = before.following, False
        if not leads:
            if self._await(mine, patience) and mine.answer is not None:
                return mine.answer[0], True
            return fly(), False  # it failed, or takes too long
        try:
            if before is None or self._await(before, patience):
                mine.answer = (fly(),)
                return mine.answer[0], False
        finally:
            self._end(key, mine, before)
        return fly(), False

    def _end(self, key: str, flight: _Flight[T], before: _Flight[T] | None) -> None:
        with self._guard.lock:
            if self._flying.get(key) is flight:
                if flight.following is None:
                    del self._flying[key]
                else:
                    self._flying[key] = flight.following
            elif before is not None and before.following is flight:  # it did not wait for it
                before.following = flight.following
            flight.is_back = True
            signal = flight.signal
        if signal is not None:
            signal.set()

    def _await(self, flight: _Flight[T], patience: float) -> bool:
        """Wait until a flight is back; return whether it is."""
        with self._guard.lock:
            if flight.is_back:
                return True
            if flight.signal is None:
                flight.signal = self._new_signal()
            signal = flight.signal
        return self._wait(signal, patience)

    def _new_signal(self) -> Any:
        return threading.Event()

    def _wait(self, signal: Any, patience: float) -> bool:
        return bool(signal.wait(patience))


class AsyncFlights(Flights[T]):
    """The same for the tasks of one event loop; called inside SQLAlchemy's greenlet."""

    def _new_signal(self) -> Any:
        return asyncio.Event()

    def _wait(self, signal: Any, patience: float) -> bool:
        async def wait() -> bool:
            try:
                async with asyncio.timeout(patience):
                    await signal.wait()
            except TimeoutError:
                return False
            return True

        return bool(await_only(wait()))
