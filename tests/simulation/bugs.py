"""Bugs that can be switched on, each with the judge that has to find it and what it has to say.

Source: faults.md, goal R2; the protections are those of docs/ and of the protocols they follow.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

__all__ = ["BUGS", "Bug"]


@dataclass(frozen=True)
class Bug:
    """A protection that is left out.

    Attributes:
        judge: who has to find it, by the name that `--require` takes.
        findings: of which there has to be one.
        world: how the world is to be, so that it does not take many seeds.
    """

    judge: str
    findings: tuple[str, ...]
    world: dict[str, Any] = field(default_factory=dict)


def _only(*kinds: str, **more: Any) -> dict[str, Any]:
    return {"kinds": kinds, "n_operations": 25, **more}


BUGS: Final[dict[str, Bug]] = {
    "lost write": Bug("appends", ("lost write",), _only("lists")),
    "lost update": Bug("appends", ("lost update", "lost write"), _only("lists")),
    "read skew": Bug("appends", ("G-single", "internal"), _only("lists")),
    "dirty read": Bug("appends", ("G1a",), _only("lists")),
    "blind retry": Bug("appends", ("duplicate write",), _only("lists")),
    "unlocked fence": Bug("appends", ("lost write", "incompatible order"), _only("lists")),
    "catch-up not awaited": Bug("appends", ("lost write", "incompatible order"), _only("lists")),
    "old owner writes": Bug("owners", ("epoch went back", "two owners"), _only("lists")),
    "activation before decision": Bug("appends", ("lost write", "stale read"), _only("lists")),
    "epoch not raised": Bug("owners", ("two owners",)),
    "sequence not advanced": Bug("sets", ("duplicate id",), _only("element")),
    "lost by failover": Bug("sets", ("lost write",), _only("element", lag=0.1)),
    "half a transfer": Bug("bank", ("wrong total",), _only("bank")),
    "double claim": Bug("names", ("two owners",), _only("name_")),
    "stale replica read": Bug("sessions", ("read your writes",), _only("row", lag=0.1)),
    "token not raised": Bug("sessions", ("monotonic reads",), _only("row", lag=0.3)),
    "effect not deduplicated": Bug("outbox", ("duplicate effect",), _only("event")),
    "outbox by id": Bug("outbox", ("order",), _only("event")),
    "outbox by cursor": Bug("outbox", ("lost event",), _only("event")),
    "event outside": Bug("outbox", ("aborted event",), _only("event")),
    "no deadline": Bug("liveness", ("past its deadline",)),
}
