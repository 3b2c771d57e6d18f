"""`synchronous_standby_names`, read and written. Pure.

Source: PostgreSQL manual, 19.6.2.
"""

from __future__ import annotations

import re
from typing import Final

__all__ = ["lowered", "named_standbys"]

_TOKEN: Final = re.compile(r'"((?:[^"]|"")*)"|([^\s,()"]+)|([(),])')

_IS_FIRST: Final = re.compile(r"\s*(?!any\b)", re.IGNORECASE)
"""What does not begin with ANY counts the first of its names that are there."""


def named_standbys(text: str) -> tuple[int, tuple[str, ...]]:
    """Return how many standbys a commit waits for, and the names that count.

    Args:
        text: `synchronous_standby_names`; empty for 0 and none.

    Example:
        >>> named_standbys('ANY 1 (alpha_1, "Alpha 2")')
        (1, ('alpha_1', 'Alpha 2'))
    """
    # A quoted name is never a word of the syntax.
    tokens = [
        (quoted.replace('""', '"'), True) if quoted or not (word or sign) else (word or sign, False)
        for quoted, word, sign in _TOKEN.findall(text)
    ]
    words = [name for name, is_quoted in tokens if is_quoted or name not in "(),"]
    if ("(", False) not in tokens:
        return (1 if words else 0), tuple(words)
    before = [name for name, _ in tokens[: tokens.index(("(", False))]]
    number = int(before[-1]) if before and before[-1].isdigit() else 1
    return number, tuple(words[len(before) :])


def lowered(text: str, number: int) -> str:
    """Return the same standbys, of which fewer have to confirm; empty for none.

    Example:
        >>> lowered("ANY 2 (alpha_1, alpha_2)", 1)
        'ANY 1 ("alpha_1", "alpha_2")'
    """
    if not number:
        return ""
    method = "FIRST" if _IS_FIRST.match(text) else "ANY"
    names = ", ".join('"{}"'.format(n.replace('"', '""')) for n in named_standbys(text)[1])
    return f"{method} {number} ({names})"
