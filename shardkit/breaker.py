"""The circuit breaker of one server: pybreaker's face, with no lock held during a call.

Asked before each call and told its outcome after it, by whoever talks to the server:

    probe = breaker.admit()                  # BreakerOpenError while open
    try:
        answer = talk()
    except BaseException as error:
        breaker.failed(error, seconds, probe)     # tells failures of the server from the rest
        raise
    breaker.succeeded(seconds, probe)

or `breaker.abandoned(probe)` when the answer is no longer wanted; `breaker.call(talk)` and
`with breaker.calling():` do all of it. `probe` is None unless this call is the one that tries a
half-open server; an outcome without it, of a call older than that, changes nothing then.

Reads no clock but the one it is given, never waits and never touches a network, so threads and
event loops may share one. pybreaker has the names: states, listeners, exceptions. Its `call` is
not used: it holds its lock while the function runs.
"""

from __future__ import annotations

import math
import random
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import wraps
from inspect import iscoroutinefunction
from typing import Any, Final

import pybreaker
from pybreaker import STATE_CLOSED, STATE_HALF_OPEN, STATE_OPEN, CircuitBreakerListener

from shardkit.clock import SYSTEM, Clock
from shardkit.errors import BreakerOpenError
from shardkit.failures import is_failure
from shardkit.forks import ForkSafeLock
from shardkit.telling import Teller
from shardkit.windows import BreakerRules, Cause, Window, open_time, tripping

__all__ = ["Breaker", "OpenState", "Probe"]

_STRIDE: Final = 16
"""Successes counted together while nothing fails: one reading of the clock for all of them.

Source: `python -m benchmarks breaker`; reading it each time took the success path from 0.08 to
0.13 of pybreaker's. They count as if they had ended when the clock was last read.
"""

_NEVER: Final = -math.inf


class Probe:
    """The right to try a half-open server; there is one at a time.

    Attributes:
        expires: monotonic time after which another call may have it.
    """

    __slots__ = ("expires",)

    def __init__(self, expires: float) -> None:
        self.expires = expires


class OpenState(pybreaker.CircuitOpenState):
    """pybreaker's open state, and what a listener wants to know of it.

    Attributes:
        cause: why the breaker opened.
        seconds: for how long.
    """

    cause: Cause
    seconds: float


