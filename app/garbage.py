"""What a server has loaded is not looked through for garbage again; called before it serves.

A full collection looks at every object: modules, models, routes and schemas are some hundred
thousands, which took 140 ms of CPU at which nobody was answered. They stay as long as the process,
so they are set aside, and a full collection takes less than one. Not for processes that make
several services, such as tests: what is set aside is never collected.
"""

from __future__ import annotations

import gc

from sqlalchemy.orm import configure_mappers

__all__ = ["set_aside"]


def set_aside() -> None:
    """Have the collector leave alone what there is by now. Source: `gc.freeze`, Python's manual."""
    configure_mappers()  # otherwise with the first request
    gc.collect()
    gc.freeze()
