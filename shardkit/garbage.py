"""What a process has loaded is not looked through for garbage again; called before it serves.

A full collection looks at every object: modules, models, routes and schemas are some hundred
thousands, and everybody in the process waits for 30 to 140 ms, longer than a logical shard is
closed when it moves. They stay as long as the process, so they are set aside, and a full
collection takes less than one. Not for processes that make several services, such as tests: what
is set aside is never collected.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.orm import configure_mappers

__all__ = ["being_aside", "set_aside"]


def set_aside() -> None:
    """Have the collector leave alone what there is by now; call it once, when all is imported.

    Source: `gc.freeze`, Python's manual.

    Example:
        >>> set_aside()  # doctest: +SKIP
    """
    configure_mappers()  # otherwise with the first session
    gc.collect()
    gc.freeze()


@contextmanager
def being_aside() -> Iterator[None]:
    """Have it leave alone what there is by now, for as long as this lasts."""
    set_aside()
    try:
        yield
    finally:
        gc.unfreeze()
