"""What a backend with servers is told, and what it says of them: for threads and asyncio alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final, TypedDict

from shardkit.caches.backend import DEADLINE
from shardkit.caches.node import RETURN_HOLD
from shardkit.caches.nodes import CACHE_RULES, Nodes, Owners
from shardkit.clock import SYSTEM, Clock
from shardkit.windows import BreakerRules

__all__ = ["RELAY_OPTIONS", "Given", "Options", "Serving"]


class Options(TypedDict, total=False):
    """Keyword arguments of every backend with servers.

    Attributes:
        gutter: servers that stand in, for seconds, for those that are left alone; none.
        deadline: seconds a call may take; 0.05.
        connections: most connections to each server (from each event loop); 32.
        rules: of the breakers; `CACHE_RULES`.
        clock: source of time; the system's.
        hold: seconds that a server answers again before it is read; `RETURN_HOLD`.
        on_dirty: called with the name of a server that this process reads no more for now.
    """

    gutter: Sequence[str]
    deadline: float
    connections: int
    rules: BreakerRules
    clock: Clock
    hold: float
    on_dirty: Callable[[str], None] | None


RELAY_OPTIONS: Final[Options] = {
    "deadline": 0.2,
    "rules": replace(CACHE_RULES, open_time=0.1, longest_open=0.25),
}
"""For relays: nobody waits for them, and what they have not repaired others may be shown. So they
wait longer for a server that is slow, and try one that was gone sooner, than those who read it."""


class Given(Options, total=False):
    """And of their base classes.

    Attributes:
        owners: which key belongs to which server; None for consistent hashing.
    """

    owners: Owners | None


class Serving:
    """A cache of several servers; subclasses carry its calls out.

    Args:
        servers: their names; the same list, in any order, in every process.
        owners: which key belongs to which; None for consistent hashing.
        gutter: and the rest: see `Options`.
    """

    def __init__(
        self,
        servers: Sequence[str],
        *,
        owners: Owners | None = None,
        gutter: Sequence[str] = (),
        deadline: float = DEADLINE,
        connections: int = 32,
        rules: BreakerRules = CACHE_RULES,
        clock: Clock = SYSTEM,
        hold: float = RETURN_HOLD,
        on_dirty: Callable[[str], None] | None = None,
    ) -> None:
        self.nodes = Nodes(
            servers,
            gutter=gutter,
            owners=owners,
            rules=rules,
            clock=clock,
            hold=hold,
            on_dirty=on_dirty,
        )
        self.seconds = deadline
        self.connections = connections
        self.now = clock.monotonic

    @property
    def has_gutter(self) -> bool:
        """Whether there is a gutter to repair, too."""
        return bool(self.nodes.gutter)

    @property
    def dirty(self) -> frozenset[str]:
        """Names of the servers that this process does not read for now."""
        return self.nodes.dirty

    @property
    def must_flush(self) -> frozenset[str]:
        """Names of those that only `flush` makes clean."""
        return self.nodes.must_flush

    def home(self, key: str) -> str:
        """Return the name of the server that a key belongs to."""
        return self.nodes.home(key).name

    def readmit(self, name: str) -> bool:
        """Read a server again: everything it missed has been repaired there."""
        return self.nodes.readmit(name)
