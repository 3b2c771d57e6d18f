"""Protections that are left out on purpose, by name, to see that judges notice.

The processes of the history test call `apply` at their start. Nothing of this is in the library:
each bug is a patch of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

__all__ = ["BUGS", "apply"]

BUGS: Final[dict[str, Callable[[], None]]] = {}


def apply(name: str) -> None:
    """Leave a protection out in this process, for good; an empty name leaves none out."""
    if name:
        BUGS[name]()
