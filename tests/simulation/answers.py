"""What simulated servers answer, and what they keep of a transaction."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["Error", "Ok", "Place", "Transaction"]

Place = tuple[int, str, Any]
"""A row: logical shard, table, key."""


@dataclass(frozen=True, slots=True)
class Ok:
    """The answer of a statement that was carried out."""

    value: Any = None


@dataclass(frozen=True, slots=True)
class Error:
    """The answer of a statement that failed; its transaction is rolled back."""

    why: str
    hint: Any = None


@dataclass(slots=True, eq=False)
class Transaction:
    """One that is open."""

    is_snapshot: bool
    seen: int | None = None
    writes: dict[Place, Any] = field(default_factory=dict)
    locks: set[Place] = field(default_factory=set)
    is_open: bool = True

    def has_written(self, n: int) -> bool:
        """Tell whether it has written to a logical shard."""
        return any(place[0] == n for place in self.writes)
