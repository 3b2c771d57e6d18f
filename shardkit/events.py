"""What a cluster tells those who listen: where statements go, what fails, what was committed.

Frozen records, handed to every listener of `Cluster.listen` in the thread or task in which they
happen. Without a listener nothing is built and nothing is measured. Emitted by sessions; never
decides anything, and a listener that raises is logged and breaks no statement.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Final, Literal

from greenlet import getcurrent

__all__ = [
    "BreakerChanged",
    "CacheRead",
    "Caller",
    "Committed",
    "EndpointFailed",
    "Event",
    "Gathered",
    "Listener",
    "Listeners",
    "PrimaryChanged",
    "Relayed",
    "ReplicaPassedOver",
    "StatementRouted",
    "TwoPhaseStep",
    "caller",
]

_LOG: Final = logging.getLogger(__name__)

_PASSED_OVER: Final = frozenset({"shardkit", "sqlalchemy", "greenlet", "contextlib", "asyncio"})
"""Packages whose frames are nobody's code: they stand between a statement and its caller."""


@dataclass(frozen=True, slots=True)
class Caller:
    """The line of the program that ran a statement.

    Attributes:
        file: its path, as Python has it.
        line: number, from 1.
        function: the function that the line is in.
    """

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}"


@dataclass(frozen=True, slots=True)
class StatementRouted:
    """A statement is about to run; once more for each time that a session tries it again.

    What a flush writes is told by `Committed` only.

    Attributes:
        session: number of the session, unique in the process.
        operation: `select`, `insert`, `update` or `delete`.
        subject: name of the mapped class it is about, or an empty string.
        shards: the logical shards asked, ascending.
        total: how many logical shards there are.
        physical: names of the physical shards asked.
        from_replica: names of those of which a replica answers, not the primary.
        after: the token that the reader was given, or an empty string.
        caller: who runs it; None in a task that awaits nothing but the session.
    """

    session: int
    operation: str
    subject: str
    shards: tuple[int, ...]
    total: int
    physical: tuple[str, ...]
    from_replica: frozenset[str]
    after: str
    caller: Caller | None

    @property
    def kind(self) -> Literal["one", "some", "all"]:
        """How wide the route is; wider than one is a scatter."""
        if len(self.shards) == 1:
            return "one"
        return "all" if len(self.shards) == self.total else "some"


@dataclass(frozen=True, slots=True)
class Gathered:
    """The answers of a scatter are there, or some of them.

    Attributes:
        session: number of the session, unique in the process.
        answers: rows fetched, by name of the physical shard that answered.
        failures: exception by name of the physical shard that did not.
        seconds: from the first connection to the last answer.
        caller: as in `StatementRouted`.
    """

    session: int
    answers: Mapping[str, int]
    failures: Mapping[str, Exception]
    seconds: float
    caller: Caller | None


@dataclass(frozen=True, slots=True)
class CacheRead:
    """A session looked for rows in the cache.

    What it read from a database itself, as the cache did not answer, is told by `StatementRouted`
    too.

    Attributes:
        session: number of the session, unique in the process.
        subject: name of the mapped class.
        rows: how many rows it looked for.
        hits: had from the cache, "no such row" among them.
        misses: had from a database.
        fills: of the misses, those that were stored.
        waits: times it asked again because another filled or a writer was about to commit.
        garbage: entries that were not of their row; removed.
        unanswered: requests that no server answered in time.
        seconds: it took, the reading of misses included.
        caller: as in `StatementRouted`.
    """

    session: int
    subject: str
    rows: int
    hits: int
    misses: int
    fills: int
    waits: int
    garbage: int
    unanswered: int
    seconds: float
    caller: Caller | None


@dataclass(frozen=True, slots=True)
class EndpointFailed:
    """A server did not answer a session, or its connection broke.

    Attributes:
        physical: name of the physical shard.
        role: `primary` or `replica`.
        endpoint: the server, as `physical/role@host:port`.
        error: what happened.
    """

    physical: str
    role: str
    endpoint: str
    error: Exception


@dataclass(frozen=True, slots=True)
class PrimaryChanged:
    """Another server of a physical shard is its primary now, and this process goes there.

    Attributes:
        physical: name of the physical shard.
        before: the old primary, as `physical/role@host:port`.
        endpoint: the new one.
    """

    physical: str
    before: str
    endpoint: str