class Breaker(pybreaker.CircuitBreaker):
    """Lets calls to one server through, or not. Thread-safe; shared by event loops and threads.

    What is pybreaker's: `current_state`, `state`, `name`, `fail_counter`, `success_counter`,
    `call`, `calling`, use as a decorator, `open`, `close`, `half_open`, listeners, excluded
    exceptions. What differs: rules over a window besides the failures in a row; nothing but
    failures of the server counts, and everything else leaves the count alone instead of
    resetting it; the call that trips it raises its own error; coroutines are awaited; listeners
    are told after the fact, in order, by one thread at a time and with no lock held, and what
    they raise is logged.

    Args:
        name: the server, as `physical/role@host:port`; stands in errors.
        rules: when it trips, how long it stays open, what closes it.
        may_trip: asked before it opens by itself; while it says no, the breaker stays closed.
        lock: shared by breakers that are decided on together; None for one of its own.
        clock: source of time.
        uniform: draws from a range; `random.uniform`, which differs between forked children.
        exclude: exceptions, or functions of one, that are no failures either.
        listeners: told of failures, successes and changes of state.

    *Invariant:* closed, or at most one probe is out that has not expired.
    """

    # What the success path reads; an instance has too many attributes for Python to be quick at
    # the others. Successes are unremarkable while the breaker is closed, nothing in the window is
    # bad, no listener hears of them and they are quick.
    __slots__ = ("_credit", "_is_closed", "_unremarkable")

    def __init__(
        self,
        name: str | None = None,
        *,
        rules: BreakerRules | None = None,
        may_trip: Callable[[Cause], bool] | None = None,
        lock: ForkSafeLock | None = None,
        clock: Clock = SYSTEM,
        uniform: Callable[[float, float], float] = random.uniform,
        exclude: Iterable[type[BaseException] | Callable[[Any], bool]] = (),
        listeners: Iterable[CircuitBreakerListener] = (),
    ) -> None:
        self._rules = rules = rules or BreakerRules()
        super().__init__(
            fail_max=rules.consecutive,
            reset_timeout=rules.open_time,
            success_threshold=rules.successes,
            exclude=exclude,
            name=name,
            throw_new_error_on_trip=False,
        )
        self._guard = lock or ForkSafeLock()
        self._may_trip = may_trip
        self._clock = clock
        self._now = clock.monotonic
        self._uniform = uniform
        self._window = Window()
        self._teller = Teller(self, self._guard)
        self._cause: Cause | None = None
        self._times_opened = 0
        self._retry_at = 0.0
        self._probe: Probe | None = None
        self._in_a_row = 0
        self._successes = 0
        self._is_closed = True
        self._closed_at = _NEVER
        self._unremarkable = rules.slow_after
        self._credit = _STRIDE
        self._uncounted = 0
        self._read_at = self._second_ends = self._now()
        self.add_listeners(*listeners)

    # -- around a call

    def admit(self) -> Probe | None:
        """Let one call through; return the probe if it is one.

        Raises:
            BreakerOpenError: the server is left alone for now (retryable).
        """
        if self._is_closed:
            return None
        return self._admit_probe()

    def succeeded(self, seconds: float, probe: Probe | None = None) -> None:
        """Note that the server answered.

        Args:
            seconds: how long it took, without waits in this process.
            probe: what `admit` returned.
        """
        if seconds < self._unremarkable:
            # Threads may lose a count to one another; a share of many calls can bear it.
            self._credit = credit = self._credit - 1
            if credit <= 0:
                self._settle()
        else:
            self._remark(seconds, probe)

    def failed(self, error: BaseException, seconds: float, probe: Probe | None = None) -> bool:
        """Note that a call raised; return whether that counts as a failure of the server.

        Args:
            error: what it raised. Anything but a failure of the server changes nothing.
            seconds: how long it took. A call that began before the breaker closed again hung
                in the trouble that is over, and is not held against the server.
            probe: what `admit` returned.
        """
        if not self.is_system_error(error):
            self.abandoned(probe)
            return False
        with self._guard.lock:
            now = self._now()
            self._teller.note("failure", error)
            if self._is_closed and now - seconds >= self._closed_at:
                self._settle_at(now)
                self._in_a_row += 1
                self._unremarkable = _NEVER
                self._window.add(now, 1, failures=1, slow=int(seconds >= self._rules.slow_after))
                self._judge(now)
            elif probe is not None and probe is self._probe:
                self._open(now, Cause.PROBE)
        self._teller.tell()
        return True

    def abandoned(self, probe: Probe | None = None) -> None:
        """Note that nobody waits for the answer any more: cancelled, or another was quicker."""
        if probe is not None:
            with self._guard.lock:
                if probe is self._probe:
                    self._probe = None

    def call(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function and note its outcome; of a coroutine function, return the coroutine.

        Raises:
            BreakerOpenError: the server is left alone for now (retryable).
        """
        if iscoroutinefunction(func):
            return self.call_async(func, *args, **kwargs)
        with self.calling():
            for listener in self._teller.listeners:
                listener.before_call(self, func, *args, **kwargs)
            return func(*args, **kwargs)

    async def call_async(
        self, func: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any
    ) -> Any:
        """Await a coroutine function and note its outcome.

        Raises:
            BreakerOpenError: the server is left alone for now (retryable).
        """
        with self.calling():
            for listener in self._teller.listeners:
                listener.before_call(self, func, *args, **kwargs)
            return await func(*args, **kwargs)

    @contextmanager
    def calling(self) -> Iterator[None]:
        """Note the outcome of a block of code, of coroutines too.

        Raises:
            BreakerOpenError: the server is left alone for now (retryable).
        """
        probe = self.admit()
        began = self._now()
        try:
            yield
        except BaseException as error:
            self.failed(error, self._now() - began, probe)
            raise
        self.succeeded(self._now() - began, probe)

    def __call__(self, *call_args: Any, **call_kwargs: Any) -> Callable[..., Any]:
        """Decorate a function or a coroutine function."""

        def decorate(func: Callable[..., Any]) -> Callable[..., Any]:
            if iscoroutinefunction(func):

                @wraps(func)
                async def awaited(*args: Any, **kwargs: Any) -> Any:
                    return await self.call_async(func, *args, **kwargs)

                return awaited

            @wraps(func)
            def called(*args: Any, **kwargs: Any) -> Any:
                return self.call(func, *args, **kwargs)

            return called

        return decorate(*call_args) if call_args else decorate

    # -- what is known

    @property
    def is_closed(self) -> bool:
        """Whether calls go through; what a choice among servers asks."""
        return self._is_closed

    @property
    def cause(self) -> Cause | None:
        """Why it opened; None while closed."""
        return self._cause

    @property
    def retry_after(self) -> float | None:
        """Seconds until a probe may go through, at least 0; None while closed."""
        if self._is_closed:
            return None
        probe = self._probe
        if probe is not None:  # most answer long before they expire
            return min(self._rules.open_time, max(0.0, probe.expires - self._now()))
        return max(0.0, self._retry_at - self._now())

    @property
    def fail_counter(self) -> int:
        """Failures of the server since the last success."""
        return self._in_a_row

    @property
    def success_counter(self) -> int:
        """Probes that succeeded since it became half-open."""
        return self._successes

    def is_system_error(self, exception: BaseException) -> bool:
        """Tell whether an exception counts as a failure of the server."""
        return is_failure(exception) and (
            not self._excluded_exceptions or super().is_system_error(exception)
        )

    @property
    def fail_max(self) -> int:
        """Failures in a row that trip it."""
        return self._rules.consecutive

    @fail_max.setter
    def fail_max(self, number: int) -> None:
        self._rules = replace(self._rules, consecutive=number)

    @property
    def reset_timeout(self) -> float:
        """Seconds it stays open the first time."""
        return self._rules.open_time

    @reset_timeout.setter
    def reset_timeout(self, timeout: float) -> None:
        self._rules = replace(self._rules, open_time=timeout)

    @property
    def success_threshold(self) -> int:
        """Probes in a row that must succeed to close it."""
        return self._rules.successes

    @success_threshold.setter
    def success_threshold(self, threshold: int) -> None:
        self._rules = replace(self._rules, successes=threshold)

    # -- by hand

    def open(self) -> bool:
        """Let nothing through until the open time has passed, whatever the rules say."""
        with self._guard.lock:
            self._open(self._now(), Cause.ORDER)
        self._teller.tell()
        return self._throw_new_error_on_trip

    def half_open(self) -> None:
        """Let a probe through at once."""
        with self._guard.lock:
            self._retry_at = self._now()
            self._become(STATE_HALF_OPEN)
        self._teller.tell()

    def expect(self, *, is_another: bool = False) -> None:
        """Take it that the server answers: somebody who does not ask here has heard of it.

        Let a probe through at once, however long it was to stay open. One that was opened by hand
        stays so.

        Args:
            is_another: another server has taken its place: let everything through.
        """
        with self._guard.lock:
            if self._cause is Cause.ORDER:
                return
            if is_another:
                self._close(self._now())
            elif self._state.name == STATE_OPEN:
                self._retry_at = self._now()
        self._teller.tell()

    def close(self) -> None:
        """Let everything through and forget what failed."""
        with self._guard.lock:
            self._close(self._now())
        self._teller.tell()

    @property
    def state(self) -> Any:
        """The state as pybreaker's object; assign a name to change it by hand."""
        return self._state

    @state.setter
    def state(self, state_str: str) -> None:
        by_hand = {STATE_OPEN: self.open, STATE_HALF_OPEN: self.half_open, STATE_CLOSED: self.close}
        if state_str not in by_hand:
            raise ValueError(f"no state {state_str!r}; there are {', '.join(by_hand)}")
        by_hand[state_str]()

    # -- listeners

    @property
    def listeners(self) -> tuple[Any, ...]:
        """Those who are told, in the order in which they were added."""
        return self._teller.listeners

    def add_listener(self, listener: CircuitBreakerListener) -> None:
        """Tell a listener from now on."""
        self._teller.add(listener)
        if self._teller.hears_successes:
            self._unremarkable = _NEVER

    def remove_listener(self, listener: CircuitBreakerListener) -> None:
        """Tell a listener no longer; ValueError if it was not told before."""
        self._teller.remove(listener)

    # -- with the lock held

    def _admit_probe(self) -> Probe | None:
        now = self._now()
        probe = self._probe
        # Two reads without a lock: at worst one call more or less fails fast.
        if now >= (probe.expires if probe else self._retry_at):
            with self._guard.lock:
                if self._is_closed:  # meanwhile
                    return None
                probe = self._probe
                if now >= (probe.expires if probe else self._retry_at):
                    if self._state.name != STATE_HALF_OPEN:
                        self._become(STATE_HALF_OPEN)
                    probe = self._probe = Probe(now + self._rules.probe_time)
                    admitted = probe
                else:
                    admitted = None
            self._teller.tell()
            if admitted:
                return admitted
        wait = self.retry_after or 0.0
        state = "one call is trying it" if probe else f"{self._cause or 'it failed'}"
        raise BreakerOpenError(
            f"breaker {self.current_state}: {state}",
            endpoint=self._name,
            hint=f"try again in {wait:.1f} s",
            retry_after=wait,
        )

    def _settle(self) -> None:
        """Read the clock after a number of successes; called without the lock."""
        now = self._now()
        if now < self._second_ends:  # all of them belong in one bucket
            self._uncounted += _STRIDE
            self._credit = _STRIDE
        else:
            with self._guard.lock:
                self._settle_at(now)

    def _settle_at(self, now: float) -> None:
        """Count the successes since the clock was last read, as of then."""
        successes = self._uncounted + _STRIDE - max(self._credit, 0)
        if successes:
            self._window.add(self._read_at, successes)
            self._uncounted = 0
            self._credit = _STRIDE
        self._read_at, self._second_ends = now, math.floor(now) + 1.0

    def _remark(self, seconds: float, probe: Probe | None) -> None:
        """Note a success that is slow, is heard of, or comes while something is bad."""
        with self._guard.lock:
            now = self._now()
            slow = not seconds < self._rules.slow_after
            if self._is_closed:
                self._settle_at(now)
                self._in_a_row = 0
                self._unremarkable = _NEVER
                self._window.add(now, 1, slow=int(slow))
                self._judge(now)
            elif probe is not None and probe is self._probe:
                self._probe = None
                if slow and self._allowed(Cause.SLOW):
                    self._open(now, Cause.SLOW)
                else:
                    self._successes += 1
                    if self._successes >= self._rules.successes:
                        self._close(now)
            self._teller.note("success")
        self._teller.tell()

    def _judge(self, now: float) -> None:
        """Trip if the rules say so; take no more notice of successes when all is well."""
        counts = self._window.counts(now)
        rules = self._rules
        cause = tripping(rules, counts, self._in_a_row)
        if cause and self._allowed(cause):
            self._open(now, cause)
        elif not (counts.failures or counts.slow or self._in_a_row or self._teller.hears_successes):
            self._unremarkable = rules.slow_after

    def _allowed(self, cause: Cause) -> bool:
        return self._may_trip is None or self._may_trip(cause)

    def _open(self, now: float, cause: Cause) -> None:
        self._cause = cause
        seconds = open_time(self._rules, self._times_opened, self._uniform(-1, 1))
        self._times_opened += 1
        self._retry_at = now + seconds
        self._state_storage.opened_at = datetime.fromtimestamp(self._clock.unix_ms() / 1000, UTC)
        self._become(STATE_OPEN, cause, seconds)

    def _close(self, now: float) -> None:
        self._cause = None
        self._closed_at = now
        self._times_opened = 0
        self._become(STATE_CLOSED)
        self._in_a_row = 0
        self._window.clear()
        self._credit = _STRIDE
        self._uncounted = 0
        self._read_at, self._second_ends = now, math.floor(now) + 1.0
        self._unremarkable = _NEVER if self._teller.hears_successes else self._rules.slow_after

    def _become(self, name: str, cause: Cause | None = None, seconds: float = 0.0) -> None:
        self._probe = None
        self._successes = 0
        self._unremarkable = _NEVER
        self._is_closed = name == STATE_CLOSED
        old = self._state
        self._state = _STATES[name](self, prev_state=old, notify=False)
        if isinstance(self._state, OpenState) and cause is not None:
            self._state.cause, self._state.seconds = cause, seconds
        self._state_storage.state = name
        if old.name != name:
            self._teller.note("state_change", old, self._state)


_STATES: Final[Mapping[str, Any]] = {
    STATE_CLOSED: pybreaker.CircuitClosedState,
    STATE_HALF_OPEN: pybreaker.CircuitHalfOpenState,
    STATE_OPEN: OpenState,
}
