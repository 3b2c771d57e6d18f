"""Passwords that show themselves to nobody but the driver, and errors without what they passed by.

A password is text that libpq has to be given, and an object that people print: in a dictionary of
connection options, in the locals of a traceback, in a log. `Secret` is the text for the one and
stars for the others. What the driver makes of it, a connection string, stands in the frames of
the driver; `without_frames` takes these off an error before it goes on.
"""

from __future__ import annotations

from typing import TypeVar

__all__ = ["Secret", "without_frames"]

E = TypeVar("E", bound=BaseException)


class Secret(str):
    """A text whose `repr` does not tell it."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"


def without_frames(error: E) -> E:
    """Return an error with no frames, and so no locals, neither its own nor of what caused it.

    Args:
        error: one whose message is all that is wanted: of a connection that could not be had.
    """
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        found = left.pop()
        if found is not None and id(found) not in seen:
            seen.add(id(found))
            found.__traceback__ = None
            if hasattr(found, "_pgconn"):  # psycopg keeps there what it connected with
                found._pgconn = None  # noqa: SLF001
            left += [found.__cause__, found.__context__, getattr(found, "orig", None)]
    return error
