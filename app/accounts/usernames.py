"""The form of a username: one canonical text for all ways of writing it.

Compatibility forms and case are folded first (NFKC, casefold), then only ASCII letters, digits,
dot and underscore are allowed, so that no two names look alike in another alphabet.
"""

from __future__ import annotations

import re
import unicodedata

__all__ = ["canonical"]

_FORM = re.compile(r"[a-z0-9](?:[a-z0-9]|[._](?![._])){1,28}[a-z0-9]")
_RESERVED = frozenset({"admin", "administrator", "root", "support", "help", "api", "static"})


def canonical(name: str) -> str:
    """Return the canonical form of a username.

    Args:
        name: as a person typed it; a leading `@` and surrounding spaces are dropped.

    Raises:
        ValueError: not a name that can be had.

    Example:
        >>> canonical(" @Ana.Lima ")
        'ana.lima'
    """
    folded = unicodedata.normalize("NFKC", name).casefold().strip().removeprefix("@")
    if not _FORM.fullmatch(folded):
        raise ValueError(
            "must have 3 to 30 letters a-z, digits, dots or underscores, starting and ending "
            "with a letter or digit"
        )
    if folded in _RESERVED:
        raise ValueError("is reserved")
    return folded
