"""What stands before each server: its breaker, its concurrency limit, the retry budget it shares.

Whoever wants a connection asks the guard first; the driver tells it what becomes of every wait.
Counts and decides, never talks to a server.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from shardkit.breaker import Breaker, Probe
from shardkit.breakers import Breakers
from shardkit.clock import SYSTEM, Clock
from shardkit.events import Listeners
from shardkit.limits import ConcurrencyLimit, Priority
from shardkit.retry import RetryBudget
from shardkit.topology import Endpoint, Role, Topology

__all__ = ["EndpointGuard", "background", "guards"]

_PRIORITY: ContextVar[Priority] = ContextVar("shardkit_priority", default=Priority.USER)

# The probes that the running thread or task holds, until the first outcome of each.
_PROBES: ContextVar[Mapping[EndpointGuard, Probe] | None] = ContextVar(
    "shardkit_probes", default=None
)


@contextmanager
def background() -> Iterator[None]:
    """Let what runs inside be shed before what users wait for.

    It counts where the cluster has `limits.adaptive`: a server with as many calls as it answers
    in time refuses work of the background first, with `OverloadedError`.

    Example:
        >>> with background():
        ...     pass  # fan-out, repair, statistics
    """
    before = _PRIORITY.set(Priority.BACKGROUND)
    try:
        yield
    finally:
        _PRIORITY.reset(before)


class EndpointGuard:
    """Hears of every call to one server.

    Args:
        endpoint: the server.
        breaker: of the server.
        budget: of the servers with its role in its physical shard.
        limit: how many sessions may hold a connection to it; None for as many as the pool has.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        breaker: Breaker,
        budget: RetryBudget,
        limit: ConcurrencyLimit | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.breaker = breaker
        self.budget = budget
        self.limit = limit

    def admit(self) -> None:
        """Let one session through.

        Raises:
            BreakerOpenError: the server is left alone for now (retryable).
            OverloadedError: it has enough to do (retryable).
        """
        if self.limit is not None:
            self.limit.acquire(_PRIORITY.get())
        try:
            probe = self.breaker.admit()
        except BaseException:
            self.released()
            raise
        if probe is not None:
            _PROBES.set({**(_PROBES.get() or {}), self: probe})

    def released(self, seconds: float | None = None) -> None:
        """Note that a session that was let through is done.

        Args:
            seconds: how long the server took for its first answer; None if it gave none.
        """
        if self.limit is not None:
            self.limit.release(seconds)

    def succeeded(self, seconds: float) -> None:
        """Note that the server answered."""
        breaker = self.breaker
        breaker.succeeded(seconds, None if breaker.is_closed else self._probe())
        self.budget.succeeded()

    def failed(self, error: BaseException, seconds: float) -> None:
        """Note an error of the driver, of which some are failures of the server."""
        self.breaker.failed(error, seconds, self._probe())

    def _probe(self) -> Probe | None:
        """Return the probe that this thread or task holds, once."""
        held = _PROBES.get()
        if not held or self not in held:
            return None
        _PROBES.set({guard: probe for guard, probe in held.items() if guard is not self})
        return held[self]


def guards(
    topology: Topology,
    *,
    listeners: Listeners | None = None,
    ceiling: int | None = None,
    clock: Clock = SYSTEM,
) -> Mapping[Endpoint, EndpointGuard]:
    """Return the guard of every endpoint; those of one physical shard and role share a budget.

    Args:
        topology: the cluster.
        listeners: told of breakers that change.
        ceiling: the highest concurrency limit; None for none at all.
        clock: where the time comes from.
    """
    found: dict[Endpoint, EndpointGuard] = {}
    for shard in topology.physical.values():
        budgets = {role: RetryBudget(clock=clock) for role in Role}
        for endpoint, breaker in Breakers(shard, listeners=listeners, clock=clock).items():
            limit = None
            if ceiling is not None:
                initial = min(20, ceiling)
                limit = ConcurrencyLimit(
                    str(endpoint), initial=initial, ceiling=ceiling, clock=clock
                )
            found[endpoint] = EndpointGuard(endpoint, breaker, budgets[endpoint.role], limit)
    return found
