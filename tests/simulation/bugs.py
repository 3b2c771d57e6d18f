"""Bugs that can be switched on, each with the judge that has to find it and what it has to say.

Source: faults.md, goal R2; the protections are those of docs/ and of the protocols they follow.
"""

from __future__ import annotations

from typing import Final

__all__ = ["BUGS"]

BUGS: Final[dict[str, tuple[str, frozenset[str]]]] = {
    # What is left out: which judge, and the findings of which one has to be there.
    "lost write": ("appends", frozenset({"lost write", "phantom value", "stale read"})),
    "lost update": ("appends", frozenset({"lost update", "incompatible order", "lost write"})),
    "read skew": ("appends", frozenset({"G-single", "G-single-realtime", "internal"})),
    "dirty read": ("appends", frozenset({"G1a", "G1b", "G1c"})),
    "blind retry": ("appends", frozenset({"duplicate write"})),
    "unlocked fence": ("appends", frozenset({"lost write", "stale read", "incompatible order"})),
    "lost change": ("appends", frozenset({"lost write", "stale read", "incompatible order"})),
    "old owner writes": ("owners", frozenset({"epoch went back"})),
    "epoch not raised": ("owners", frozenset({"two owners"})),
    "sequence not advanced": ("sets", frozenset({"duplicate id"})),
    "lost by failover": ("sets", frozenset({"lost write"})),
    "half a transfer": ("bank", frozenset({"wrong total"})),
    "double claim": ("names", frozenset({"two owners", "lost name"})),
    "stale replica read": ("sessions", frozenset({"read your writes"})),
    "token not raised": ("sessions", frozenset({"monotonic reads"})),
    "effect not deduplicated": ("outbox", frozenset({"duplicate effect"})),
    "outbox by id": ("outbox", frozenset({"order"})),
    "outbox by cursor": ("outbox", frozenset({"lost event"})),
    "event outside": ("outbox", frozenset({"aborted event", "phantom effect"})),
    "no deadline": ("liveness", frozenset({"past its deadline", "hang"})),
}
