"""Where commands print tables and notes for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Watched", "console", "printable"]

# Wider than any row: a pipe or a log file has no width of its own, and a cell that is folded
# over several lines cannot be searched.
_UNBOUNDED = 10_000


def console(*, stderr: bool = False, markup: bool = True) -> Console:
    """Return a console on standard output, or on standard error for progress and notes.

    On a terminal it has the terminal's width and colours; elsewhere neither. `markup=False` prints
    text that others wrote, such as errors, as it is.
    """
    from rich.console import Console

    found = Console(stderr=stderr, highlight=False, markup=markup)
    if not found.is_terminal:
        found = Console(stderr=stderr, highlight=False, markup=markup, width=_UNBOUNDED)
    return found


def printable(text: str) -> str:
    """Return text without what steers a terminal, lines and tabs kept."""
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)


class Watched:
    """Standard output that knows whether anything was written to it.

    Attributes:
        is_used: whether something was.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.is_used = False

    def write(self, text: str) -> int:
        """Write text."""
        self.is_used = self.is_used or bool(text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
