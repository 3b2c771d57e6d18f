"""How long entries live, and how long readers wait for others."""

from __future__ import annotations

from typing import Final, NamedTuple

__all__ = ["DEFAULT_LIVES", "DEFAULT_PATIENCE", "MARKER_LIFE", "Lives", "Patience"]

MARKER_LIFE: Final = 4.0
"""Seconds a marker or a lease lives. Memcached counts whole seconds: one second may be missing.

A writer has to be done, COMMIT included, in half of it.
"""


class Lives(NamedTuple):
    """How long entries live, in seconds.

    Attributes:
        value: rows.
        absence: "no such row".
        marker: markers and leases.
    """

    value: float = 300.0
    absence: float = 5.0
    marker: float = MARKER_LIFE


DEFAULT_LIVES: Final = Lives()


class Patience(NamedTuple):
    """How long a reader waits for others before it reads the database itself.

    Attributes:
        markers: times it asks again while a writer is about to commit.
        leases: times it asks again while another reader fills.
        first: longest first pause, in seconds; the next ones are twice as long each.
        longest: longest pause, in seconds.
    """

    markers: int = 3
    leases: int = 12
    first: float = 0.002
    longest: float = 0.05


DEFAULT_PATIENCE: Final = Patience()
