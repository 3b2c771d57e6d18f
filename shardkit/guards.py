"""What is counted for each server: its breaker's outcomes and the retry budget it shares.

The driver tells the guard of a server what becomes of every wait; whoever wants a connection asks
it first. Counts and decides, never talks to a server.
"""

from __future__ import annotations

from collections.abc import Mapping

from shardkit.clock import SYSTEM, Clock
from shardkit.retry import RetryBudget
from shardkit.topology import Endpoint, Role, Topology

__all__ = ["EndpointGuard", "guards"]


class EndpointGuard:
    """Hears of every call to one server.

    Args:
        endpoint: the server.
        budget: of the servers with its role in its physical shard.
    """

    def __init__(self, endpoint: Endpoint, budget: RetryBudget) -> None:
        self.endpoint = endpoint
        self.budget = budget

    def admit(self) -> None:
        """Let one call through."""

    def succeeded(self, seconds: float) -> None:
        """Note that the server answered."""
        self.budget.succeeded()

    def failed(self, error: BaseException, seconds: float) -> None:
        """Note an error of the driver."""


def guards(topology: Topology, *, clock: Clock = SYSTEM) -> Mapping[Endpoint, EndpointGuard]:
    """Return the guard of every endpoint; those of one physical shard and role share a budget."""
    found: dict[Endpoint, EndpointGuard] = {}
    for shard in topology.physical.values():
        budgets = {role: RetryBudget(clock=clock) for role in Role}
        for endpoint in shard.endpoints:
            found[endpoint] = EndpointGuard(endpoint, budgets[endpoint.role])
    return found
