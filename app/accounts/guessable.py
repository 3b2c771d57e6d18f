"""Passwords that are tried first by whoever guesses: those that most people have.

Source: NIST SP 800-63B-4, section 3.1.1.2: passwords are compared, whole, with a list of those that
are commonly used or have leaked. The list is zxcvbn's: the 30,000 most frequent ones of leaks;
those that are too short to be taken are left out. Pure.
"""

from __future__ import annotations

import unicodedata
from typing import Final

from zxcvbn.frequency_lists import FREQUENCY_LISTS

__all__ = ["MIN_PASSWORD_BYTES", "is_guessable"]

MIN_PASSWORD_BYTES: Final = 8

_COMMON: Final = frozenset(
    password for password in FREQUENCY_LISTS["passwords"] if len(password) >= MIN_PASSWORD_BYTES
)


def is_guessable(password: str) -> bool:
    """Tell whether a password is on the list, however its letters are written.

    Example:
        >>> is_guessable("PassWord"), is_guessable("a long enough sentence")
        (True, False)
    """
    return unicodedata.normalize("NFKC", password).casefold() in _COMMON
