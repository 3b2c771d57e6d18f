"""Visits every state of the cache model once, breadth first: a trace is a shortest one."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from tests.property.cachemodel import Configuration, State
from tests.property.listmodel import model_of


@dataclass
class Result:
    """What a search found.

    Attributes:
        states: visited.
        seconds: it took.
        found: shortest way to the first violation of each property.
        is_whole: whether every state was visited.
    """

    configuration: Configuration
    states: int = 0
    seconds: float = 0.0
    found: dict[str, list[str]] = field(default_factory=dict)
    is_whole: bool = True

    @property
    def verdict(self) -> str:
        return "".join(name for name in "AB" if name in self.found) or "-"


def search(
    configuration: Configuration, *, wanted: str = "", traced: bool = False, limit: int = 10**9
) -> Result:
    """Visit every state.

    Args:
        configuration: what is searched.
        wanted: end as soon as these properties are violated; empty to go on to the end.
        traced: remember the way to every state; takes more memory.
        limit: states after which to give up.
    """
    began = time.perf_counter()
    model = model_of(configuration)
    result = Result(configuration)
    frontier = list(model.starts())
    pack = struct.Struct(f"<{len(frontier[0])}H").pack
    parents: dict[bytes, tuple[bytes | None, str]] = {}
    seen = {pack(*s) for s in frontier}
    if traced:
        parents = {pack(*s): (None, "") for s in frontier}

    def note(names: Iterable[str], packed: bytes, last: str) -> None:
        for name in names:
            if name not in result.found:
                result.found[name] = [*_way(parents, packed), last] if traced else [last]

    while frontier:
        following: list[State] = []
        for s in frontier:
            packed = pack(*s) if traced else b""
            if model.is_quiet(s) and model.is_stale(s):
                note("A", packed, "and so it stays")
            for name, after, violated in model.steps(s):
                if violated:
                    note(violated, packed, name)
                key = pack(*after)
                if key not in seen:
                    seen.add(key)
                    following.append(after)
                    if traced:
                        parents[key] = (packed, name)
        if (wanted and set(wanted) <= set(result.found)) or len(seen) >= limit:
            result.is_whole = not following
            break
        frontier = following
    result.states, result.seconds = len(seen), time.perf_counter() - began
    return result


def _way(parents: dict[bytes, tuple[bytes | None, str]], packed: bytes) -> list[str]:
    names: list[str] = []
    at: bytes | None = packed
    while at is not None:
        at, name = parents[at]
        if name:
            names.append(name)
    return names[::-1]