@dataclass(frozen=True, slots=True)
class ReplicaPassedOver:
    """A replica could not answer a reader, which asks the primary from then on.

    It had not replayed what the reader must see, or its replay cancelled the statement.

    Attributes:
        session: number of the session, unique in the process.
        physical: name of the physical shard.
        endpoint: the replica, as `physical/role@host:port`.
    """

    session: int
    physical: str
    endpoint: str


@dataclass(frozen=True, slots=True)
class Committed:
    """A writer committed what it had written.

    Attributes:
        session: number of the session, unique in the process.
        physical: names of the physical shards written to, ascending.
        token: what a later reader must have seen.
        caller: as in `StatementRouted`.
    """

    session: int
    physical: tuple[str, ...]
    token: str
    caller: Caller | None


@dataclass(frozen=True, slots=True)
class Relayed:
    """A relay has delivered what it had claimed on one physical shard.

    Attributes:
        physical: name of the physical shard.
        delivered: events whose handler succeeded.
        failed: events whose handler failed; some may be dead letters now.
        seconds: from the first handler to the last acknowledgement.
    """

    physical: str
    delivered: int
    failed: int
    seconds: float


@dataclass(frozen=True, slots=True)
class BreakerChanged:
    """The breaker of a server changed its state.

    Attributes:
        physical: name of the physical shard.
        role: `primary` or `replica`.
        endpoint: the server, as `physical/role@host:port`.
        old: the state it left: `closed`, `open` or `half-open`.
        new: the state it is in.
        cause: why it opened; None when it did something else.
        retry_after: seconds until it lets a probe through; None unless it opened.
    """

    physical: str
    role: str
    endpoint: str
    old: str
    new: str
    cause: str | None
    retry_after: float | None


@dataclass(frozen=True, slots=True)
class TwoPhaseStep:
    """A commit over several physical shards reached a step.

    Attributes:
        session: number of the session, unique in the process.
        transaction: 32 hexadecimal digits, in the name of everything it prepares.
        step: `preparing`, `prepared`, `deciding` (the coordinator is about to commit),
            `decided`, then `finished`, or `pending` where a participant did not answer; or
            `abandoned` after an error.
        coordinator: name of the physical shard that decides.
        participants: names of the others.
        pending: those that have not committed their part yet; the resolver will.
    """

    session: int
    transaction: str
    step: str
    coordinator: str
    participants: tuple[str, ...]
    pending: tuple[str, ...]


Event = (
    StatementRouted
    | Gathered
    | EndpointFailed
    | PrimaryChanged
    | BreakerChanged
    | ReplicaPassedOver
    | CacheRead
    | Committed
    | Relayed
    | TwoPhaseStep
)
Listener = Callable[[Event], None]
"""Called with each event. Must be quick and must not use the session that emits it."""


class Listeners:
    """Those who listen to one cluster. Thread-safe; false when there are none."""

    __slots__ = ("_listeners", "_lock")

    def __init__(self) -> None:
        self._listeners: tuple[Listener, ...] = ()
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self._listeners)

    def add(self, listener: Listener) -> Callable[[], None]:
        """Tell a listener of every event from now on; return what ends it, once or often."""

        # A function of its own, so that a listener added twice is two.
        def tell(happened: Event) -> None:
            listener(happened)

        def remove() -> None:
            with self._lock:
                self._listeners = tuple(each for each in self._listeners if each is not tell)

        with self._lock:
            self._listeners = (*self._listeners, tell)
        return remove

    def emit(self, happened: Event) -> None:
        """Tell every listener; what one raises is logged."""
        for tell in self._listeners:
            try:
                tell(happened)
            except Exception:  # noqa: BLE001 - a statement never fails for those who watch it
                _LOG.exception("a listener failed on %s", type(happened).__name__)


def caller() -> Caller | None:
    """Return the innermost line of the program, outside shardkit and SQLAlchemy.

    Under asyncio a session runs in a greenlet; its parent stands where the program awaits.
    """
    greenlet = getcurrent()
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - the way to the caller
    while True:
        while frame is not None:
            module = frame.f_globals.get("__name__") or ""
            if module == "asyncio.events":  # the loop: whoever made this task has gone on
                return None
            if module.partition(".")[0] not in _PASSED_OVER:
                return Caller(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)
            frame = frame.f_back
        if greenlet.parent is None:
            return None
        greenlet = greenlet.parent
        frame = greenlet.gr_frame
