"""Steps of a failover as people read them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from shardkit.ops.failover.machine import Action

__all__ = ["plain", "words"]


def plain(action: Action) -> dict[str, Any]:
    """Return a step as JSON has it."""
    return {"step": type(action).__name__, **asdict(action)}


def words(action: Action) -> str:
    """Return a step in a line: what is done, and with which servers, or why nothing is."""
    found = plain(action)
    step = found.pop("step").lower()
    said = [
        " ".join(value) if isinstance(value, list | tuple) else str(value)
        for value in found.values()
        if value is not None
    ]
    return f"{step}: {', '.join(said)}"
