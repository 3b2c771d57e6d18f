"""What can be done to a link, as values, and the trigger that waits for a message to do it.

Made and used by `shardkit.testing.proxy`; opens nothing.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from shardkit.testing.wire import Message

__all__ = ["BOTH", "CHUNK", "Breakable", "Counts", "Fault", "Shape", "Trigger", "Way", "When"]

CHUNK = 65536
"""Bytes read or written at once, at most."""


class Way(Enum):
    """A direction."""

    TO_SERVER = "to server"
    TO_CLIENT = "to client"


BOTH = (Way.TO_SERVER, Way.TO_CLIENT)


class Fault(Enum):
    """What a trigger does to the connection that it watches.

    `RESET`: both sides see "connection reset". `CLOSE`: both see an orderly end. `HALF_OPEN`: the
    server sees an end, the client sees nothing, as after a power failure. `BLACK_HOLE`: both stay
    open, nothing arrives any more. `HOLD`: the message waits for `Trigger.release`.
    """

    RESET = "reset"
    CLOSE = "close"
    HALF_OPEN = "half-open"
    BLACK_HOLE = "black hole"
    HOLD = "hold"


class When(Enum):
    """`BEFORE` the server hears the message; `AFTER` it has answered, unheard by the client."""

    BEFORE = "before"
    AFTER = "after"


@dataclass(frozen=True, slots=True)
class Shape:
    """How one direction delays bytes; they never overtake each other.

    Attributes:
        latency: seconds each piece is under way.
        jitter: up to so many seconds more, at random.
        bandwidth: bytes a second and connection; None for any number.
        slice_bytes: largest piece that is sent at once; None for any.
        stumbles: share of the pieces, at random, that are late by `stumble`; from 0 to 1.
        stumble: seconds that such a piece takes in addition.
    """

    latency: float = 0.0
    jitter: float = 0.0
    bandwidth: float | None = None
    slice_bytes: int | None = None
    stumbles: float = 0.0
    stumble: float = 0.0

    @property
    def largest(self) -> int:
        """Bytes to send at once."""
        steady = CHUNK if self.bandwidth is None else max(1, int(self.bandwidth / 50))
        return min(steady, self.slice_bytes or CHUNK)


@dataclass(frozen=True, slots=True)
class Counts:
    """What went over the link since the start, or since `forget`.

    Attributes:
        connections: accepted.
        logins: of PostgreSQL.
        messages: of clients, without those of logins.
        statements: that ran: simple queries and executions.
        round_trips: turns from client to server and back, without those of logins.
        bytes_to_server: from clients.
        bytes_to_client: from the server.
    """

    connections: int = 0
    logins: int = 0
    messages: int = 0
    statements: int = 0
    round_trips: int = 0
    bytes_to_server: int = 0
    bytes_to_client: int = 0


class Breakable(Protocol):
    """One connection of a client."""

    def suffer(self, fault: Fault) -> None:
        """Break it."""


class Trigger:
    """Waits for a message and then acts; made by `FaultProxy.on`.

    Attributes:
        when: before the server hears the message, or after it has answered.
        error: what the function raised that it was to call, or None.
        is_over: whether it watches no longer.
        released: set when what is held may go on; of the loop of the link.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        pattern: str,
        fault: Fault | float | Callable[[], object],
        *,
        nth: int,
        times: int | None,
        when: When,
    ) -> None:
        self.when = when
        self.error: BaseException | None = None
        self.is_over = False
        self.released = asyncio.Event()
        self._loop = loop
        self._pattern = re.compile(pattern, re.IGNORECASE)
        self._fault = fault
        self._nth = nth
        self._times = times
        self._seen = 0
        self._has_fired = threading.Event()

    @property
    def fired(self) -> bool:
        """Whether it has acted."""
        return self._has_fired.is_set()

    def wait(self, timeout: float) -> None:
        """Wait until it acts: from then on a held message is held.

        Args:
            timeout: seconds.

        Raises:
            AssertionError: no message matched in time.
        """
        if not self._has_fired.wait(timeout):
            raise AssertionError(
                f"not within {timeout:g} seconds: message {self._nth} like "
                f"{self._pattern.pattern!r} (seen: {self._seen})"
            )
        if self.error is not None:
            raise self.error

    def release(self) -> None:
        """Let what is held go on."""
        self._loop.call_soon_threadsafe(self.released.set)

    def cancel(self) -> None:
        """Watch no longer, and release."""
        self.is_over = True
        self.release()

    def matches(self, message: Message) -> bool:
        """Count a message; return whether it is the one."""
        if self.is_over or not message.is_statement or not self._pattern.search(message.text or ""):
            return False
        self._seen += 1
        if self._seen < self._nth:
            return False
        self.is_over = self._times is not None and self._seen >= self._nth + self._times - 1
        return True

    async def act(self, link: Breakable) -> None:
        """Do what it is for; return when the message may go on."""
        self._has_fired.set()
        fault = self._fault
        if fault is Fault.HOLD:
            await self.released.wait()
        elif isinstance(fault, Fault):
            link.suffer(fault)
        elif callable(fault):
            try:
                await self._loop.run_in_executor(None, fault)
            except Exception as error:  # noqa: BLE001  told to the test, by `wait` and `stop`
                self.error = error
        else:
            await asyncio.sleep(fault)
